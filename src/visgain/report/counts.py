"""How many rows and tokens there are, how many were skipped and why, and what a selection left of each source."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool

from visgain.quantile import exact_sum
from visgain.report.figures import OTHER_SOURCES
from visgain.report.overview import Overview, Rows

REASONS_SHOWN = 8
SOURCES_SHOWN = 30


# ---------------------------------------------------------------- counting


@dataclass(frozen=True, kw_only=True)
class Count:
    """Rows and tokens, and what a selection left of them."""

    rows_before: int = 0
    rows_after: int = 0
    tokens_before: int = 0
    tokens_after: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            rows_before=self.rows_before + other.rows_before,
            rows_after=self.rows_after + other.rows_after,
            tokens_before=self.tokens_before + other.tokens_before,
            tokens_after=self.tokens_after + other.tokens_after,
        )


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Skip reasons that differ only in a path or a number."""

    n_rows: int
    row: int  # the first one
    text: str  # of the first row


@dataclass(kw_only=True)
class Counts:
    """What a run holds, by source and by kind of row."""

    scored: defaultdict[int, Count] = field(default_factory=lambda: defaultdict(Count))
    text_only: defaultdict[int, Count] = field(default_factory=lambda: defaultdict(Count))
    skipped: defaultdict[int, Count] = field(default_factory=lambda: defaultdict(Count))
    n_truncated: int = 0
    n_positive: int = 0  # scored rows with a gain above 0
    reasons: dict[str, Reason] = field(default_factory=dict)

    def add(self, rows: Rows) -> None:
        """Count some rows; those of lower rows must have been counted before."""
        for counts, here in (
            (self.scored, rows.scored),
            (self.text_only, rows.text_only),
            (self.skipped, rows.skipped),
        ):
            for source, count in _by_source(rows, here):
                counts[source] += count
        self.n_truncated += int(rows.truncated.sum())
        self.n_positive += int((rows.gain > 0).sum())
        for row, reason in zip(rows.row[rows.skipped].tolist(), rows.reason[rows.skipped].tolist(), strict=True):
            kind = re.sub(r"\d+", "#", re.sub(r"\S*[/\\]\S*|\S+\.\w{2,5}\b", "…", reason))
            known = self.reasons.setdefault(kind, Reason(n_rows=0, row=row, text=reason))
            self.reasons[kind] = replace(known, n_rows=known.n_rows + 1)


def count_rows(overview: Overview) -> Counts:
    counts = Counts()
    for rows in overview.windows():
        counts.add(rows)
    return counts


def _by_source(rows: Rows, here: Bool[np.ndarray, " R"]) -> Iterator[tuple[int, Count]]:
    """Each source that has rows among those `here`, with their count."""
    columns = (here, rows.active > 0, rows.n_tokens, rows.active)
    sums = np.stack([np.bincount(rows.source[here], weights=column[here]) for column in columns], axis=1).astype(int)
    for source in np.flatnonzero(sums[:, 0]).tolist():
        before, after, tokens, active = sums[source].tolist()
        yield source, Count(rows_before=before, rows_after=after, tokens_before=tokens, tokens_after=active)


# ---------------------------------------------------------------- the head of the page


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


def summary(counts: Counts, overview: Overview) -> Summary:
    scored, text, skipped = (_total(kind) for kind in (counts.scored, counts.text_only, counts.skipped))
    everything = scored + text + skipped
    n, n_tokens = scored.rows_before, scored.tokens_before
    reasons = _reasons(counts)
    selected = overview.record is not None
    return Summary(
        n_rows=everything.rows_before,
        n_scored=n,
        n_text=text.rows_before,
        n_skipped=skipped.rows_before,
        n_tokens=everything.tokens_before,
        n_scored_tokens=n_tokens,
        n_truncated=counts.n_truncated,
        n_sources=len(overview.sources),
        sample_gain=exact_sum(overview.gains.column("gain")) / n if n else None,
        token_gain=exact_sum(_summed_gains(overview)) / n_tokens if n else None,
        positive=counts.n_positive / n if n else None,
        reasons=tuple(reasons[:REASONS_SHOWN]),
        n_more_reasons=max(0, len(reasons) - REASONS_SHOWN),
        kept_rows=everything.rows_after if selected else None,
        kept_tokens=everything.tokens_after if selected else None,
    )


def _total(counts: defaultdict[int, Count]) -> Count:
    return sum(counts.values(), start=Count())


def _summed_gains(overview: Overview) -> Iterator[np.ndarray]:
    """Sum of the token gains of each sample: its gain is their mean."""
    columns = (overview.gains.column(name) for name in ("gain", "n_tokens"))
    return (gain * n_tokens for gain, n_tokens in zip(*columns, strict=True))


def _reasons(counts: Counts) -> list[tuple[str, int, int]]:
    """Skip reasons, frequent ones first; a reason that occurs once is shown as it is."""
    return [
        (reason.text if reason.n_rows == 1 else kind, reason.n_rows, reason.row)
        for kind, reason in sorted(counts.reasons.items(), key=lambda item: (-item[1].n_rows, item[0]))
    ]


# ---------------------------------------------------------------- what was kept


@dataclass(frozen=True, kw_only=True)
class KeptSource(Count):
    """What a selection left of one source. Rows and tokens `before` are those that could be trained on."""

    label: str
    text_only: bool = False
    total: bool = False


def kept_by_source(counts: Counts, sources: Sequence[str]) -> Iterator[KeptSource]:
    """The total, then the sources by tokens before; those beyond SOURCES_SHOWN together."""
    total = _total(counts.scored) + _total(counts.text_only)
    yield KeptSource(**vars(total), label="total", total=True)
    groups = [
        KeptSource(**vars(kind[source]), label=sources[source], text_only=kind is counts.text_only)
        for source in sorted(range(len(sources)), key=sources.__getitem__)
        for kind in (counts.scored, counts.text_only)
        if source in kind
    ]
    groups = sorted(groups, key=lambda g: (-g.tokens_before, g.label))
    if len(groups) > 1:
        yield from groups[:SOURCES_SHOWN]
    if rest := groups[SOURCES_SHOWN:]:
        yield KeptSource(**vars(sum(rest, start=Count())), label=f"{len(rest)} {OTHER_SOURCES}")
