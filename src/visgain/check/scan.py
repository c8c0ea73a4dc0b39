"""Every row of a dataset looked at, no picture decoded; where that takes too long, an even spread of its rows.

Rows are visited in short runs that jump over the file by the golden section, so that what was seen when time ran out is
spread evenly over it, whatever order it has.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePath

import numpy as np
from tqdm import tqdm

from visgain.data import Dataset
from visgain.errors import ImageError
from visgain.scoring.plan import MAX_UNIT_ROWS
from visgain.types import ImageRef, Sample, Skipped

SECONDS = 5.0
"""For the rows, and as many again for their pictures."""

RUN_ROWS = 256
"""Rows visited one after the other: jumping for each would be slow where rows are stored in blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What is kept of a row: enough to sample and to extrapolate from."""

    row: int
    source: str
    images: tuple[str, ...]  # keys; equal ones are the same picture
    text: int  # bytes in all turns
    answers: int  # bytes in the answers
    has_empty_answer: bool


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What is known of the pictures' files without decoding them."""

    n_names: int = 0  # in the rows that were looked at
    n_looked_at: int = 0
    unusable: Mapping[str, str] = field(default_factory=dict)  # key -> reason
    content: Mapping[str, str] = field(default_factory=dict)  # key -> what is probably the same for equal pictures
    better_root: Path | None = None  # where the missing ones are


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A dataset from afar. `rows` ascend; a row is in them or in `skipped`."""

    n_rows: int  # in the dataset, or --limit
    n_looked_at: int
    rows: Sequence[Outline]
    skipped: Sequence[Skipped]
    colliding: Mapping[str, Sequence[int]]  # id -> rows that share it and differ
    repeated: Sequence[int]  # rows that repeat another one to the letter, whatever their id
    pictures: Pictures = field(default_factory=Pictures)

    @property
    def complete(self) -> bool:
        return self.n_looked_at == self.n_rows

    @property
    def scale(self) -> float:
        """Rows of the dataset for each that was looked at."""
        return self.n_rows / max(1, self.n_looked_at)

    def without_picture(self) -> list[int]:
        """Rows whose picture cannot be used."""
        bad = self.pictures.unusable
        return [one.row for one in self.rows if any(key in bad for key in one.images)]

    def units(self) -> list[list[Outline]]:
        """Rows with pictures by what their pictures probably show, as scoring computes them together."""
        bad, content = self.pictures.unusable, self.pictures.content
        groups: dict[tuple[str, ...], list[Outline]] = {}
        for one in self.rows:
            if one.images and not any(key in bad for key in one.images):
                groups.setdefault(tuple(content.get(key, key) for key in one.images), []).append(one)
        return [group[k : k + MAX_UNIT_ROWS] for group in groups.values() for k in range(0, len(group), MAX_UNIT_ROWS)]


def scan(dataset: Dataset, n_rows: int, seconds: float = SECONDS) -> Scan:
    """Look at the first `n_rows` of `dataset`, for about `seconds` at its rows and as long at its pictures' files."""
    images: dict[str, ImageRef] = {}
    seen = _scan_rows(dataset, n_rows, images, seconds)
    return replace(seen, pictures=_look_at(dataset, images, seconds))


def _scan_rows(dataset: Dataset, n_rows: int, images: dict[str, ImageRef], seconds: float) -> Scan:
    rows: list[Outline] = []
    skipped: list[Skipped] = []
    names = _Names()
    n_looked_at = 0
    for row in tqdm(
        _until(spread(n_rows), seconds), total=n_rows, desc="rows", unit="row", mininterval=0.5, leave=False
    ):
        sample = dataset[row]
        n_looked_at += 1
        names.add(sample)
        if isinstance(sample, Skipped):
            skipped.append(sample)
            continue
        rows.append(outline(sample))
        images |= {image.key: image for image in sample.images}
    return Scan(
        n_rows=n_rows,
        n_looked_at=n_looked_at,
        rows=sorted(rows, key=lambda one: one.row),
        skipped=sorted(skipped, key=lambda one: one.row),
        colliding=names.colliding(),
        repeated=sorted(names.repeated),
    )


def outline(sample: Sample) -> Outline:
    sizes = [len(turn.text.encode("utf-8", "surrogatepass")) for turn in sample.turns]
    return Outline(
        row=sample.row,
        source=sample.source,
        images=tuple(image.key for image in sample.images),
        text=sum(sizes),
        answers=sum(size for size, turn in zip(sizes, sample.turns, strict=True) if turn.role == "assistant"),
        has_empty_answer=any(not answer.strip() for answer in sample.answers),
    )


def spread(n: int) -> Iterator[int]:
    """0 to n - 1, each once, in runs; any beginning of it is spread evenly over the whole."""
    places = np.arange(math.ceil(n / RUN_ROWS)) * (math.sqrt(5) - 1) / 2 % 1
    for run in np.argsort(np.argsort(places)).tolist():
        yield from range(run * RUN_ROWS, min((run + 1) * RUN_ROWS, n))


def _until(rows: Iterator[int], seconds: float) -> Iterator[int]:
    """`rows` until time is up, but one run of them at least."""
    yield from islice(rows, RUN_ROWS)
    end = time.monotonic() + seconds
    for row in rows:
        yield row
        if time.monotonic() > end:
            return


class _Names:
    """Which ids come again with another content, and which rows repeat an earlier one."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, int]] = {}  # id -> row, fingerprint
        self._again: dict[str, list[int]] = {}
        self._contents: set[int] = set()
        self.repeated: list[int] = []

    def add(self, sample: Sample | Skipped) -> None:
        row, fingerprint = self._first.setdefault(sample.id, (sample.row, sample.fingerprint))
        if fingerprint != sample.fingerprint:
            self._again.setdefault(sample.id, [row]).append(sample.row)
        if isinstance(sample, Skipped):
            return
        if sample.fingerprint in self._contents:
            self.repeated.append(sample.row)
        self._contents.add(sample.fingerprint)

    def colliding(self) -> dict[str, list[int]]:
        return {name: sorted(rows) for name, rows in self._again.items()}


# ---------------------------------------------------------------- pictures


def _look_at(dataset: Dataset, images: Mapping[str, ImageRef], seconds: float) -> Pictures:
    """What the files of `images` tell in about `seconds`."""
    end = time.monotonic() + seconds
    keys = list(images)
    content: dict[str, str] = {}
    suspects: list[str] = []
    n_looked_at = 0
    visits = spread(len(keys)) if keys else iter(())
    with (
        ThreadPoolExecutor(16) as pool,
        tqdm(total=len(keys), desc="pictures", unit="file", mininterval=0.5, leave=False) as bar,
    ):
        while time.monotonic() < end and (some := [keys[k] for k in islice(visits, RUN_ROWS)]):
            for key, hint in zip(some, pool.map(lambda key: images[key].hint(), some), strict=True):
                if hint is None:
                    suspects.append(key)
                else:
                    content[key] = hint
            n_looked_at += len(some)
            bar.update(len(some))
    unusable = _reasons([images[key] for key in suspects], end)
    return Pictures(
        n_names=len(keys),
        n_looked_at=n_looked_at,
        unusable=unusable,
        content=content,
        better_root=better_root(dataset, list(unusable), all_of=keys) if unusable else None,
    )


def _reasons(suspects: Sequence[ImageRef], end: float) -> dict[str, str]:
    """Why pictures that gave no hint cannot be used. A format may never give one: a few that open are answer enough."""
    reasons: dict[str, str] = {}
    n_sound = 0
    for image in suspects:
        try:
            image.open()
        except ImageError as error:
            reasons[image.key] = str(error)
        else:
            n_sound += 1
        if (n_sound >= 4 and not reasons) or time.monotonic() > end + SECONDS:
            break
    return reasons


def better_root(dataset: Dataset, unusable: Sequence[str], all_of: Sequence[str] = ()) -> Path | None:
    """A folder that holds most of the pictures `unusable` that are not where they should be; None if none is known.

    It lies near the dataset, or above `all_of` its pictures, where all of these are there by their absolute paths.
    """
    if all_of and all(PurePath(key).is_absolute() and _is_file(Path(key)) for key in all_of):
        return Path(os.path.commonpath([PurePath(key).parent for key in all_of]))
    missing = [key for key in unusable if not _is_file(dataset.image_root / key)]
    some = [missing[k] for k in sorted({len(missing) * k // 32 for k in range(32)})] if missing else []
    inside = [key for key in some if not PurePath(key).is_absolute() and PurePath(key).parts[:1] != ("..",)]

    def held(root: Path) -> int:
        return sum(_is_file(root / key) for key in inside)

    best = max(_nearby(dataset), key=held, default=None) if inside else None
    return best if best is not None and 2 * held(best) >= len(some) else None


def _is_file(path: Path) -> bool:
    """Whether there is a file. A name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _nearby(dataset: Dataset) -> list[Path]:
    """The dataset's and the image root's folders, those around them, and the folders in these."""
    around = [folder.resolve() for folder in (dataset.path.parent, dataset.image_root)]
    around += [parent for folder in list(around) for parent in list(folder.parents)[:3]]
    inside = []
    for folder in dict.fromkeys(around):
        try:
            inside += [child for child in islice(sorted(folder.iterdir()), 200) if child.is_dir()]
        except OSError:
            continue
    return list(dict.fromkeys(around + inside))
