"""Rows of parquet and Arrow files without reading the files: a row comes with the block that it lies in.

The blocks of a parquet file are its row groups, decoded when asked for; a few are kept. Those of an Arrow file are its
record batches, which are mapped, so that processes share them and nothing is decoded. A parquet file whose row groups
are too large to decode one for the sake of a row, which is what one gets by default, is unpacked into an Arrow file
once. What is kept belongs to a file as it was when it was opened, and to no object, so that a row is known by its file
and its place alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from tqdm import tqdm

from visgain.data.cache import cache_folder, derived, derived_path
from visgain.errors import DataError

MAX_GROUP_BYTES, MAX_GROUP_ROWS = 64 << 20, 1 << 13
"""Larger row groups are unpacked. The hub's have 100 to 1,000 rows, and decode in about a millisecond a megabyte."""

_UNPACKED_BYTES, _UNPACKED_ROWS = 16 << 20, 1 << 13  # in one batch of an unpacked file, to bound memory
_KEPT_GROUPS = 3

Names = tuple[str, ...]
"""Of columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """One row: `place` in the record batch `block`."""

    block: pa.RecordBatch
    place: int

    def __getitem__(self, column: str) -> pa.Scalar:
        return self.block.column(column)[self.place]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFile:
    """A parquet file, or an Arrow file or stream, as it was when it was opened."""

    path: Path
    size: int  # bytes
    changed: int  # nanoseconds since 1970

    @classmethod
    def of(cls, path: Path) -> TableFile:
        """Raises DataError for a file that is missing."""
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"cannot read the table {path}: {error.strerror or error}") from error
        return cls(path=path, size=status.st_size, changed=status.st_mtime_ns)

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns. Raises DataError for a file that is damaged or no table."""
        with self._reading():
            return pq.read_schema(self.path) if _is_parquet(self) else _mapped(self).schema

    def __len__(self) -> int:
        """The number of rows. Raises DataError for a file that is damaged or no table."""
        with self._reading():
            return int(_starts(self)[-1])

    @property
    def is_parquet(self) -> bool:
        with self._reading():
            return _is_parquet(self)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The record batches of an Arrow file."""
        with self._reading():
            mapped = _mapped(self)
            yield from (mapped.block(number) for number in range(mapped.n_blocks))

    def cells(self, columns: Names, row: int) -> Cells:
        """The row, at least with `columns`. Raises DataError if its block is damaged or the file was changed."""
        with self._reading():
            starts = _starts(self)
            number = int(np.searchsorted(starts, row, side="right")) - 1
            block = _group(self, columns, number) if _is_parquet(self) else _mapped(self).block(number)
        return Cells(block=block, place=row - int(starts[number]))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            what = " ".join(str(error).split())[:200]
            raise DataError(f"cannot read the table {self.path}: {what}; copy or download it again") from error


def unpacked(tables: Sequence[TableFile], columns: Names) -> list[TableFile]:
    """`tables`, those with too large row groups replaced by Arrow files with `columns`, which are made once.

    Raises DataError where a file is damaged or the disk has no room.
    """
    kind = f"table-1-{'-'.join(columns)[:64].replace('/', '_')}"
    coarse = {table: size for table in tables if (size := _unpacked_bytes(table, columns))}
    missing = {table for table in coarse if not derived_path(kind, [table.path]).exists()}
    _require_room(tables[0].path, sum(coarse[table] for table in missing))

    def arrow_file(table: TableFile) -> TableFile:
        return TableFile.of(derived(kind, [table.path], lambda target: _unpack(table, columns, coarse[table], target)))

    with tqdm(coarse, desc="unpacking once", unit="file", delay=1, leave=False, disable=not missing) as files:
        made = {table: arrow_file(table) for table in files}
    return [made.get(table, table) for table in tables]


# ---------------------------------------------------------------- parquet


@lru_cache(maxsize=1 << 14)
def _is_parquet(table: TableFile) -> bool:
    with table.path.open("rb") as file:
        return file.read(4) == b"PAR1"


@lru_cache(maxsize=64)
def _metadata(table: TableFile) -> pq.FileMetaData:
    return pq.read_metadata(table.path)


@lru_cache(maxsize=1 << 14)
def _starts(table: TableFile) -> Int64[np.ndarray, " starts"]:
    """The first row of each block, and the number of rows."""
    if _is_parquet(table):
        metadata = _metadata(table)
        lengths = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    else:
        mapped = _mapped(table)
        lengths = [mapped.block(number).num_rows for number in range(mapped.n_blocks)]
    return np.cumsum([0, *lengths], dtype=np.int64)


@lru_cache(maxsize=_KEPT_GROUPS)
def _group(table: TableFile, columns: Names, number: int) -> pa.RecordBatch:
    if TableFile.of(table.path) != table:
        raise DataError(f"the table {table.path} was changed while it was being read; run the same command again")
    # Opened anew (0.2 ms): a reader is no thing to share between threads, or to take along into a fork.
    with pq.ParquetFile(table.path, metadata=_metadata(table), memory_map=True, pre_buffer=False) as file:
        rows = file.read_row_group(number, columns=list(columns), use_threads=False)
    return rows.combine_chunks().to_batches()[0]


def _unpacked_bytes(table: TableFile, columns: Names) -> int:
    """How large `columns` are when unpacked; 0 if the file can be read as it is."""
    with table._reading():
        if not _is_parquet(table):
            return 0
        metadata = _metadata(table)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [sum(_column_bytes(group, columns)) for group in groups]
    is_coarse = any(
        group.num_rows > MAX_GROUP_ROWS or size > MAX_GROUP_BYTES for group, size in zip(groups, sizes, strict=True)
    )
    return sum(sizes) if is_coarse else 0


def _column_bytes(group: pq.RowGroupMetaData, columns: Names) -> Iterable[int]:
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema.partition(".")[0] in columns:
            yield column.total_uncompressed_size


def _unpack(table: TableFile, columns: Names, size: int, target: Path) -> None:
    """Write `columns` of a parquet file, of `size` bytes, as an Arrow file, some rows at a time."""
    some = max(1, min(_UNPACKED_ROWS, _UNPACKED_BYTES * len(table) // size))
    options = pa.ipc.IpcWriteOptions(unify_dictionaries=True)
    with table._reading(), pq.ParquetFile(table.path, pre_buffer=False) as file:
        wanted = list(columns)
        schema = pa.schema([file.schema_arrow.field(name) for name in wanted])
        with pa.ipc.new_file(target, schema, options=options) as writer:
            for number in range(file.num_row_groups):  # one at a time, or the reader keeps what it read
                for batch in file.iter_batches(some, row_groups=[number], columns=wanted, use_threads=False):
                    writer.write_batch(batch.select(wanted))


def _require_room(path: Path, needed: int) -> None:
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the row groups of {path} are so large that the table must be unpacked, which takes {needed >> 20:,} MB; "
            f"{cache_folder()} has {free >> 20:,} MB. Write the table with row groups of about 100 rows, "
            "or let XDG_CACHE_HOME name a folder with more room"
        )


# ---------------------------------------------------------------- Arrow


class _ArrowFile:
    """The record batches of a mapped Arrow file. Compressed ones are decoded one at a time."""

    def __init__(self, source: pa.MemoryMappedFile) -> None:
        self._reader = pa.ipc.open_file(source)
        self.schema, self.n_blocks = self._reader.schema, self._reader.num_record_batches

    def block(self, number: int) -> pa.RecordBatch:
        return self._reader.get_batch(number)


class _ArrowStream:
    """The record batches of a mapped Arrow stream, which is what `datasets` writes. A stream has no table of them."""

    def __init__(self, source: pa.MemoryMappedFile) -> None:
        reader = pa.ipc.open_stream(source)
        self._batches = [batch for batch in reader if batch.num_rows]
        self.schema, self.n_blocks = reader.schema, len(self._batches)

    def block(self, number: int) -> pa.RecordBatch:
        return self._batches[number]


@lru_cache(maxsize=256)  # each holds a file open
def _mapped(table: TableFile) -> _ArrowFile | _ArrowStream:
    source = pa.memory_map(str(table.path))
    return _ArrowFile(source) if source.read_at(6, 0) == b"ARROW1" else _ArrowStream(source)
