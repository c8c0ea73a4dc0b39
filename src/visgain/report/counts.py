"""How many rows and tokens there are, how many were skipped and why, and what a selection left of each source."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from visgain.report.figures import OTHER_SOURCES
from visgain.report.source import Kept, Rows

REASONS_SHOWN = 8
SOURCES_SHOWN = 30


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The counts at the head of the page."""

    n_rows: int
    n_scored: int
    n_text: int
    n_skipped: int
    n_tokens: int
    n_scored_tokens: int
    n_truncated: int
    n_sources: int
    sample_gain: float | None  # mean over samples of the mean over tokens
    token_gain: float | None  # mean over tokens
    positive: float | None  # share of scored samples that gain
    reasons: tuple[tuple[str, int, int], ...]  # reason, rows, the first such row
    n_more_reasons: int
    kept_rows: int | None
    kept_tokens: int | None


def summary(rows: Rows, kept: Kept | None) -> Summary:
    scored = rows.scored
    gain, tokens = rows.gain[scored], rows.n_tokens[scored]
    reasons = _reasons(rows)
    return Summary(
        n_rows=len(rows.row),
        n_scored=int(scored.sum()),
        n_text=int(rows.text_only.sum()),
        n_skipped=int(rows.skipped.sum()),
        n_tokens=int(rows.n_tokens.sum()),
        n_scored_tokens=int(tokens.sum()),
        n_truncated=int(rows.truncated.sum()),
        n_sources=len(set(rows.source.tolist())),
        sample_gain=float(gain.mean()) if len(gain) else None,
        token_gain=float((gain * tokens).sum() / tokens.sum()) if len(gain) else None,
        positive=float((gain > 0).mean()) if len(gain) else None,
        reasons=tuple(reasons[:REASONS_SHOWN]),
        n_more_reasons=max(0, len(reasons) - REASONS_SHOWN),
        kept_rows=int(kept.rows.sum()) if kept else None,
        kept_tokens=int(kept.active.sum()) if kept else None,
    )


def _reasons(rows: Rows) -> list[tuple[str, int, int]]:
    """Skip reasons, frequent ones first; reasons that differ only in a path or a number count as one."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for row, reason in zip(rows.row[rows.skipped].tolist(), rows.reason[rows.skipped].tolist(), strict=True):
        kind = re.sub(r"\d+", "#", re.sub(r"\S*[/\\]\S*|\S+\.\w{2,5}\b", "…", reason))
        counts[kind] += 1
        first.setdefault(kind, row)
    shown = {kind: rows.reason[np.searchsorted(rows.row, row)] for kind, row in first.items()}
    return [
        (shown[kind] if n == 1 else kind, n, first[kind])
        for kind, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


@dataclass(frozen=True, kw_only=True)
class KeptSource:
    """What a selection left of one source. Rows and tokens `before` are those that could be trained on."""

    label: str
    rows_before: int
    rows_after: int
    tokens_before: int
    tokens_after: int
    text_only: bool = False
    total: bool = False


def kept_by_source(rows: Rows, kept: Kept) -> Iterator[KeptSource]:
    """The total, then the sources by tokens before; those beyond SOURCES_SHOWN together."""
    usable = ~rows.skipped
    yield _kept_of("total", rows, kept, usable, total=True)
    names, codes = np.unique(rows.source.astype(str), return_inverse=True)
    groups = [
        _kept_of(str(name), rows, kept, usable & (codes == code) & part, text_only=is_text)
        for code, name in enumerate(names)
        for part, is_text in ((rows.scored, False), (rows.text_only, True))
    ]
    groups = sorted((group for group in groups if group.rows_before), key=lambda g: (-g.tokens_before, g.label))
    if len(groups) > 1:
        yield from groups[:SOURCES_SHOWN]
    if len(groups) > SOURCES_SHOWN:
        yield _merged(groups[SOURCES_SHOWN:])


def _kept_of(
    label: str, rows: Rows, kept: Kept, here: Bool[np.ndarray, " R"], *, text_only: bool = False, total: bool = False
) -> KeptSource:
    return KeptSource(
        label=label,
        rows_before=int(here.sum()),
        rows_after=int((kept.rows & here).sum()),
        tokens_before=int(rows.n_tokens[here].sum()),
        tokens_after=int(kept.active[here].sum()),
        text_only=text_only,
        total=total,
    )


def _merged(groups: Sequence[KeptSource]) -> KeptSource:
    return KeptSource(
        label=f"{len(groups)} {OTHER_SOURCES}",
        rows_before=sum(group.rows_before for group in groups),
        rows_after=sum(group.rows_after for group in groups),
        tokens_before=sum(group.tokens_before for group in groups),
        tokens_after=sum(group.tokens_after for group in groups),
    )
