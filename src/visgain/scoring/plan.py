"""Which rows are scored together, and in which part. Made once for a run and kept in its folder.

Rows about the same pictures make a unit, so that the pictures' tokens are computed once for all of them. Units are
sorted by source and size and dealt out to the parts in turn: datasets are often ordered by source, and this makes every
part, and so every share of the work and every estimate of the time left, a fair sample of the whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64
from tqdm import tqdm

from visgain.data import Dataset
from visgain.errors import StorageError
from visgain.storage import atomic_path
from visgain.types import ImageRef, Skipped

MAX_UNIT_ROWS = 32
"""More conversations about one picture than this are several units: sharing hardly gains any more, packs grow."""

IMAGE_SIZE = 2000
"""What a picture weighs against characters of text in the order of units; it need only be roughly right."""

FILE = "plan.parquet"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every row once: sorted by part, in each part the largest units first, in each unit ascending."""

    part: Int32[np.ndarray, " R"]
    unit: Int64[np.ndarray, " R"]  # equal numbers, side by side, are one unit
    row: Int64[np.ndarray, " R"]
    n_parts: int
    longest_text: int  # bytes of text in the longest conversation: no conversation has more text tokens
    per_image_cost: float  # how many times as much there is to compute if each image is also blinded on its own

    def units(self, part: int) -> list[list[int]]:
        """The rows of each unit of `part`."""
        here = slice(*np.searchsorted(self.part, [part, part + 1]))
        cuts = np.flatnonzero(np.diff(self.unit[here])) + 1
        return [rows.tolist() for rows in np.split(self.row[here], cuts) if len(rows)]

    def n_rows(self, part: int) -> int:
        start, stop = np.searchsorted(self.part, [part, part + 1])
        return int(stop - start)


def make_plan(dataset: Dataset, n_rows: int, part_rows: int) -> Plan:
    """The plan for the first `n_rows` of `dataset`, in parts of about `part_rows`."""
    keys, sources, sizes, longest = _outline(dataset, n_rows)
    units: dict[object, list[int]] = {}
    for row, key in enumerate(keys):
        # Rows without pictures share nothing.
        units.setdefault((row,) if key is None else key, []).append(row)
    pieces = [rows[i : i + MAX_UNIT_ROWS] for rows in units.values() for i in range(0, len(rows), MAX_UNIT_ROWS)]
    weight = [int(sizes[rows].sum()) for rows in pieces]
    order = sorted(range(len(pieces)), key=lambda i: (sources[pieces[i][0]], -weight[i], pieces[i][0]))
    n_parts = max(1, min(math.ceil(n_rows / part_rows), len(pieces)))  # no part without rows
    dealt = sorted(((place % n_parts, -weight[i], pieces[i]) for place, i in enumerate(order)), key=lambda one: one[:2])
    lengths = [len(rows) for _, _, rows in dealt]
    return Plan(
        part=np.repeat(np.asarray([part for part, _, _ in dealt], np.int32), lengths),
        unit=np.repeat(np.arange(len(dealt), dtype=np.int64), lengths),
        row=np.asarray([row for _, _, rows in dealt for row in rows], np.int64),
        n_parts=n_parts,
        longest_text=longest,
        per_image_cost=_per_image_cost(keys, sizes),
    )


def _per_image_cost(keys: Sequence[tuple[str, ...] | None], sizes: Int64[np.ndarray, " R"]) -> float:
    """A row is computed seen, blind, and if it has several pictures once more for each of them."""
    n_pictures = np.asarray([len(key or ()) for key in keys])
    passes = np.where(n_pictures > 1, 2 + n_pictures, 2)
    return float((passes * sizes).sum() / (2 * sizes).sum()) if sizes.any() else 1.0


def _outline(dataset: Dataset, n_rows: int) -> tuple[list[tuple[str, ...] | None], list[str], np.ndarray, int]:
    """For each row: what its pictures are (None without), its source, and how much there is to compute; the longest."""
    keys: list[tuple[str, ...] | None] = []
    sources: list[str] = []
    sizes = np.zeros(n_rows, np.int64)
    longest = 0
    images: dict[str, ImageRef] = {}
    for row in tqdm(range(n_rows), desc="planning", unit="row", mininterval=0.5, leave=False):
        sample = dataset[row]
        sources.append(sample.source)
        if isinstance(sample, Skipped) or not sample.images:
            keys.append(None)
            continue
        keys.append(tuple(image.key for image in sample.images))
        images |= {image.key: image for image in sample.images}
        text = sum(len(turn.text.encode("utf-8", "surrogatepass")) for turn in sample.turns)
        sizes[row] = text + IMAGE_SIZE * len(sample.images)
        longest = max(longest, text)
    content = _contents(images)
    return [None if key is None else tuple(content[name] for name in key) for key in keys], sources, sizes, longest


def _contents(images: dict[str, ImageRef]) -> dict[str, str]:
    """A name for the content of each picture: pictures of equal content under several paths belong together."""
    with ThreadPoolExecutor(16) as pool:
        hints = pool.map(lambda image: image.hint(), images.values(), chunksize=64)
        found = tqdm(hints, total=len(images), desc="looking at pictures", unit="file", mininterval=0.5, leave=False)
        return {key: key if hint is None else hint for key, hint in zip(images, found, strict=True)}


def write_plan(folder: Path, plan: Plan) -> None:
    table = pa.table({"part": plan.part, "unit": plan.unit, "row": plan.row})
    known = {"longest_text": str(plan.longest_text), "per_image_cost": str(plan.per_image_cost)}
    table = table.replace_schema_metadata(known)
    with atomic_path(folder / FILE) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_plan(folder: Path, n_parts: int) -> Plan:
    """The plan of the run in `folder`. Raises StorageError if it is missing or damaged."""
    try:
        table = pq.read_table(folder / FILE)
        part, unit, row = (table.column(name).to_numpy() for name in ("part", "unit", "row"))
        longest = int(table.schema.metadata[b"longest_text"])
        cost = float(table.schema.metadata.get(b"per_image_cost", "nan"))  # older plans do not say
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {folder / FILE}: {error}; use another --out") from error
    return Plan(part=part, unit=unit, row=row, n_parts=n_parts, longest_text=longest, per_image_cost=cost)


def probe_units(plan: Plan, n_rows: int) -> list[list[int]]:
    """The units of the first part, at most `n_rows` rows of each, in the order in which to try things on them.

    By turns the one with the most rows and the smallest that is left.
    """
    units = plan.units(0)
    most_rows = sorted(range(len(units)), key=lambda unit: -len(units[unit]))
    turns = itertools.chain.from_iterable(zip(most_rows, reversed(range(len(units))), strict=True))
    return [units[unit][:n_rows] for unit in dict.fromkeys(turns)]


def rotated(parts: Sequence[int], rank: int, world: int) -> list[int]:
    """`parts`, beginning at this rank's share, so that processes that start together do not ask for the same one."""
    start = len(parts) * rank // world
    return [*parts[start:], *parts[:start]]
