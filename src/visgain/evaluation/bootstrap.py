"""Confidence intervals: items are drawn again with replacement, whole clusters at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from visgain.evaluation.benchmark import Metric

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric with its percentile interval; None where it is undefined (no item, or no resample with a value)."""

    value: float | None
    low: float | None
    high: float | None


def estimates(metrics: Mapping[str, Metric], clusters: Sequence[str], *, seed: int = 0) -> dict[str, Estimate]:
    """Each metric at weights 1, and between its 2.5th and 97.5th percentile over resampled clusters.

    clusters: the cluster of each item. Questions about one image are not independent, so they are drawn together.
    """
    names, where = np.unique(np.asarray(clusters, dtype=object), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(RESAMPLES if len(names) else 0):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        weights = times.astype(np.float64)[where]
        for name, metric in metrics.items():
            drawn[name].append(metric(weights))
    ones = np.ones(len(clusters))
    return {
        name: _estimate(metric(ones) if len(ones) else float("nan"), drawn[name]) for name, metric in metrics.items()
    }


def _estimate(value: float, drawn: Sequence[float]) -> Estimate:
    known = np.asarray([one for one in drawn if np.isfinite(one)])
    if not np.isfinite(value) or not len(known):
        return Estimate(value=float(value) if np.isfinite(value) else None, low=None, high=None)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=float(value), low=float(low), high=float(high))
