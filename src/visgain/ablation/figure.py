"""The figure of a study: a panel for each metric, its mean over seeds against active tokens, with intervals.

A number beside a point is the share that its arm keeps; a kind with one arm has none.
Drawn by hand as SVG, in one column so that it is readable on a phone. Equal input draws equal bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from xml.sax.saxutils import escape

from visgain.ablation.metrics import Metric, written
from visgain.ablation.result import Ablation
from visgain.ablation.statistics import Interval
from visgain.report.figures import nice_step

WIDTH, HEIGHT = 440, 270  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 48, 44  # margins of its plot
BESIDE = 2.5  # between kinds, so that arms with equally many tokens do not hide each other
KEY_ROW, KEY_COLUMNS = 22, 5
MOST_WIDTH = 620  # on a large screen

COLOURS = {
    "vig": "#c2571a",
    "random": "#3b6ea5",
    "sample": "#4d8b31",
    "token": "#8a5a9e",
    "vanilla": "#222222",
    "aligned": "#777777",
    "soft": "#b3262e",
    "pvi": "#0f8b8d",
    "cal": "#b8860b",
    "refresh": "#d6689a",
}
OTHER_COLOURS = ("#4fb0d8", "#a0a32f", "#7a4b2a", "#5b5bd6")
"""For kinds that are not in COLOURS."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """An arm in a panel."""

    kind: str
    name: str
    tokens: float  # active ones
    value: Interval


@dataclass(frozen=True, kw_only=True)
class Panel:
    metric: Metric
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Numbers to places on a line."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, count: int) -> list[float]:
        step = nice_step(self.high - self.low, count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def panels(ablation: Ablation) -> list[Panel]:
    """A panel for each metric that is shown: its mean and interval against active tokens."""
    return [
        Panel(
            metric=metric,
            points=tuple(
                Point(
                    kind=arm.kind, name=arm.name, tokens=arm.counts["active_tokens"], value=arm.metrics[metric["key"]]
                )
                for arm in ablation.arms
                if metric["key"] in arm.metrics
            ),
        )
        for metric in ablation.metrics
    ]


def draw(panels: Sequence[Panel]) -> str:
    """The whole figure; panels without points are left out."""
    panels = [panel for panel in panels if panel.points]
    kinds = list(dict.fromkeys(point.kind for panel in panels for point in panel.points))
    colours = _colours(kinds)
    key_height = KEY_ROW * math.ceil(len(kinds) / KEY_COLUMNS) + 10
    height = key_height + HEIGHT * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="xMinYMin" '
        f'width="100%" style="max-width:{MOST_WIDTH}px" font-family="system-ui, sans-serif" font-size="13" role="img">',
        "<title>Metrics against active tokens, by arm</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        *_key(colours),
    ]
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate(0 {key_height + HEIGHT * number})">')
        parts += [*_panel(panel, colours), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    known = {kind: colour for kind, colour in COLOURS.items() if kind in kinds}
    others = zip((kind for kind in kinds if kind not in COLOURS), itertools.cycle(OTHER_COLOURS))
    return known | dict(others)


def _key(colours: dict[str, str]) -> Iterator[str]:
    """Which colour is which kind."""
    width = (WIDTH - 24) / KEY_COLUMNS
    for number, (kind, colour) in enumerate(colours.items()):
        x = round(16 + width * (number % KEY_COLUMNS), 1)
        y = 18 + KEY_ROW * (number // KEY_COLUMNS)
        yield f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{colour}"/>'
        yield f'<text x="{x + 10}" y="{y}">{escape(kind)}</text>'


def _panel(panel: Panel, colours: dict[str, str]) -> Iterator[str]:
    """Title, axes, then each kind: a line from share to share, whiskers, and points with their share beside them."""
    x, y = _scales(panel)
    better = {"higher": "higher is better", "lower": "lower is better"}.get(panel.metric["better"], "")
    unit = " (%)" if panel.metric["format"] == "percent" else ""
    yield f'<text x="12" y="24" font-size="15" font-weight="600">{escape(panel.metric["label"] + unit)}'
    yield f'<tspan dx="5" font-size="13" font-weight="400" fill="#555">{better}</tspan></text>'
    yield from _axes(panel.metric, x, y)
    labels: list[str] = []  # above everything else
    for number, kind in enumerate(colours):
        points = sorted((point for point in panel.points if point.kind == kind), key=lambda point: point.tokens)
        shift = BESIDE * (number - (len(colours) - 1) / 2)
        beside = replace(x, start=x.start + shift, stop=x.stop + shift)
        yield from _series(points, colours[kind], beside, y)
        if len(points) > 1:
            labels += [_share(point, colours[kind], beside, y) for point in points]
    yield from labels


def _scales(panel: Panel) -> tuple[Scale, Scale]:
    values = [point.value for point in panel.points]
    ends = [end for value in values for end in (value.mean, value.low, value.high) if end is not None]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 0.01
    low, high = low - margin, high + margin
    if panel.metric["format"] == "percent":  # an interval can reach beyond what a share can be
        low, high = max(low, 0.0), min(high, 1.0)
    most = max(point.tokens for point in panel.points) or 1.0
    return (
        Scale(low=-0.04 * most, high=1.04 * most, start=LEFT, stop=WIDTH - RIGHT),
        Scale(low=low, high=high, start=HEIGHT - BOTTOM, stop=TOP),
    )


def _axes(metric: Metric, x: Scale, y: Scale) -> Iterator[str]:
    for value in y.ticks(6):
        yield f'<path d="M{LEFT} {y(value)}H{WIDTH - RIGHT}" stroke="#e3e3e3"/>'
        label = f'x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#555"'
        yield f"<text {label}>{written(metric, value)}</text>"
    for value in x.ticks(5):
        yield f'<path d="M{x(value)} {HEIGHT - BOTTOM}v5" stroke="#999"/>'
        yield (
            f'<text x="{x(value)}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle" fill="#555">{_count(value)}</text>'
        )
    yield f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="#999"/>'
    yield (f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end" fill="#555">active tokens in training</text>')


def _series(points: Sequence[Point], colour: str, x: Scale, y: Scale) -> Iterator[str]:
    if len(points) > 1:
        line = "L".join(f"{x(point.tokens)} {y(point.value.mean)}" for point in points)
        yield f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-opacity="0.6"/>'
    for point in points:
        at, middle = x(point.tokens), y(point.value.mean)
        if point.value.low is not None and point.value.high is not None:
            whisker = f"M{at} {y(max(point.value.low, y.low))}V{y(min(point.value.high, y.high))}"
            yield f'<path d="{whisker}" stroke="{colour}" stroke-width="1.5" stroke-opacity="0.45"/>'
        circle = f'cx="{at}" cy="{middle}" r="4.5" fill="{colour}" stroke="#fff"'
        yield f"<circle {circle}><title>{escape(point.name)}</title></circle>"


def _share(point: Point, colour: str, x: Scale, y: Scale) -> str:
    """What an arm keeps, beside its point."""
    at = f'x="{x(point.tokens) + 6:.1f}" y="{y(point.value.mean) - 5:.1f}"'
    halo = 'stroke="#fff" stroke-width="3" paint-order="stroke"'
    return f'<text {at} font-size="10" fill="{colour}" {halo}>{escape(point.name.partition("@")[2])}</text>'


def _count(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}K" if value >= 1e3 else f"{value:g}"
