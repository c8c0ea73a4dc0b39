"""Numbers to rank rows by that are not gains: a column of the scores, or of a file of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64

from visgain.errors import ConfigError, DataError
from visgain.registry import suggest
from visgain.storage import SCORE_SCHEMA


def column_name(by: str) -> str | None:
    """NAME of a rule `column:NAME`, None for any other rule."""
    return by.removeprefix("column:") if by.startswith("column:") else None


def numeric_score_column(name: str) -> str:
    """`name`, if the scores have a column of numbers called so. Raises ConfigError otherwise."""
    numeric = [field.name for field in SCORE_SCHEMA if _is_number(field.type)]
    if name not in numeric:
        raise ConfigError(
            f"--by column:{name}: the scores hold no such column of numbers, {suggest(name, numeric)} "
            "(for a column of your own, give its file with --table)"
        )
    return name


def read_column(path: Path, name: str, row: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """The value of column `name` for each of `row`, from a table with the columns row and `name`; null becomes nan.

    Other rows in the table do no harm. Raises ConfigError for a kind of file that is not known, DataError for a table
    that cannot be read, lacks a column or a row, or has a row twice or something else than numbers.
    """
    table = _read_table(path)
    for column in ("row", name):
        if column not in table.column_names:
            raise DataError(f"--table {path} has no column {column!r}: {suggest(column, table.column_names)}")
    if not pa.types.is_integer(table.column("row").type) or table.column("row").null_count:
        raise DataError(f"--table {path}: the column 'row' must hold row numbers")
    if not _is_number(table.column(name).type):
        raise DataError(f"--table {path}: the column {name!r} holds {table.column(name).type}, not numbers")
    at = _positions(path, table.column("row").to_numpy().astype(np.int64), row)
    return np.asarray(table.column(name).to_numpy().astype(np.float64)[at])


def _read_table(path: Path) -> pa.Table:
    readers = {
        ".parquet": lambda: pq.ParquetFile(path).read(),
        ".csv": lambda: pyarrow.csv.read_csv(path),
        ".jsonl": lambda: pyarrow.json.read_json(path),
    }
    if path.suffix not in readers:
        raise ConfigError(f"--table {path}: the name must end in one of {', '.join(readers)}")
    try:
        return readers[path.suffix]()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"--table {path} cannot be read: {error}") from error


def _positions(path: Path, has: Int64[np.ndarray, " m"], row: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Where in `has` each of `row` stands, exactly once."""
    order = np.argsort(has, kind="stable")
    has = has[order]
    twice = has[1:][has[1:] == has[:-1]]
    if len(twice):
        raise DataError(f"--table {path} has more than one line for row {first_few(np.unique(twice))}")
    missing = row[~np.isin(row, has)]
    if len(missing):
        raise DataError(f"--table {path} has no line for {len(missing)} of {len(row)} rows: row {first_few(missing)}")
    return np.asarray(order[np.searchsorted(has, row)])


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def first_few(numbers: Int64[np.ndarray, " k"]) -> str:
    """The first five numbers, and how many more there are, for a message."""
    listed = ", ".join(map(str, numbers[:5].tolist()))
    return listed if len(numbers) <= 5 else f"{listed} (and {len(numbers) - 5} more)"
