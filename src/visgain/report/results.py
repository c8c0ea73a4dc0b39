"""The table of a demo run: one line for each arm of the experiment, one column for each metric."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visgain.errors import DataError
from visgain.storage import read_json

_FORMAT = re.compile(r"[+]?,?(\.\d{1,2})?[fged%]")  # what a metric may ask of Python's format()


@dataclass(frozen=True, kw_only=True)
class Column:
    key: str
    label: str
    better: str  # higher, lower or "" where neither is


@dataclass(frozen=True, kw_only=True)
class Cell:
    text: str
    best: bool


@dataclass(frozen=True, kw_only=True)
class Arm:
    name: str
    cells: tuple[Cell, ...]  # one for each column
    active_tokens: int | None
    active_share: float | None  # of the arm with most
    rows: int | None
    steps: int | None
    train_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Results:
    columns: tuple[Column, ...]
    arms: tuple[Arm, ...]
    auroc: float | None
    seed: int | None
    seconds: tuple[tuple[str, float], ...]

    @property
    def has_start(self) -> bool:
        """Whether an arm was not trained: what the others started from."""
        return any(arm.active_tokens == 0 for arm in self.arms)

    def has(self, name: str) -> bool:
        """Whether any arm knows the value called `name`."""
        return any(getattr(arm, name) is not None for arm in self.arms)


def read_results(path: Path) -> Results:
    """The table in `path`. Missing optional keys stay empty. Raises DataError if it is no such table."""
    record = read_json(path, "results")
    try:
        arms, metrics = record["arms"], _metrics(record)
        columns = tuple(Column(key=m["key"], label=m["label"], better=m.get("better", "")) for m in metrics)
        cells = [_column_cells([arm.get("metrics", {}).get(m["key"]) for arm in arms], m) for m in metrics]
        most = max((_number(arm.get("active_tokens")) or 0 for arm in arms), default=0)
        return Results(
            columns=columns,
            arms=tuple(_arm(arm, [column[index] for column in cells], most) for index, arm in enumerate(arms)),
            auroc=_number(record.get("auroc")),
            seed=record.get("seed"),
            seconds=_seconds(record.get("seconds")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not the result of a demo run: {error!r}; check --results") from error


def _metrics(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The columns as the file describes them, else every metric that an arm has, without saying which way is better."""
    keys = dict.fromkeys(key for arm in record["arms"] for key in arm.get("metrics", {}))
    given: Sequence[Mapping[str, Any]] = record.get("metrics") or [{"key": key, "label": key} for key in keys]
    return [{"label": metric["key"], **metric} for metric in given]


def _column_cells(values: Sequence[Any], metric: Mapping[str, Any]) -> list[Cell]:
    """One metric of every arm. The best value is marked wherever it stands; equal best ones all are."""
    texts = [format_metric(_number(value), str(metric.get("format", ""))) for value in values]
    known = [number for number in map(_number, values) if number is not None]
    pick = {"higher": max, "lower": min}.get(str(metric.get("better", "")))
    best = pick(known) if pick and len(known) > 1 else None
    best_texts = {text for text, value in zip(texts, values, strict=True) if best is not None and value == best}
    return [Cell(text=text, best=text in best_texts) for text in texts]  # equal to the eye is equal


def _arm(arm: Mapping[str, Any], cells: Sequence[Cell], most: float) -> Arm:
    active = _number(arm.get("active_tokens"))
    return Arm(
        name=str(arm["name"]),
        cells=tuple(cells),
        active_tokens=None if active is None else int(active),
        active_share=None if active is None or not most else active / most,
        rows=arm.get("rows"),
        steps=arm.get("steps"),
        train_seconds=_number(arm.get("train_seconds")),
    )


def _seconds(value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping):
        return ()
    return tuple((str(name), float(s)) for name, s in value.items() if _number(s) is not None)


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def format_metric(value: float | None, spec: str) -> str:
    """`value` under a Python format such as .3f or .1%, or `percent`; a dash where there is none."""
    if value is None:
        return "–"
    spec = spec.removeprefix("{:").removesuffix("}")
    if spec == "percent":
        spec = ".1%"
    if not _FORMAT.fullmatch(spec):
        spec = ".3g"
    return format(int(value) if spec.endswith("d") else value, spec).replace("-", "−")
