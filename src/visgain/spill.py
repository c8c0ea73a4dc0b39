"""Rows set aside on disk, grouped by a key: sorting, grouping and joining in memory that does not grow.

Rows come in any order and are read back key by key, as often as wanted. With the window of a row number as key they
come back in row order; tables that are spilled by the same key can be joined key by key.
"""

from __future__ import annotations

import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from visgain.quantile import Passes
from visgain.storage import storage_errors

BUFFER_BYTES = 1 << 26
BUFFER_ROWS = 1 << 20
"""What is held back until it is written, at most: the more, the fewer and longer the pieces of each key."""

WINDOW_ROWS = 1 << 16
"""Rows of the dataset in one window: what is in memory at a time when tables are sorted or joined by row."""

_PIECE_ROWS = 1 << 13


class Spill:
    """Tables of one schema in a temporary file, in pieces of one key each.

    The file has no name, so it is gone when the process is, however that ends. It lies on the disk of `folder`, which
    need not exist yet. Raises StorageError if it cannot be written.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._folder = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        with storage_errors(self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 closed by __exit__
        self._places: defaultdict[int, array[int]] = defaultdict(lambda: array("q"))  # start, length, start, length ...
        self._waiting: list[tuple[pa.Table, np.ndarray]] = []
        self._waiting_bytes = self._waiting_rows = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: pa.Table, key: Int64[np.ndarray, " n"] | int) -> None:
        """Set `rows` aside under their keys, or all under one."""
        self._waiting.append((rows, np.broadcast_to(np.asarray(key, dtype=np.int64), len(rows))))
        self._waiting_bytes += rows.nbytes
        self._waiting_rows += len(rows)
        if self._waiting_bytes >= BUFFER_BYTES or self._waiting_rows >= BUFFER_ROWS:
            self._flush()

    def __iter__(self) -> Iterator[int]:
        """The keys that have rows, ascending."""
        self._flush()
        return iter(sorted(self._places))

    def pieces(self, key: int) -> Iterator[pa.Table]:
        """The rows of one key, in the order in which they were added, a piece at a time."""
        self._flush()
        places = self._places.get(key, array("q"))
        for start, length in zip(places[::2], places[1::2], strict=True):
            self._file.seek(start)
            batch = pa.ipc.read_record_batch(pa.py_buffer(self._file.read(length)), self.schema)
            yield pa.Table.from_batches([batch])

    def read(self, key: int) -> pa.Table:
        """All rows of one key, in the order in which they were added."""
        return pa.concat_tables([self.schema.empty_table(), *self.pieces(key)])

    def column(self, name: str, keys: Sequence[int] | None = None) -> Iterable[np.ndarray]:
        """The values of a column, of some keys or of all, as chunks that can be iterated again and again."""

        def values() -> Iterator[np.ndarray]:
            for key in self if keys is None else keys:
                yield from (piece.column(name).to_numpy() for piece in self.pieces(key))

        return Passes(values)

    def in_row_order(self) -> Iterator[pa.Table]:
        """Everything, sorted by the column `row`, if the keys are the windows of the rows: one window at a time."""
        for key in self:
            table = self.read(key)
            yield _taken(table, np.argsort(table.column("row").to_numpy(), kind="stable"))

    def _flush(self) -> None:
        """Write what waits, one piece a key."""
        if not self._waiting:
            return
        rows = pa.concat_tables([table for table, _ in self._waiting]).cast(self.schema)
        key = np.concatenate([keys for _, keys in self._waiting])
        self._waiting, self._waiting_bytes, self._waiting_rows = [], 0, 0
        if (key != key[:1]).any():
            order = np.argsort(key, kind="stable")
            rows, key = _taken(rows, order), key[order]
        bounds = np.flatnonzero(np.diff(key, prepend=key[:1] - 1, append=key[-1:] + 1)).tolist()
        with storage_errors(self._folder):
            self._file.seek(0, 2)
            for start, end in pairwise(bounds):
                self._write(key[start].item(), rows.slice(start, end - start))

    def _write(self, key: int, rows: pa.Table) -> None:
        for batch in rows.combine_chunks().to_batches(max_chunksize=_PIECE_ROWS):
            message = batch.serialize()
            self._places[key].extend((self._file.tell(), message.size))
            self._file.write(message)


def _taken(rows: pa.Table, order: Int64[np.ndarray, " n"]) -> pa.Table:
    """The rows in another order. Some at a time, because Arrow needs 8 bytes for each value of a list that it takes."""
    rows = rows.combine_chunks()
    starts = range(0, max(1, len(order)), _PIECE_ROWS)
    return pa.concat_tables([rows.take(pa.array(order[start : start + _PIECE_ROWS])) for start in starts])


def window(row: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The window that each row belongs to: the key of a spill that is read in row order."""
    return row // WINDOW_ROWS
