"""Means over seeds with their confidence intervals, and differences between arms, paired by seed.

The interval is Student's: mean +- t(0.975, n - 1) * s / sqrt(n), with s the standard deviation over n seeds that
divides by n - 1 (Student 1908, The probable error of a mean, Biometrika 6). A paired difference is the same of the
differences at each seed, so what a seed makes easy or hard for all arms cancels. One seed has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over `n` seeds and its confidence interval, without one where n is 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of at least one value, with Student's interval if there are several."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean=mean, low=None, high=None, n=1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """Mean of `values` minus `reference` over the seeds that both have; None without any."""
    differences = [value - reference[seed] for seed, value in values.items() if seed in reference]
    return interval(differences) if differences else None


@cache
def t_quantile(p: float, dof: int) -> float:
    """What Student's t with `dof` degrees of freedom (a whole number) stays below with probability `p` of 0.5 to 1."""
    low, high = 0.0, math.pi / 2  # of theta = arctan(t / sqrt(dof)), of which the probability is a finite sum
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + _within(middle, dof) / 2 < p else (low, middle)
    return math.sqrt(dof) * math.tan(low)


def _within(theta: float, dof: int) -> float:
    """Probability that |t| is at most sqrt(dof) * tan(theta): Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    cosine = math.cos(theta)
    term = cosine if dof % 2 else 1.0
    total = 0.0
    for k in range(dof % 2, dof - 1, 2):  # powers of the cosine: 1, 3 ... dof - 2, or 0, 2 ... dof - 2
        total += term
        term *= (k + 1) / (k + 2) * cosine * cosine
    if dof % 2:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total
