"""Means by label with confidence intervals, as a table on disk and a figure.

A row of a dataset is one cluster: its tokens are not independent. The interval is that of a ratio of sums over clusters
(Cochran 1977, Sampling Techniques, 2.11 and 9A), from five sums a label, so memory does not grow with the rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from visgain.storage import write_json, write_text

Z = 1.959964  # of a 95% interval


@dataclass(frozen=True, kw_only=True)
class Line:
    """One label of a table."""

    label: str
    mean: float
    low: float | None  # 95% interval; None where fewer than two rows have the label
    high: float | None
    n: int  # of what is averaged: samples, words or tokens
    rows: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """A result: what was measured, in which unit, by label."""

    name: str  # of the files
    title: str
    unit: str
    of: str  # what `n` counts
    lines: Sequence[Line]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Sums:
    """Of s (the sum of values) and n (their number) in each row that has the label."""

    rows: int = 0
    s: float = 0.0
    n: int = 0
    ss: float = 0.0
    sn: float = 0.0
    nn: float = 0.0

    def add(self, s: float, n: int) -> None:
        self.rows += 1
        self.s += s
        self.n += n
        self.ss += s * s
        self.sn += s * n
        self.nn += n * n

    def line(self, label: str) -> Line:
        mean = self.s / self.n
        low = high = None
        if self.rows > 1:
            square = max(0.0, self.ss - 2 * mean * self.sn + mean * mean * self.nn)
            half = Z * math.sqrt(square * self.rows / (self.rows - 1)) / self.n
            low, high = mean - half, mean + half
        return Line(label=label, mean=mean, low=low, high=high, n=self.n, rows=self.rows)


class Means:
    """Sums by label, row after row."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, Sums] = defaultdict(Sums)

    def add_row(self, values: Iterable[tuple[str, float]]) -> None:
        """The labelled values of one row of the dataset."""
        here: defaultdict[str, list[float]] = defaultdict(list)
        for label, value in values:
            here[label].append(value)
        for label, some in here.items():
            self._sums[label].add(math.fsum(some), len(some))

    def lines(self, order: Sequence[str] | None = None) -> list[Line]:
        """By falling mean, or in the order that is given."""
        lines = [sums.line(label) for label, sums in self._sums.items()]
        if order is None:
            return sorted(lines, key=lambda line: (-line.mean, line.label))
        place = {label: i for i, label in enumerate(order)}
        return sorted(lines, key=lambda line: place[line.label])


def write_table(folder: Path, table: Table) -> list[Path]:
    """NAME.json and NAME.svg in `folder`."""
    paths = [folder / f"{table.name}.json", folder / f"{table.name}.svg"]
    write_json(paths[0], asdict(table))
    write_text(paths[1], bars(table))
    return paths


def as_text(table: Table, most: int = 30) -> str:
    """For the terminal: the title, then a line for each label."""
    shown = table.lines[:most]
    width = max((len(line.label) for line in shown), default=0)
    text = [f"{table.title} ({table.unit})"]
    for line in shown:
        interval = "" if line.low is None else f"[{line.low:+.3f}, {line.high:+.3f}]"
        text.append(f"  {line.label:<{width}}  {line.mean:+.3f}  {interval:<18}  {line.n:,} {table.of}")
    if len(table.lines) > most:
        text.append(f"  ... and {len(table.lines) - most} more")
    return "\n".join(text)


# ---------------------------------------------------------------- the figure

_LEFT, _RIGHT, _WIDTH, _ROW, _TOP = 190, 90, 760, 24, 46


def bars(table: Table) -> str:
    """A drawing (SVG) of the means as bars from 0, with their intervals."""
    ends = [value for line in table.lines for value in (0.0, line.mean, line.low, line.high) if value is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return round(_LEFT + (value - low) / span * (_WIDTH - _LEFT - _RIGHT), 1)

    height = _TOP + _ROW * len(table.lines) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">',
        f"<title>{escape(table.title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="12" y="24" font-size="15" font-weight="600">{escape(table.title)} ({escape(table.unit)})</text>',
        f'<line x1="{x(0)}" x2="{x(0)}" y1="{_TOP - 6}" y2="{height - 8}" stroke="#999"/>',
    ]
    for number, line in enumerate(table.lines):
        y = _TOP + _ROW * number
        left, right = sorted((x(0), x(line.mean)))
        label = line.label if len(line.label) <= 26 else f"{line.label[:25]}…"
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
        colour = "#c2571a" if line.mean >= 0 else "#3b6ea5"
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{right - left:.1f}" height="14" fill="{colour}"/>')
        if line.low is not None and line.high is not None:
            parts.append(f'<path d="M{x(line.low)} {y + 10}H{x(line.high)}" stroke="#222" stroke-width="1.5"/>')
        parts.append(f'<text x="{_WIDTH - 12}" y="{y + 14}" text-anchor="end">{line.mean:+.3f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
