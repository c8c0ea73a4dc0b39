"""Numbers that stand in a dataset's own table beside what is scored, such as the ratings of FineVision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64

from visgain.data.blocks import TableFile
from visgain.data.hub import HUB, fetch
from visgain.data.parts import base_of
from visgain.data.tablefiles import find_tables
from visgain.errors import DataError
from visgain.registry import suggest

_ROWS = 1 << 16


def dataset_files(path: Path) -> list[Path]:
    """The files of the table at `path`, which may be anything that --data takes; empty if there is no table."""
    if base_of(path).exists():
        return find_tables(path)
    return fetch(str(path)).paths if HUB.recognises(path, b"") else []


def read_numbers(
    files: Sequence[Path], name: str
) -> Iterator[tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]]:
    """Every row of the table in order, with its number in column `name`: of a list of numbers their mean.

    What is null does not count; nan where nothing does. Raises DataError if a file cannot be read or its column is
    missing or holds no numbers.
    """
    first = 0
    for file in files:
        table = TableFile.of(file)
        if name not in table.schema.names:
            raise DataError(f"{file} has no column {name!r}: {suggest(name, table.schema.names)}")
        for column in _pieces(table, name):
            yield np.arange(first, first + len(column), dtype=np.int64), _means(file, name, column)
            first += len(column)


def _pieces(table: TableFile, name: str) -> Iterator[pa.Array]:
    if not table.is_parquet:
        for batch in table.batches():
            yield batch.column(name)
        return
    with pq.ParquetFile(table.path) as file:
        for number in range(file.num_row_groups):  # one at a time, or the reader keeps what it read
            for batch in file.iter_batches(_ROWS, row_groups=[number], columns=[name]):
                yield batch.column(0)


def _means(file: Path, name: str, column: pa.Array) -> Float64[np.ndarray, " k"]:
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    kind = column.type.value_type if is_list else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise DataError(f"the column {name!r} of {file} holds {column.type}, neither numbers nor lists of them")
    values = pc.list_flatten(column) if is_list else column
    rows = pc.list_parent_indices(column).to_numpy() if is_list else np.arange(len(column))
    counted = values.is_valid().to_numpy(zero_copy_only=False)
    numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)[counted]
    total = np.bincount(rows[counted], weights=numbers, minlength=len(column))
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing counts
        return np.asarray(total / np.bincount(rows[counted], minlength=len(column)))
