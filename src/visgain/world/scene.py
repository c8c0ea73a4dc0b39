"""What there is in a picture: objects on a 3 x 3 grid, with a dial for how much of it language alone could guess.

Two priors make the world a laboratory for language bias. Every kind of object has a usual colour (bananas are yellow)
and a usual companion (a cup stands beside a plate). `bias` is the strength of both: with probability `|bias|` an object
follows them (bias > 0) or contradicts them (bias < 0); otherwise it is drawn independently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("ball", "banana", "cup", "fish", "heart", "house", "leaf", "plate", "star", "tree")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white", "black")
SIZES = ("small", "large")
VERTICAL = ("top", "middle", "bottom")
HORIZONTAL = ("left", "centre", "right")
MAX_OBJECTS = 4

USUAL_COLOUR = {
    "ball": "black",
    "banana": "yellow",
    "cup": "purple",
    "fish": "blue",
    "heart": "red",
    "house": "red",
    "leaf": "green",
    "plate": "white",
    "star": "yellow",
    "tree": "green",
}
COMPANION = {"cup": "plate", "tree": "house", "leaf": "banana", "fish": "ball", "star": "heart"}
COMPANION |= {there: here for here, there in COMPANION.items()}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object. `cell` is 0..8, row by row from the top left."""

    kind: str
    colour: str
    size: str
    cell: int

    @property
    def row(self) -> int:
        return self.cell // 3

    @property
    def column(self) -> int:
        return self.cell % 3

    @property
    def place(self) -> str:
        """Its place in words, e.g. "top left"."""
        return f"{VERTICAL[self.row]} {HORIZONTAL[self.column]}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The objects of one picture in reading order (row by row), at most one to a cell."""

    things: tuple[Thing, ...]

    def count(self, kind: str) -> int:
        return sum(thing.kind == kind for thing in self.things)

    @property
    def kinds(self) -> set[str]:
        return {thing.kind for thing in self.things}

    @property
    def unique(self) -> list[Thing]:
        """The objects that are the only one of their kind: those one can ask about as "the cup"."""
        return [thing for thing in self.things if self.count(thing.kind) == 1]


def draw_scene(rng: np.random.Generator, bias: float, fewest: int = 1, most: int = MAX_OBJECTS) -> Scene:
    """A random scene of `fewest` to `most` objects under `bias` in [-1, 1] (see the module's description)."""
    kinds = _draw_kinds(rng, int(rng.integers(fewest, most + 1)), bias)
    cells = sorted(rng.choice(9, size=len(kinds), replace=False).tolist())
    rng.shuffle(kinds)
    things = [
        Thing(kind=kind, colour=_draw_colour(rng, kind, bias), size=str(rng.choice(SIZES)), cell=cell)
        for kind, cell in zip(kinds, cells, strict=True)
    ]
    return Scene(things=tuple(things))


def _draw_kinds(rng: np.random.Generator, count: int, bias: float) -> list[str]:
    kinds: list[str] = []
    while len(kinds) < count:
        alone = [kind for kind in dict.fromkeys(kinds) if COMPANION[kind] not in kinds]
        if kinds and alone and bias > 0 and rng.random() < bias:
            kinds.append(COMPANION[alone[-1]])
        elif kinds and rng.random() < 0.25:
            kinds.append(kinds[-1])  # repeated kinds make counting worth asking
        else:
            kinds.append(str(rng.choice(KINDS)))
    if bias >= 0:
        return kinds
    apart: list[str] = []
    for kind in kinds:
        apart.append(_without_companion(rng, kind, apart, bias))
    return apart


def _without_companion(rng: np.random.Generator, kind: str, earlier: list[str], bias: float) -> str:
    """Another kind, with probability |bias|, if `kind` would stand beside its companion."""
    forbidden = {COMPANION[other] for other in earlier}
    if kind in forbidden and rng.random() < -bias:
        return str(rng.choice([other for other in KINDS if other not in forbidden]))
    return kind


def _draw_colour(rng: np.random.Generator, kind: str, bias: float) -> str:
    usual = USUAL_COLOUR[kind]
    if rng.random() < abs(bias):
        return usual if bias > 0 else str(rng.choice([colour for colour in COLOURS if colour != usual]))
    return str(rng.choice(COLOURS))
