"""The plan, made by numpy from hashes, is the one that lists and dictionaries make."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL.Image import Image

from visgain.scoring import plan as plans
from visgain.scoring.plan import IMAGE_SIZE, MAX_UNIT_ROWS, make_plan
from visgain.types import Sample, Skipped, Turn


@dataclass(frozen=True)
class Picture:
    key: str
    content: str | None

    def hint(self) -> str | None:
        return self.content

    def open(self) -> Image:
        raise NotImplementedError


@dataclass(frozen=True)
class Rows:
    rows: Sequence[Sample | Skipped]
    path: Path = Path("data.json")
    image_root: Path = Path()
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int, /) -> Sample | Skipped:
        return self.rows[row]


def drawn(n_rows: int, draw: random.Random) -> Rows:
    """Rows about a few pictures, some of equal content; text-only and skipped ones among them."""
    n_pictures = draw.choice([1, 3, 30, 300])
    pictures = [Picture(f"k{i}", draw.choice([None, "same", "other", f"own{i}"])) for i in range(n_pictures)]
    rows: list[Sample | Skipped] = []
    for row in range(n_rows):
        source, kind = draw.choice(["coco", "a", "zz"]), draw.random()
        if kind < 0.1:
            rows.append(Skipped(row=row, id=str(row), reason="why", source=source))
            continue
        turns = (
            Turn(role="user", text="q" * draw.randrange(50)),
            Turn(role="assistant", text="\u00e9" * draw.randrange(30)),
        )
        images = tuple(draw.choices(pictures, k=draw.choice([1, 1, 1, 2, 3]))) if kind < 0.8 else ()
        rows.append(Sample(row=row, id=str(row), turns=turns, images=images, source=source))
    return Rows(rows)


def naive_parts(dataset: Rows, part_rows: int) -> list[list[list[int]]]:
    """Part -> unit -> rows."""
    units: dict[object, list[int]] = {}
    size: dict[int, int] = {}
    for row, one in enumerate(dataset.rows):
        images = one.images if isinstance(one, Sample) else ()
        about: object = tuple(image.hint() or image.key for image in images) or row
        units.setdefault(about, []).append(row)
        text = sum(len(turn.text.encode()) for turn in one.turns) if isinstance(one, Sample) and images else 0
        size[row] = text + IMAGE_SIZE * len(images)
    pieces = [rows[i : i + MAX_UNIT_ROWS] for rows in units.values() for i in range(0, len(rows), MAX_UNIT_ROWS)]

    def weight(piece: list[int]) -> int:
        return sum(size[row] for row in piece)

    pieces.sort(key=lambda piece: (dataset.rows[piece[0]].source, -weight(piece), piece[0]))
    n_parts = max(1, min(-(-len(dataset) // part_rows), len(pieces)))
    return [sorted(pieces[part::n_parts], key=lambda piece: -weight(piece)) for part in range(n_parts)]


@pytest.mark.parametrize("seed", range(60))
def test_the_plan_is_the_naive_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(plans, "_WINDOW", draw.choice([1, 7, 64]))
    dataset = drawn(draw.choice([1, 2, 5, 40, 200]), draw)
    part_rows = draw.choice([1, 3, 100, 512])
    plan = make_plan(dataset, len(dataset), part_rows)
    assert [plan.units(part) for part in range(plan.n_parts)] == naive_parts(dataset, part_rows)
