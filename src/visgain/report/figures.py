"""Numbers turned into drawing instructions: axes, density ridges and the ROC curve.

Everything is laid out in percent of a box that the page stretches, so that figures keep their type size on a phone.
Numbers are rounded to a fixed number of digits: the same input draws the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float

from visgain.quantile import Passes, exact_sum, median, quantiles

BINS = 240  # of a density, over the whole axis
RUG_BELOW = 25  # fewer samples than this are drawn one by one: a density would invent a shape
OTHER_SOURCES = "other sources"


@dataclass(frozen=True, kw_only=True)
class Tick:
    at: float  # percent from the left
    label: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A horizontal axis over [low, high] nats."""

    low: float
    high: float
    ticks: tuple[Tick, ...]

    def at(self, value: float) -> float:
        """Position of `value` in percent, held inside the axis."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)

    def beyond(self, values: Iterable[np.ndarray]) -> float:
        """Share of the values that lie outside."""
        outside, n = np.sum([[((v < self.low) | (v > self.high)).sum(), len(v)] for v in values], axis=0)
        return float(outside / n)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Gains that are drawn as one distribution."""

    label: str
    gains: Iterable[np.ndarray]  # in nats, in chunks that can be iterated again and again
    n: int  # how many


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """The distribution of one group of gains."""

    label: str
    n: int
    mean: float
    median: float
    share_above: float | None  # of the gains that reach tau
    below: str  # SVG paths of the two sides of tau, in a box of 1000 x 100; "" where there is nothing to fill
    above: str
    rug: tuple[Tick, ...]  # instead of a density where samples are few
    whole: bool = False  # all groups together


def nice_step(width: float, count: int) -> float:
    """The step of 1, 2 or 5 times a power of ten that cuts `width` into about `count` pieces."""
    raw = width / count
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def make_axis(values: Iterable[np.ndarray], include: Sequence[float] = (0.0,)) -> Axis:
    """An axis that shows all but the outermost half percent of `values`, and every value in `include`."""
    low, high = quantiles(values, [0.0025, 0.9975]).tolist() if any(map(len, values)) else (0.0, 1.0)
    low, high = min(low, *include), max(high, *include)
    margin = 0.03 * (high - low) or 0.5
    low, high = low - margin, high + margin
    step = nice_step(high - low, 7)
    first, last = math.ceil(low / step), math.floor(high / step)
    ticks = [
        Tick(at=round(100 * (k * step - low) / (high - low), 2), label=_tick_label(k * step, step))
        for k in range(first, last + 1)
    ]
    return Axis(low=low, high=high, ticks=tuple(ticks))


def _tick_label(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}".replace("-", "−")


def ridges(groups: Sequence[Group], axis: Axis, tau: float | None, most: int = 24) -> list[Ridge]:
    """One ridge for all gains together, then one for each group by falling median; beyond `most`, small ones merge."""
    if len(groups) > most:
        by_size = sorted(groups, key=lambda group: (-group.n, group.label))
        rest = together(f"{len(by_size) - most + 1} {OTHER_SOURCES}", by_size[most - 1 :])
        groups = [*by_size[: most - 1], rest]
    drawn = sorted((ridge(group, axis, tau) for group in groups), key=lambda r: (-r.median, r.label))
    if len(drawn) < 2:
        return drawn
    return [ridge(together("all", groups), axis, tau, whole=True), *drawn]


def together(label: str, groups: Sequence[Group]) -> Group:
    """The gains of several groups as one, in their order."""

    def gains() -> Iterator[np.ndarray]:
        return chain.from_iterable(group.gains for group in groups)

    return Group(label=label, gains=Passes(gains), n=sum(group.n for group in groups))


def ridge(group: Group, axis: Axis, tau: float | None, *, whole: bool = False) -> Ridge:
    """The distribution of at least one gain."""
    few = group.n < RUG_BELOW
    mean = exact_sum(group.gains) / group.n
    below, above = ("", "") if few else _density_paths(group, mean, axis, tau)
    few_gains = [gain for chunk in group.gains for gain in chunk.tolist()] if few else []
    return Ridge(
        label=group.label,
        n=group.n,
        mean=mean,
        median=median(group.gains),
        share_above=None if tau is None else sum(int((chunk >= tau).sum()) for chunk in group.gains) / group.n,
        below=below,
        above=above,
        rug=tuple(Tick(at=axis.at(gain), label=_tick_label(gain, 0.01)) for gain in few_gains),
        whole=whole,
    )


def _density_paths(group: Group, mean: float, axis: Axis, tau: float | None) -> tuple[str, str]:
    """SVG areas under the smoothed histogram (own peak = full height), left and right of tau."""
    edges = np.linspace(axis.low, axis.high, BINS + 1)
    counts = np.zeros(BINS, np.int64)
    for chunk in group.gains:
        counts += np.histogram(chunk, bins=BINS, range=(axis.low, axis.high))[0]
    x = (edges[1:] + edges[:-1]) / 2
    y = np.convolve(counts, _kernel(group, mean, float(edges[1] - edges[0])), mode="same")
    y = y / (y.max() or 1.0)
    if tau is None:
        return "", _area(x, y, axis)
    cut = min(axis.high, max(axis.low, tau))
    left, right = x < cut, x >= cut
    height = float(np.interp(cut, x, y))
    return (
        _area(np.append(x[left], cut), np.append(y[left], height), axis),
        _area(np.append(cut, x[right]), np.append(height, y[right]), axis),
    )


def _kernel(group: Group, mean: float, bin_width: float) -> np.ndarray:
    """Gaussian weights whose width follows Silverman's rule, between one bin and a twentieth of the axis."""
    q1, q3 = quantiles(group.gains, [0.25, 0.75])
    deviation = math.sqrt(exact_sum((chunk.astype(np.float64) - mean) ** 2 for chunk in group.gains) / group.n)
    spread = min(deviation, float(q3 - q1) / 1.34) or deviation
    width = float(np.clip(0.9 * spread * group.n**-0.2 / bin_width, 1.0, BINS / 20))
    reach = math.ceil(3 * width)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    return np.asarray(weights / weights.sum())


def _area(x: np.ndarray, y: np.ndarray, axis: Axis) -> str:
    """A closed path from the base line along the curve and back, flat stretches at the bottom left out."""
    if len(x) < 2 or not (y > 0.002).any():
        return ""
    high = np.flatnonzero(y > 0.002)
    first, last = max(0, high[0] - 1), min(len(x), high[-1] + 2)
    points = [
        f"{10 * axis.at(px):.0f} {100 - 96 * py:.1f}" for px, py in zip(x[first:last], y[first:last], strict=True)
    ]
    left, right = points[0].split()[0], points[-1].split()[0]
    return f"M{left} 100L{'L'.join(points)}L{right} 100Z"


def curve_path(x: Float[np.ndarray, " K"], y: Float[np.ndarray, " K"], points: int = 300) -> str:
    """An SVG line through a ROC curve in a box of 100 x 100, thinned evenly along its length."""
    along = x + y  # rises strictly from 0 to 2
    keep = np.unique(np.searchsorted(along, np.linspace(0, 2, points)).clip(0, len(along) - 1))
    return "M" + "L".join(f"{100 * px:.2f} {100 - 100 * py:.2f}" for px, py in zip(x[keep], y[keep], strict=True))
