"""A set of rows of a dataset, one bit a row: 12 MB for a hundred million rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int64

_BLOCK_BYTES = 1 << 17


class RowSet:
    """Rows from 0 to `n_rows` - 1, of which any may be in the set; other rows never are."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self._bits = np.zeros(-(-n_rows // 8), np.uint8)
        self._count = 0

    def add(self, row: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " twice"]:
        """Put rows in, all of them from 0 to n_rows - 1. Returns those that were in, or that come more than once."""
        had = self.holds(row)
        new, times = np.unique(row[~had], return_counts=True)
        np.bitwise_or.at(self._bits, new >> 3, _bit(new))
        self._count += len(new)
        return np.unique(np.concatenate([row[had], new[times > 1]]))

    def __len__(self) -> int:
        return self._count

    def holds(self, row: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which rows are in the set."""
        inside = (row >= 0) & (row < self.n_rows)
        row = np.where(inside, row, 0)
        return np.asarray(inside & (self._bits[row >> 3] & _bit(row) > 0)) if self.n_rows else inside

    def __iter__(self) -> Iterator[Int64[np.ndarray, " _"]]:
        """The rows of the set, ascending, in blocks."""
        return self.without(RowSet(self.n_rows))

    def without(self, other: RowSet) -> Iterator[Int64[np.ndarray, " _"]]:
        """The rows that are in this set and not in the other one of as many rows, ascending, in blocks."""
        for start in range(0, len(self._bits), _BLOCK_BYTES):
            block = slice(start, start + _BLOCK_BYTES)
            bits = np.unpackbits(self._bits[block] & ~other._bits[block], bitorder="little")
            yield 8 * start + np.flatnonzero(bits)


def _bit(row: Int64[np.ndarray, " n"]) -> np.ndarray:
    return np.asarray(np.left_shift(1, row & 7), dtype=np.uint8)
