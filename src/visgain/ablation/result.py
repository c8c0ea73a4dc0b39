"""What a study found: every cell, each arm's means over seeds, and its differences from vanilla."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visgain.ablation.arms import VANILLA
from visgain.ablation.metrics import Metric, numbers
from visgain.ablation.statistics import Interval, interval, paired

COUNTS = ("rows", "active_tokens", "steps", "train_seconds")
"""What is counted of an arm's training."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm over the seeds at which it is done."""

    name: str
    kind: str
    n: int  # seeds
    counts: Mapping[str, float]  # COUNTS, means over seeds
    metrics: Mapping[str, Interval]
    versus: Mapping[str, Interval]  # minus vanilla's at the same seed; empty without vanilla, and for vanilla itself


@dataclass(frozen=True, kw_only=True)
class Ablation:
    study: Mapping[str, Any]  # what all cells depend on
    seeds: tuple[int, ...]
    metrics: tuple[Metric, ...]  # those that are shown
    arms: tuple[ArmResult, ...]  # those with a cell that is done
    cells: tuple[Mapping[str, Any], ...]
    n_cells: int  # of the grid
    failures: Mapping[str, str]  # name of a cell -> why it failed


def summarise(
    cells: Sequence[Mapping[str, Any]],
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    metrics: Sequence[Metric],
    study: Mapping[str, Any],
    failures: Mapping[str, str],
) -> Ablation:
    """The result of the finished `cells` of a grid of `arms` and `seeds`."""
    by_arm = {name: [cell for cell in cells if cell["name"] == name] for name in arms}
    vanilla = _by_seed(by_arm.get(VANILLA, []))
    return Ablation(
        study=study,
        seeds=tuple(seeds),
        metrics=(*metrics, *_benchmark_metrics(str(study.get("benchmarks", "")), cells)),
        arms=tuple(_arm(name, own, vanilla if name != VANILLA else {}) for name, own in by_arm.items() if own),
        cells=tuple(cells),
        n_cells=len(arms) * len(seeds),
        failures=dict(failures),
    )


def _by_seed(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric -> seed -> value."""
    values: dict[str, dict[int, float]] = {}
    for cell in cells:
        for key, value in numbers(cell["metrics"]).items():
            values.setdefault(key, {})[cell["seed"]] = value
    return values


def _arm(name: str, cells: Sequence[Mapping[str, Any]], vanilla: Mapping[str, Mapping[int, float]]) -> ArmResult:
    values = _by_seed(cells)
    differences = {key: paired(some, vanilla[key]) for key, some in values.items() if key in vanilla}
    return ArmResult(
        name=name,
        kind=cells[0]["arm"]["kind"],
        n=len(cells),
        counts={count: sum(cell[count] for cell in cells) / len(cells) for count in COUNTS},
        metrics={key: interval(list(some.values())) for key, some in values.items()},
        versus={key: difference for key, difference in differences.items() if difference is not None},
    )


def _benchmark_metrics(benchmarks: str, cells: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """The first metric of each benchmark, which its protocol puts first."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell["metrics"]))
    names = [name for part in benchmarks.split(",") if (name := part.strip())]
    first = [next((key for key in keys if key.startswith(f"{name}.")), None) for name in names]
    return [{"key": key, "label": key.replace(".", " "), "better": "", "format": ".2f"} for key in first if key]
