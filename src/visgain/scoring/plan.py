"""Which rows are scored together, and in which part. Made once for a run and kept in its folder.

Rows about the same pictures make a unit, so that the pictures' tokens are computed once for all of them. Units are
sorted by source and size and dealt out to the parts in turn: datasets are often ordered by source, and this makes every
part, and so every share of the work and every estimate of the time left, a fair sample of the whole.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64, UInt64
from tqdm import tqdm

from visgain.data import Dataset
from visgain.errors import StorageError
from visgain.storage import atomic_path
from visgain.types import Sample, Skipped

MAX_UNIT_ROWS = 32
"""More conversations about one picture than this are several units: sharing hardly gains any more, packs grow."""

IMAGE_SIZE = 2000
"""What a picture weighs against characters of text in the order of units; it need only be roughly right."""

FILE = "plan.parquet"

_WINDOW = 1 << 12
"""Rows that are looked at at once."""


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
    """The plan for the first `n_rows` of `dataset`, in parts of about `part_rows`.

    In memory there are some numbers a row, and two hashes a picture.
    """
    seen = _outline(dataset, n_rows)
    by_unit = np.lexsort(seen.key.T)  # rows about the same pictures side by side, in each unit ascending
    starts = _piece_starts(seen.key[by_unit])
    lengths = np.diff(np.append(starts, n_rows))
    first, weight = by_unit[starts], np.add.reduceat(seen.size[by_unit], starts)
    n_parts = max(1, min(math.ceil(n_rows / part_rows), len(starts)))  # no part without rows
    place = np.empty(len(starts), np.int64)
    place[np.lexsort((first, -weight, seen.source[first]))] = np.arange(len(starts))
    dealt = np.lexsort((place, -weight, place % n_parts))
    starts, lengths = starts[dealt], lengths[dealt]
    within = np.arange(n_rows) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return Plan(
        part=np.repeat((place % n_parts)[dealt].astype(np.int32), lengths),
        unit=np.repeat(np.arange(len(dealt), dtype=np.int64), lengths),
        row=by_unit[np.repeat(starts, lengths) + within].astype(np.int64),
        n_parts=n_parts,
        longest_text=int(seen.text.max(initial=0)),
        per_image_cost=_per_image_cost(seen.n_pictures, seen.size),
    )


def _piece_starts(key: UInt64[np.ndarray, "R 2"]) -> Int64[np.ndarray, " P"]:
    """Where runs of equal keys begin, and every MAX_UNIT_ROWS rows in them."""
    is_new = np.append(True, (key[1:] != key[:-1]).any(axis=1))
    run = np.flatnonzero(is_new)
    within = np.arange(len(key)) - np.repeat(run, np.diff(np.append(run, len(key))))
    return np.flatnonzero(within % MAX_UNIT_ROWS == 0)


def _per_image_cost(n_pictures: Int32[np.ndarray, " R"], sizes: Int64[np.ndarray, " R"]) -> float:
    """A row is computed seen, blind, and if it has several pictures once more for each of them."""
    passes = np.where(n_pictures > 1, 2 + n_pictures, 2)
    return float((passes * sizes).sum() / (2 * sizes).sum()) if sizes.any() else 1.0


@dataclass(frozen=True, kw_only=True)
class _Outline:
    """What the plan must know of each row."""

    key: UInt64[np.ndarray, "R 2"]  # hash of what its pictures are; of its own where it has none, which share nothing
    n_pictures: Int32[np.ndarray, " R"]
    source: Int32[np.ndarray, " R"]  # number of its source in their order
    text: Int64[np.ndarray, " R"]  # bytes; 0 for rows without pictures
    size: Int64[np.ndarray, " R"]  # how much there is to compute, 0 without pictures


def _outline(dataset: Dataset, n_rows: int) -> _Outline:
    key = np.stack([np.arange(n_rows, dtype=np.uint64), np.zeros(n_rows, np.uint64)], axis=1)
    n_pictures, source = np.zeros(n_rows, np.int32), np.zeros(n_rows, np.int32)
    text = np.zeros(n_rows, np.int64)
    names: dict[str, int] = {}
    contents: dict[bytes, bytes] = {}
    progress = tqdm(total=n_rows, desc="planning", unit="row", mininterval=0.5, leave=False)
    with ThreadPoolExecutor(16) as pool, progress:
        for start in range(0, n_rows, _WINDOW):
            samples = [dataset[row] for row in range(start, min(start + _WINDOW, n_rows))]
            _look_at_pictures(samples, contents, pool)
            for row, sample in enumerate(samples, start=start):
                source[row] = names.setdefault(sample.source, len(names))
                if isinstance(sample, Sample) and sample.images:
                    pictures = [contents[_hash(image.key)] for image in sample.images]
                    key[row] = np.frombuffer(hashlib.blake2b(b"".join(pictures), digest_size=16).digest(), np.uint64)
                    n_pictures[row] = len(pictures)
                    text[row] = sum(len(turn.text.encode("utf-8", "surrogatepass")) for turn in sample.turns)
            progress.update(len(samples))
    rank = np.zeros(len(names), np.int32)
    rank[[names[name] for name in sorted(names)]] = np.arange(len(names))
    size = np.where(n_pictures > 0, text + IMAGE_SIZE * n_pictures.astype(np.int64), 0)
    return _Outline(key=key, n_pictures=n_pictures, source=rank[source], text=text, size=size)


def _look_at_pictures(samples: Sequence[Sample | Skipped], contents: dict[bytes, bytes], pool: Executor) -> None:
    """Add to `contents` what each picture is: pictures of equal content under several keys belong together."""
    images = {_hash(each.key): each for one in samples if isinstance(one, Sample) for each in one.images}
    new = {name: image for name, image in images.items() if name not in contents}
    hints = pool.map(lambda image: image.hint(), new.values(), chunksize=64)
    contents |= {name: name if hint is None else _hash(hint) for name, hint in zip(new, hints, strict=True)}


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


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
