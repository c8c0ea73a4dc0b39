"""What other verbs left on disk, for the report: tables with bars, metrics with intervals, a study of arms."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visgain.errors import DataError
from visgain.storage import read_json
from visgain.tables import Line, Table

MOST_LINES = 40
HEADLINES = 8
"""Metrics of a benchmark that are shown: the first ones, which its protocol puts first."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A line of a table, with positions in percent of the plot."""

    line: Line
    left: float
    width: float
    low: float | None
    high: float | None

    @property
    def is_negative(self) -> bool:
        return self.line.mean < 0


@dataclass(frozen=True, kw_only=True)
class Bars:
    table: Table
    zero: float  # percent
    bars: tuple[Bar, ...]
    n_hidden: int  # lines that are not shown


@dataclass(frozen=True, kw_only=True)
class Metric:
    name: str
    value: str
    interval: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One benchmark's metrics.json."""

    benchmark: str
    variant: str
    about: str  # questions, judge, what could not be read
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of texts, the first column being names."""

    title: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What `visgain ablate` found."""

    tables: tuple[Grid, ...]
    notes: tuple[str, ...]
    figure: str  # as a data URL


def read_ablation(folder: Path) -> Study:
    """The tables and the figure that `visgain ablate` wrote to `folder`. Raises DataError if they are not there."""
    path = folder / "ablation.json"
    found = read_json(path, "ablation")
    try:
        figure = base64.b64encode((folder / "figure.svg").read_bytes()).decode()
        return Study(
            tables=tuple(map(_grid, found["tables"])),
            notes=tuple(map(str, found["notes"])),
            figure=f"data:image/svg+xml;base64,{figure}",
        )
    except (KeyError, TypeError, OSError) as error:
        raise DataError(f"{path} is no result of `visgain ablate`: {error}") from None


def _grid(one: Mapping[str, Any]) -> Grid:
    lines = tuple(tuple(map(str, line)) for line in one["lines"])
    return Grid(title=str(one["title"]), heads=tuple(map(str, one["heads"])), lines=lines)


def read_analyses(folder: Path) -> list[Bars]:
    """The tables that `visgain analyze` wrote to `folder`, by name. Raises DataError if there is none."""
    paths = sorted(path for path in folder.glob("*.json") if path.with_suffix(".svg").exists())
    if not paths:
        raise DataError(f"{folder} holds no tables; it must be a folder that `visgain analyze` wrote")
    return [_bars(_table(path)) for path in paths]


def read_evaluations(folder: Path) -> list[Evaluation]:
    """The results that `visgain eval` wrote to `folder`, by benchmark. Raises DataError if there is none."""
    paths = sorted(folder.glob("*/metrics.json"))
    if not paths:
        raise DataError(f"{folder} holds no results; it must be a folder that `visgain eval` wrote")
    return [_evaluation(path) for path in paths]


def _table(path: Path) -> Table:
    fields = read_json(path, "analysis")
    try:
        lines = [Line(**{name: one[name] for name in Line.__dataclass_fields__}) for one in fields["lines"]]
        name, title, unit, of = (str(fields[name]) for name in ("name", "title", "unit", "of"))
        return Table(name=name, title=title, unit=unit, of=of, lines=[_numeric(line) for line in lines])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no table of `visgain analyze`: {error}") from None


def _numeric(line: Line) -> Line:
    """The line with its numbers checked. Raises TypeError or ValueError."""
    low, high = (None if value is None else float(value) for value in (line.low, line.high))
    return Line(label=str(line.label), mean=float(line.mean), low=low, high=high, n=int(line.n), rows=int(line.rows))


def _bars(table: Table) -> Bars:
    shown = table.lines[:MOST_LINES]
    ends = [end for line in shown for end in (0.0, line.mean, line.low, line.high) if end is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    span = (high - low) or 1.0

    def at(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - low) / span, 2)

    zero = round(-100 * low / span, 2)
    bars = [
        Bar(
            line=line,
            left=round(100 * (min(line.mean, 0.0) - low) / span, 2),
            width=round(100 * abs(line.mean) / span, 2),
            low=at(line.low),
            high=at(line.high),
        )
        for line in shown
    ]
    return Bars(table=table, zero=zero, bars=tuple(bars), n_hidden=len(table.lines) - len(shown))


def _evaluation(path: Path) -> Evaluation:
    found = read_json(path, "results of a benchmark")
    try:
        metrics = tuple(_metric(name, one) for name, one in list(found["metrics"].items())[:HEADLINES])
        about = [f"{int(found['questions']):,} questions"]
        about += ["the first ones only"] if found.get("limited") else []
        about += [f"{what} {said}" for what, said in (found.get("notes") or {}).items()]
        about += [f"{int(found['unparsed']):,} replies not understood"] if found.get("unparsed") else []
        about += [f"judge {found['judge']['judge']}"] if found.get("judge") else []
        return Evaluation(
            benchmark=str(found["benchmark"]), variant=str(found["variant"]), about="; ".join(about), metrics=metrics
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no result of `visgain eval`: {json.dumps(str(error))}") from None


def _metric(name: str, one: Mapping[str, Any]) -> Metric:
    value, low, high = (None if one[key] is None else float(one[key]) for key in ("value", "low", "high"))
    interval = "" if low is None or high is None else f"{low:.2f} to {high:.2f}"
    return Metric(name=name, value="undefined" if value is None else f"{value:.2f}", interval=interval)
