"""Numbers to rank rows by that are not gains: a column of the scores, or of a file of the user's own."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64

from visgain.data.identity import content_hash
from visgain.data.numbers import dataset_files, read_numbers
from visgain.errors import ConfigError, DataError
from visgain.registry import suggest
from visgain.rowset import RowSet
from visgain.storage import SCORE_SCHEMA

_BLOCK_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 24
"""Of a user's table that is read at a time."""


def column_name(by: str) -> str | None:
    """NAME of a rule `column:NAME`, None for any other rule."""
    return by.removeprefix("column:") if by.startswith("column:") else None


def numeric_score_column(name: str) -> str:
    """`name`, if the scores have a column of numbers called so. Raises ConfigError otherwise."""
    numeric = [field.name for field in SCORE_SCHEMA if _is_number(field.type)]
    if name not in numeric:
        raise ConfigError(
            f"--by column:{name}: the scores hold no such column of numbers, {suggest(name, numeric)} "
            "(for a column of your own, give its file with --table; for one of the dataset's table, the dataset)"
        )
    return name


def require_finite(name: str, row: Int64[np.ndarray, " n"], values: Float64[np.ndarray, " n"]) -> None:
    """Raises DataError with the first rows whose value of `name` is null, nan or infinite."""
    bad = ~np.isfinite(values)
    if bad.any():
        raise DataError(f"--by column:{name}: no finite value for row {first_few(row[bad])}")


def read_column(
    path: Path, name: str, wanted: RowSet, scored: str | None = None
) -> Iterator[tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]]:
    """Every wanted row once, with its value in column `name` of a table with the columns row and `name`.

    In the order of the table, some lines at a time, so that memory does not grow with it. Lines of other rows do no
    harm. The dataset whose fingerprint is `scored` is such a table too, its rows numbered as they stand. Raises
    ConfigError for a kind of file that is not known, DataError for a table that cannot be read, lacks a column or a
    row, or has a row twice or something else than finite numbers.
    """
    found = RowSet(wanted.n_rows)
    for row, values in _lines(path, name, scored):
        here = wanted.holds(row)
        row, values = row[here], values[here]
        twice = found.add(row)
        if len(twice):
            raise DataError(f"--table {path} has more than one line for row {first_few(twice)}")
        require_finite(name, row, values)
        yield row, values
    n_missing, first = 0, np.zeros(0, np.int64)
    for rows in wanted.without(found):
        n_missing, first = n_missing + len(rows), np.concatenate([first, rows])[:5]
    if n_missing:
        raise DataError(
            f"--table {path} has no line for {n_missing} of {len(wanted)} rows: row {first_few(first, n_missing)}"
        )


def _lines(
    path: Path, name: str, scored: str | None
) -> Iterator[tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]]:
    """Row numbers and values, of a table of the user's or of the dataset itself."""
    files = [] if _has_rows(path) else dataset_files(path)
    if not files:
        yield from (_numbers(path, name, table) for table in _blocks(path, name))
        return
    if content_hash(files) != scored:
        raise DataError(
            f"--table {path} has no column 'row', and is not the dataset as it was scored; "
            "give one of the two, so that its lines can be told to belong to the rows"
        )
    yield from read_numbers(files, name)


def _has_rows(path: Path) -> bool:
    """Whether the table is of a kind that says its row numbers, or cannot be read."""
    if path.suffix in (".csv", ".jsonl"):
        return True
    try:
        return path.suffix == ".parquet" and path.is_file() and "row" in pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return True


def _numbers(path: Path, name: str, table: pa.Table) -> tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """The two columns of some lines; null becomes nan."""
    row, values = table.column("row"), table.column(name)
    if not pa.types.is_integer(row.type) or row.null_count:
        raise DataError(f"--table {path}: the column 'row' must hold row numbers")
    if not _is_number(values.type) and values.null_count < len(values):
        raise DataError(f"--table {path}: the column {name!r} holds {values.type}, not numbers")
    return row.to_numpy().astype(np.int64), values.to_numpy().astype(np.float64)


def _blocks(path: Path, name: str) -> Iterator[pa.Table]:
    """The columns row and `name` of the table, some lines at a time; the types of text files are guessed for each."""
    readers: dict[str, Callable[[Path, str], Iterator[pa.Table]]] = {
        ".parquet": _parquet_blocks,
        ".csv": _csv_blocks,
        ".jsonl": _jsonl_blocks,
    }
    if path.suffix not in readers:
        raise ConfigError(f"--table {path}: the name must end in one of {', '.join(readers)}")
    try:
        yield from readers[path.suffix](path, name)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"--table {path} cannot be read: {error}") from error


def _parquet_blocks(path: Path, name: str) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        columns = _columns(path, name, file.schema_arrow.names)
        for index in range(file.num_row_groups):  # one at a time, or the reader keeps what it read
            for batch in file.iter_batches(_BLOCK_ROWS, row_groups=[index], columns=columns):
                yield pa.Table.from_batches([batch])


def _csv_blocks(path: Path, name: str) -> Iterator[pa.Table]:
    with path.open("rb") as file:
        head = file.readline()
        for lines in _line_blocks(file):
            table = pyarrow.csv.read_csv(io.BytesIO(head + lines))
            yield table.select(_columns(path, name, table.column_names))


def _jsonl_blocks(path: Path, name: str) -> Iterator[pa.Table]:
    with path.open("rb") as file:
        for lines in _line_blocks(file):
            table = pyarrow.json.read_json(io.BytesIO(lines))
            yield table.select(_columns(path, name, table.column_names))


def _columns(path: Path, name: str, names: Sequence[str]) -> list[str]:
    for column in ("row", name):
        if column not in names:
            raise DataError(f"--table {path} has no column {column!r}: {suggest(column, names)}")
    return ["row", name]


def _line_blocks(file: BinaryIO) -> Iterator[bytes]:
    while lines := file.readlines(_BLOCK_BYTES):
        yield b"".join(lines)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def first_few(numbers: Int64[np.ndarray, " k"], count: int | None = None) -> str:
    """The first five numbers, and how many more there are, for a message. `count`: of how many, if not of these."""
    listed = ", ".join(map(str, numbers[:5].tolist()))
    more = (len(numbers) if count is None else count) - 5
    return f"{listed} (and {more} more)" if more > 0 else listed
