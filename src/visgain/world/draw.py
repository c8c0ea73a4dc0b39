"""Paint a scene. 144 x 144 pixels, antialiased, on a soft background of random tint."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from visgain.world.scene import Scene, Thing

SIDE = 144
_SCALE = 2  # supersampling
_CELL = SIDE * _SCALE // 3
_RADIUS = {"small": 0.30, "large": 0.44}  # of a cell
_JITTER = 0.05  # of a cell

_RGB = {
    "red": (214, 48, 49),
    "green": (39, 158, 72),
    "blue": (46, 103, 210),
    "yellow": (247, 205, 46),
    "purple": (140, 68, 184),
    "white": (250, 250, 248),
    "black": (34, 34, 38),
}

Point = tuple[float, float]
Paint = tuple[int, int, int]


def draw_picture(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """RGB picture of `scene`; `rng` sets the background and a slight displacement of every object."""
    canvas = _background(rng)
    brush = ImageDraw.Draw(canvas)
    for thing in scene.things:
        shift = rng.uniform(-_JITTER, _JITTER, size=2)
        centre = ((thing.column + 0.5 + shift[0]) * _CELL, (thing.row + 0.5 + shift[1]) * _CELL)
        _draw_thing(brush, thing, centre)
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def _background(rng: np.random.Generator) -> Image.Image:
    """A vertical gradient between two greys with a little colour, apart from every object's colour."""
    ends = rng.uniform(130, 195, size=(2, 1)) + rng.uniform(-14, 14, size=(2, 3))
    ramp = np.linspace(ends[0], ends[1], SIDE * _SCALE)[:, None, :]
    return Image.fromarray(np.broadcast_to(ramp, (SIDE * _SCALE, SIDE * _SCALE, 3)).astype(np.uint8))


def _draw_thing(brush: ImageDraw.ImageDraw, thing: Thing, centre: Point) -> None:
    fill = _RGB[thing.colour]
    line: Paint = (95, 95, 100) if thing.colour in ("white", "black") else (fill[0] // 2, fill[1] // 2, fill[2] // 2)
    pen = Pen(brush, centre, _RADIUS[thing.size] * _CELL, fill, line)
    _SHAPES[thing.kind](pen)


class Pen:
    """Draws in an object's own coordinates: the unit square [-1, 1] x [-1, 1] with y downwards."""

    def __init__(self, brush: ImageDraw.ImageDraw, centre: Point, radius: float, fill: Paint, line: Paint) -> None:
        self.brush, self.centre, self.radius, self.fill, self.line = brush, centre, radius, fill, line

    def _place(self, points: list[Point]) -> list[Point]:
        return [(self.centre[0] + x * self.radius, self.centre[1] + y * self.radius) for x, y in points]

    def polygon(self, points: list[Point], *, fill: Paint | None = None) -> None:
        self.brush.polygon(self._place(points), fill=fill or self.fill, outline=self.line, width=_SCALE)

    def ellipse(self, left: float, top: float, right: float, bottom: float, *, fill: Paint | None = None) -> None:
        box = self._place([(left, top), (right, bottom)])
        self.brush.ellipse(box, fill=fill or self.fill, outline=self.line, width=_SCALE)

    def ring(self, left: float, top: float, right: float, bottom: float, width: float) -> None:
        box = self._place([(left, top), (right, bottom)])
        self.brush.ellipse(box, outline=self.fill, width=max(2, round(width * self.radius)))


def _curve(points: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], start: float, stop: float) -> list[Point]:
    x, y = points(np.linspace(start, stop, 40))
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


def _ball(pen: Pen) -> None:
    pen.ellipse(-0.9, -0.9, 0.9, 0.9)


def _banana(pen: Pen) -> None:
    outer = _curve(lambda t: (np.cos(t), np.sin(t) - 0.35), 0.0, np.pi)
    inner = _curve(lambda t: (0.95 * np.cos(t), 0.42 * np.sin(t) - 0.42), np.pi, 0.0)
    pen.polygon(outer + inner)


def _cup(pen: Pen) -> None:
    pen.ring(0.2, -0.5, 1.0, 0.4, 0.2)
    pen.polygon([(-0.85, -0.8), (0.6, -0.8), (0.42, 0.85), (-0.67, 0.85)])


def _fish(pen: Pen) -> None:
    pen.polygon([(0.25, 0.0), (1.0, -0.65), (1.0, 0.65)])
    pen.ellipse(-1.0, -0.55, 0.55, 0.55)


def _heart(pen: Pen) -> None:
    pen.polygon(
        _curve(
            lambda t: (
                np.sin(t) ** 3,
                -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16,
            ),
            0.0,
            2 * np.pi,
        )
    )


def _house(pen: Pen) -> None:
    pen.polygon([(-0.75, -0.1), (0.75, -0.1), (0.75, 0.9), (-0.75, 0.9)])
    pen.polygon([(-1.0, -0.1), (0.0, -0.95), (1.0, -0.1)])
    pen.polygon([(-0.2, 0.3), (0.2, 0.3), (0.2, 0.9), (-0.2, 0.9)], fill=pen.line)


def _leaf(pen: Pen) -> None:
    def half(t: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray]:
        bulge = side * 0.42 * np.sin(np.pi * (t + 1) / 2)
        return (t - bulge) * 0.85, (-t - bulge) * 0.85

    pen.polygon(_curve(lambda t: half(t, 1.0), -1.0, 1.0) + _curve(lambda t: half(t, -1.0), 1.0, -1.0))


def _plate(pen: Pen) -> None:
    pen.ellipse(-1.0, -0.45, 1.0, 0.45)
    pen.ellipse(-0.6, -0.24, 0.6, 0.2)


def _star(pen: Pen) -> None:
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    pen.polygon([(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)])


def _tree(pen: Pen) -> None:
    pen.polygon([(-0.16, 0.4), (0.16, 0.4), (0.16, 1.0), (-0.16, 1.0)], fill=pen.line)
    pen.polygon([(-0.75, 0.5), (0.0, -1.0), (0.75, 0.5)])


_SHAPES: dict[str, Callable[[Pen], None]] = {
    "ball": _ball,
    "banana": _banana,
    "cup": _cup,
    "fish": _fish,
    "heart": _heart,
    "house": _house,
    "leaf": _leaf,
    "plate": _plate,
    "star": _star,
    "tree": _tree,
}
