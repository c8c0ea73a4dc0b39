"""What a report shows of single rows: their tokens, what a selection keeps of them, and the sample that was scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int32
from tqdm import tqdm

from visgain.config import ExportConfig, TrainConfig
from visgain.data import Dataset, is_there, open_dataset
from visgain.errors import DataError, StorageError
from visgain.storage import (
    PER_IMAGE_SCHEMA,
    find_rows,
    finished_parts,
    flat_values,
    list_lengths,
    part_path,
    read_json,
    score_schema,
    selection_errors,
)
from visgain.types import Sample

UNNAMED = "(no source)"

TOKEN_COLUMNS = ("row", "fingerprint", "truncated", "turn", "char_start", "char_end", "nll_seen", "nll_blind")
"""What `row_tokens` needs of a score table; of runs that have it, it also takes `image_gain`."""


@dataclass(frozen=True, kw_only=True)
class RowTokens:
    """The answer tokens of one scored row."""

    row: int
    fingerprint: int
    truncated: bool
    turn: Int32[np.ndarray, " A"]
    chars: Int32[np.ndarray, "A 2"]
    seen: Float32[np.ndarray, " A"]  # nats
    blind: Float32[np.ndarray, " A"]
    image_gain: tuple[float, ...] = ()  # nats, of each image; empty where it was not measured

    @property
    def gain(self) -> Float32[np.ndarray, " A"]:
        return np.asarray(self.blind - self.seen)

    def of_answer(self, index: int) -> Bool[np.ndarray, " A"]:
        """Which tokens belong to the row's answer `index`."""
        return np.asarray(self.turn == index)


def read_run(folder: Path) -> Mapping[str, Any]:
    """run.json of a score run. Raises StorageError if the folder holds none."""
    record = read_json(folder / "run.json", "scores")
    if not isinstance(record, dict) or not isinstance(record.get("n_parts"), int):
        raise StorageError(f"{folder / 'run.json'} is not the record of a score run; point --scores at one")
    return record


def read_rows(folder: Path, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of the asked rows that are there, by default what `row_tokens` takes, sorted by row.

    The run may be unfinished. Reads in full only where one of the rows lies. Raises StorageError if nothing is scored
    yet or a part is damaged.
    """
    run = read_run(folder)
    count = run["n_parts"]
    if columns is None:
        columns = [*TOKEN_COLUMNS, *({"image_gain"} & set(score_schema(run).names))]
    paths = [part_path(folder, index, count) for index in sorted(finished_parts(folder, count))]
    if not paths:
        raise StorageError(f"{folder} holds no finished part yet; wait for `visgain score`, or run it again")
    wanted = np.asarray(rows, dtype=np.int64)
    schema = pa.schema([PER_IMAGE_SCHEMA.field(name) for name in columns])
    found = [schema.empty_table()]
    try:
        for path in tqdm(paths, desc="finding rows", unit="part", delay=2, mininterval=0.5):
            found += find_rows(path, wanted, columns)
    except (KeyError, OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read the scores in {folder}: {error}; run `visgain score` again") from error
    return pa.concat_tables(found).sort_by("row")


def row_tokens(table: pa.Table) -> Iterator[RowTokens]:
    """The scored rows of a score table, one at a time; text-only and skipped rows are passed over."""
    table = table.filter(pa.array(list_lengths(table.column("nll_seen")) > 0))
    ends = np.cumsum(list_lengths(table.column("turn")))
    turn, start, end, seen, blind = (
        flat_values(table.column(name)) for name in ("turn", "char_start", "char_end", "nll_seen", "nll_blind")
    )
    chars = np.stack([start, end], axis=1)
    heads = zip(*(table.column(name).to_pylist() for name in ("row", "fingerprint", "truncated")), strict=True)
    measured = "image_gain" in table.column_names
    image_gains = table.column("image_gain").to_pylist() if measured else [()] * len(table)
    first = 0
    for (row, fingerprint, truncated), image_gain, last in zip(heads, image_gains, ends.tolist(), strict=True):
        here = slice(first, last)
        yield RowTokens(
            row=row,
            fingerprint=fingerprint,
            truncated=truncated,
            turn=turn[here],
            chars=chars[here],
            seen=seen[here],
            blind=blind[here],
            image_gain=tuple(image_gain),
        )
        first = last


def read_masks(folder: Path, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Row -> keep mask of those `rows` that the selection holds."""
    path = folder / "selection.parquet"
    with selection_errors(path):
        tables = list(find_rows(path, np.asarray(rows, dtype=np.int64), ["row", "keep"]))
    masks = (zip(*(table.column(name).to_pylist() for name in ("row", "keep")), strict=True) for table in tables)
    return {row: np.array(mask, dtype=bool) for pairs in masks for row, mask in pairs}


# ---------------------------------------------------------------- the dataset


def data_path(run: Mapping[str, Any], moved_to: Path | None) -> Path | None:
    """Where the scored dataset is: None if it is gone. Raises DataError if it is not where the user says."""
    if moved_to is not None:
        if not is_there(moved_to):
            raise DataError(f"the dataset {moved_to} does not exist; check --data")
        return moved_to
    recorded = run.get("data")
    return Path(recorded) if recorded and is_there(Path(recorded)) else None


def open_scored(run: Mapping[str, Any], data: Path, image_root: Path | None) -> Dataset:
    """Open the dataset of a run under the same safety limits as when it was scored."""
    recorded = run.get("image_root")
    if image_root is None and recorded and Path(recorded).is_dir():
        image_root = Path(recorded)
    return open_dataset(
        data,
        image_root,
        max_pixels=int(run.get("max_pixels", 100_000_000)),
        follow_links=bool(run.get("follow_links", False)),
        columns=run.get("columns"),
        format=run.get("format"),
    )


def open_as_scored(options: TrainConfig | ExportConfig, identity: Mapping[str, Any]) -> Dataset:
    """The dataset of `options`, read as it was for the scores of this `identity` (empty: as the options say).

    Raises DataError if it is another one, or changed.
    """
    dataset = open_dataset(
        options.data,
        options.image_root,
        max_pixels=options.max_pixels,
        follow_links=options.follow_links,
        columns=options.columns or identity.get("columns"),
        format=options.format or identity.get("format"),
    )
    if identity.get("data_fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise DataError(f"{options.data} changed since it was scored (or is another dataset); score and select again")
    return dataset


def scored_sample(dataset: Dataset, row: int, fingerprint: int) -> Sample:
    """Row `row` of the dataset. Raises DataError if it is not what was scored."""
    sample = dataset[row] if row < len(dataset) else None
    if not isinstance(sample, Sample) or sample.fingerprint != fingerprint:
        what = f"{dataset.path} changed since it was scored (row {row})"
        raise DataError(f"{what}; score it again, or name it with --data")
    return sample
