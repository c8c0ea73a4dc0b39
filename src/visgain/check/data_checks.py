"""What can be wrong with a dataset before any model comes into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from visgain.check.findings import Finding, count, listed, share, shortened, some
from visgain.check.scan import Scan

MANY = 0.5
"""From this share of rows on, a loss is an error."""


def nothing_to_score(scan: Scan) -> Finding | None:
    """No row has both a picture and an answer."""
    if any(one.images for one in scan.rows):
        return None
    kinds = reasons((skip.row, skip.reason) for skip in scan.skipped)
    return Finding(
        check="nothing-to-score",
        severity="error",
        what="no row can be scored: "
        + (f"{share(len(scan.skipped), scan.n_looked_at)} are unusable" if scan.skipped else "none has a picture"),
        seen="; ".join(text for text, _ in kinds[:3]),
        rows=some(skip.row for skip in scan.skipped),
        mend="check --data: rows need a picture, a question and an answer; docs/formats.md says in which form",
    )


def unusable_rows(scan: Scan) -> Finding | None:
    """Rows that the reader refuses."""
    if not scan.skipped or not scan.rows:
        return None
    kinds = reasons((skip.row, skip.reason) for skip in scan.skipped)
    return Finding(
        check="unusable-rows",
        severity="error" if len(scan.skipped) >= MANY * scan.n_looked_at else "warning",
        what=f"{share(len(scan.skipped), scan.n_looked_at)} rows will be skipped",
        seen="; ".join(f"{text} ({len(rows):,})" for text, rows in kinds[:4]),
        rows=some(rows[0] for _, rows in kinds),
        mend="mend them in the dataset, or leave them: they are listed in skipped.jsonl and nothing takes their place",
    )


def missing_pictures(scan: Scan) -> Finding | None:
    """Pictures that are not there, or cannot be used."""
    rows = scan.without_picture()
    if not rows:
        return None
    kinds = reasons(enumerate(scan.pictures.unusable.values()))
    root = scan.pictures.better_root
    with_pictures = sum(bool(one.images) for one in scan.rows)
    return Finding(
        check="missing-pictures",
        severity="error" if len(rows) >= MANY * with_pictures else "warning",
        what=f"{share(len(rows), with_pictures)} rows with a picture will be skipped: "
        f"{share(len(scan.pictures.unusable), scan.pictures.n_looked_at)} pictures cannot be used",
        seen="; ".join(f"{text} ({len(found):,})" for text, found in kinds[:3]),
        rows=some(rows),
        mend=f"most of them lie there: --image-root {root}"
        if root
        else "point --image-root at the folder that their paths begin in, or download them",
    )


def colliding_ids(scan: Scan) -> Finding | None:
    """One id, several contents."""
    if not scan.colliding:
        return None
    rows = [row for found in scan.colliding.values() for row in found]
    name, first = next(iter(scan.colliding.items()))
    return Finding(
        check="colliding-ids",
        severity="warning",
        what=f"{count(len(scan.colliding), 'id')} name{'s' if len(scan.colliding) == 1 else ''} {len(rows):,} rows "
        "that differ; visgain keeps them apart by row number",
        seen=f"id {shortened(name)!r} in rows {listed([str(row) for row in first])}",
        rows=some(rows),
        mend="join scores and selections by row, never by id; a tool that joins by id would mix these rows up, "
        "so give it ids that are unique",
    )


def repeated_rows(scan: Scan) -> Finding | None:
    """The same row twice."""
    if not scan.repeated:
        return None
    return Finding(
        check="repeated-rows",
        severity="note",
        what=f"{share(len(scan.repeated), scan.n_looked_at)} rows repeat another one to the letter",
        rows=some(scan.repeated),
        mend="drop them unless they are meant to weigh more",
    )


def empty_answers(scan: Scan) -> Finding | None:
    """An empty answer supervises the end of the turn alone: the model learns to say nothing."""
    rows = [one.row for one in scan.rows if one.has_empty_answer]
    if not rows:
        return None
    return Finding(
        check="empty-answers",
        severity="warning",
        what=f"{share(len(rows), len(scan.rows))} rows have an empty answer among others, which teaches silence",
        rows=some(rows),
        mend="drop these turns; --end-of-turn ignore leaves them without a label",
    )


def text_only(scan: Scan) -> Finding | None:
    """Rows without pictures are kept whole and not scored."""
    rows = [one.row for one in scan.rows if not one.images]
    if not rows or len(rows) == len(scan.rows):
        return None
    return Finding(
        check="text-only",
        severity="note",
        what=f"{share(len(rows), len(scan.rows))} rows are text-only: not scored, and kept whole by select",
        rows=some(rows),
    )


def same_pictures(scan: Scan) -> Finding | None:
    """Rows about one picture are computed together."""
    units = scan.units()
    n_rows = sum(map(len, units))
    content = scan.pictures.content
    copies = len(content) - len(set(content.values()))
    if n_rows - len(units) <= 0.05 * n_rows and copies <= 0.01 * len(content):
        return None
    more = f"; {count(copies, 'picture')} probably lie there twice under other names" if copies else ""
    return Finding(
        check="same-pictures",
        severity="note",
        what=f"{n_rows:,} rows are about {len(units):,} different pictures, whose tokens are computed once{more}",
        seen=f"{n_rows / max(1, len(units)):.1f} rows a picture",
    )


def partial_look(scan: Scan) -> Finding | None:
    """Counts come from an even spread of rows where all would take too long."""
    pictures = scan.pictures
    if scan.complete and pictures.n_looked_at == pictures.n_names:
        return None
    return Finding(
        check="partial-look",
        severity="note",
        what=f"to be quick, {share(scan.n_looked_at, scan.n_rows)} rows and "
        f"{share(pictures.n_looked_at, pictures.n_names)} of their pictures' files were looked at, spread evenly",
        mend="the shares hold for the whole set; an id or a picture that comes twice shows less often than it is there",
    )


CHECKS: list[Callable[[Scan], Finding | None]] = [
    nothing_to_score,
    unusable_rows,
    missing_pictures,
    colliding_ids,
    empty_answers,
    repeated_rows,
    text_only,
    same_pictures,
    partial_look,
]


def reasons(told: Iterable[tuple[int, str]]) -> list[tuple[str, list[int]]]:
    """(an example, rows) of each kind of reason, the commonest first. Kinds differ in more than names and numbers."""
    kinds: dict[str, tuple[str, list[int]]] = {}
    for row, reason in told:
        kind = re.sub(r"'[^']*'|\S*[/\\.]\S+|\d+", "*", reason)
        kinds.setdefault(kind, (shortened(reason, 160), []))[1].append(row)
    return sorted(kinds.values(), key=lambda kind: -len(kind[1]))
