"""What a report is made of: a finished score run, the selection made from it, and the dataset that was scored.

Columns of whole runs are read without their token lists; token lists are read for chosen rows only, so that a run over
a million rows fits in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from visgain.data import Dataset, open_dataset
from visgain.errors import DataError, StorageError
from visgain.storage import (
    SCORE_SCHEMA,
    finished_parts,
    flat_values,
    list_lengths,
    part_path,
    read_json,
    read_scores,
    read_selection_table,
)
from visgain.types import Sample

UNNAMED = "(no source)"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One entry for each row of the dataset, in row order."""

    row: Int64[np.ndarray, " R"]
    fingerprint: Int64[np.ndarray, " R"]
    source: np.ndarray  # str objects [R]
    reason: np.ndarray  # str objects [R]; "" where the row was not skipped
    gain: Float64[np.ndarray, " R"]  # nats; nan for text-only and skipped rows
    n_tokens: Int64[np.ndarray, " R"]  # answer tokens
    truncated: Bool[np.ndarray, " R"]

    @property
    def scored(self) -> Bool[np.ndarray, " R"]:
        return np.asarray(~np.isnan(self.gain))

    @property
    def skipped(self) -> Bool[np.ndarray, " R"]:
        return np.asarray(self.reason != "", dtype=bool)

    @property
    def text_only(self) -> Bool[np.ndarray, " R"]:
        return np.asarray(~self.scored & ~self.skipped)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A selection laid over the rows of its scores."""

    record: Mapping[str, Any]  # selection.json
    active: Int64[np.ndarray, " R"]  # tokens that keep their loss; 0 where the row was not kept

    @property
    def rows(self) -> Bool[np.ndarray, " R"]:
        return np.asarray(self.active > 0)


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


def read_overview(folder: Path) -> Rows:
    """Every row of a finished run, without its tokens. Raises StorageError if a gain is not a number."""
    columns = ["row", "fingerprint", "source", "skip_reason", "gain", "truncated", "token_id"]
    table = read_scores(folder, columns)
    finite = pc.fill_null(pc.is_finite(table.column("gain")), True).to_numpy()
    if not finite.all():
        row = table.column("row").to_numpy()[np.flatnonzero(~finite)[0]]
        raise StorageError(f"{folder}: the gain of row {row} is not a finite number; score again with --dtype float32")
    return Rows(
        row=table.column("row").to_numpy(),
        fingerprint=table.column("fingerprint").to_numpy(),
        source=_texts(table.column("source"), empty=UNNAMED),
        reason=_texts(table.column("skip_reason"), empty=""),
        gain=pc.fill_null(table.column("gain"), float("nan")).to_numpy(),
        n_tokens=list_lengths(table.column("token_id")),
        truncated=np.asarray(table.column("truncated").to_numpy(), dtype=bool),
    )


def _texts(column: pa.ChunkedArray, *, empty: str) -> np.ndarray:
    """A string column as objects; `empty` stands for null and for the empty string. Equal texts share one object."""
    codes = pc.fill_null(column, "").combine_chunks().dictionary_encode()
    if isinstance(codes, pa.ChunkedArray):  # combine_chunks of a column without chunks
        codes = codes.combine_chunks()
    names = np.array([name or empty for name in codes.dictionary.to_pylist()] or [empty], dtype=object)
    return np.asarray(names[np.asarray(codes.indices.to_numpy(zero_copy_only=False), dtype=np.int64)], dtype=object)


def read_rows(folder: Path, rows: np.ndarray) -> pa.Table:
    """Full score rows, tokens included, of the asked rows that are there, sorted by row. The run may be unfinished."""
    count = read_run(folder)["n_parts"]
    paths = [str(part_path(folder, index, count)) for index in sorted(finished_parts(folder, count))]
    if not paths:
        raise StorageError(f"{folder} holds no finished part yet; wait for `visgain score`, or run it again")
    wanted = pads.field("row").isin(pa.array(np.asarray(rows, dtype=np.int64)))
    try:
        table = pads.dataset(paths, schema=SCORE_SCHEMA, format="parquet").to_table(filter=wanted)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read the scores in {folder}: {error}; run `visgain score` again") from error
    return table.sort_by("row")


def row_tokens(table: pa.Table) -> Iterator[RowTokens]:
    """The scored rows of a score table, one at a time; text-only and skipped rows are passed over."""
    table = table.filter(pa.array(list_lengths(table.column("nll_seen")) > 0))
    ends = np.cumsum(list_lengths(table.column("turn")))
    turn, start, end, seen, blind = (
        flat_values(table.column(name)) for name in ("turn", "char_start", "char_end", "nll_seen", "nll_blind")
    )
    chars = np.stack([start, end], axis=1)
    heads = zip(*(table.column(name).to_pylist() for name in ("row", "fingerprint", "truncated")), strict=True)
    first = 0
    for (row, fingerprint, truncated), last in zip(heads, ends.tolist(), strict=True):
        here = slice(first, last)
        yield RowTokens(
            row=row,
            fingerprint=fingerprint,
            truncated=truncated,
            turn=turn[here],
            chars=chars[here],
            seen=seen[here],
            blind=blind[here],
        )
        first = last


def read_kept(folder: Path, rows: Rows) -> Kept:
    """The selection in `folder`. Raises DataError if it was not made from these rows."""
    table = read_selection_table(folder)
    selected = table.column("row").to_numpy()
    place = np.searchsorted(rows.row, selected)
    place_or_0 = np.where(place < len(rows.row), place, 0)
    lengths = list_lengths(table.column("keep"))
    same = (
        (rows.row[place_or_0] == selected)
        & (rows.fingerprint[place_or_0] == table.column("fingerprint").to_numpy())
        & (rows.n_tokens[place_or_0] == lengths)
        if len(rows.row)
        else np.zeros(len(selected), dtype=bool)
    )
    if not same.all():
        first = selected[np.flatnonzero(~same)[0]]
        raise DataError(f"the selection in {folder} was not made from these scores (row {first}); select again")
    keep = flat_values(table.column("keep")).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(keep)])
    ends = np.cumsum(lengths)
    active = np.zeros(len(rows.row), dtype=np.int64)
    active[place_or_0] = total[ends] - total[ends - lengths]
    return Kept(record=read_json(folder / "selection.json", "selection"), active=active)


def read_masks(folder: Path, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Row -> keep mask of those `rows` that the selection holds."""
    table = read_selection_table(folder)
    table = table.filter(pa.array(np.isin(table.column("row").to_numpy(), rows)))
    masks = zip(table.column("row").to_pylist(), table.column("keep").to_pylist(), strict=True)
    return {row: np.array(mask, dtype=bool) for row, mask in masks}


# ---------------------------------------------------------------- the dataset


def data_path(run: Mapping[str, Any], moved_to: Path | None) -> Path | None:
    """Where the scored dataset is: None if it is gone. Raises DataError if it is not where the user says."""
    if moved_to is not None:
        if not moved_to.exists():
            raise DataError(f"the dataset {moved_to} does not exist; check --data")
        return moved_to
    recorded = run.get("data")
    return Path(recorded) if recorded and Path(recorded).exists() else None


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
    )


def scored_sample(dataset: Dataset, row: int, fingerprint: int) -> Sample:
    """Row `row` of the dataset. Raises DataError if it is not what was scored."""
    sample = dataset[row] if row < len(dataset) else None
    if not isinstance(sample, Sample) or sample.fingerprint != fingerprint:
        raise DataError(f"the dataset changed since it was scored (row {row}); score it again, or name it with --data")
    return sample
