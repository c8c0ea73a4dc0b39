"""Where the rows of a text file begin: found by one pass over the file, kept, and mapped by whoever opens it again.

The pass also finds out the file's hash and the names of its fields, so that opening a file for the second time reads
nothing of it. A file is known again by its path, size and time of change (`cache.derived`). What is kept is a numpy
file with the positions, behind which stands the rest as JSON, with a hash that tells damage.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from visgain.data.cache import derived
from visgain.errors import DataError

KEPT_BYTES = 1 << 20
"""Files below this size are read anew: that takes milliseconds."""

SETTLED_SECONDS = 2.0
"""A file that changed more recently may change again without its time of change showing it."""

MAX_FIELDS = 4096
"""More different names than this are no fields of a table; the first ones suffice to say so."""

_PIECE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class RowIndex:
    """Row k lies in the bytes from `starts[k]` to `starts[k + 1]` of the file, with what separates it from the next."""

    starts: Int64[np.ndarray, " n"]  # n = rows + 1
    fields: frozenset[str]
    fingerprint: str

    @classmethod
    def of(cls, starts: array[int], size: int, fields: Iterable[str], fingerprint: str) -> RowIndex:
        starts.append(size)
        return cls(starts=np.frombuffer(starts, np.int64), fields=frozenset(fields), fingerprint=fingerprint)


def row_index(path: Path, kind: str, build: Callable[[Path], RowIndex]) -> RowIndex:
    """What `build` finds out about the file, from the cache if it is there. `kind` names the format and its version.

    Where the cache cannot be written, the index is in memory, and made again by the next process.
    """
    status = path.stat()
    if status.st_size < KEPT_BYTES or abs(time.time() - status.st_mtime) < SETTLED_SECONDS:
        return build(path)
    built: list[RowIndex] = []  # so that a cache that fails costs no second pass
    faults: list[DataError] = []  # of the file, not of the cache

    def write(target: Path) -> None:
        try:
            built.append(build(path))
        except DataError as fault:
            faults.append(fault)
            raise
        _write(target, built[0])

    try:
        kept = derived(kind, [path], write)
        if (index := _read(kept, status.st_size)) is None:
            kept.unlink(missing_ok=True)
            index = _read(derived(kind, [path], write), status.st_size)
    except (DataError, OSError, NotImplementedError):  # the last where the file system knows no locks
        if faults:
            raise faults[0] from None
        index = None
    return index or (built[0] if built else build(path))


def _write(target: Path, index: RowIndex) -> None:
    rest = {"fields": sorted(index.fields), "fingerprint": index.fingerprint, "hash": _hash(index.starts)}
    with target.open("wb") as file:
        np.save(file, index.starts, allow_pickle=False)
        file.write(json.dumps(rest).encode())


def _read(path: Path, size: int) -> RowIndex | None:
    """The index in `path`, its positions mapped; None if it is damaged."""
    with suppress(OSError, EOFError, ValueError, KeyError, TypeError):
        starts = np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(starts.offset + starts.nbytes)
            rest = json.loads(file.read())
        if starts.dtype == np.int64 and starts[-1] == size and rest["hash"] == _hash(starts):
            return RowIndex(starts=starts, fields=frozenset(rest["fields"]), fingerprint=rest["fingerprint"])
    return None


def _hash(starts: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(starts).data, digest_size=16).hexdigest()


# ---------------------------------------------------------------- reading files


class Pieces:
    """A UTF-8 file in pieces of text with a character for each byte (Latin-1), hashed on the way.

    What separates values in JSON and CSV is ASCII, which no other character of UTF-8 contains: positions in the text
    are positions in the file, and no copy in another width is made. Raises DataError where the file is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.blake2b(digest_size=16)
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._read = 0

    @property
    def fingerprint(self) -> str:
        """Hash of what was read so far in hexadecimal; of the whole file the same as `storage.file_hash`."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                with tqdm(total=size, desc="indexing", unit="B", unit_scale=True, delay=2, leave=False) as progress:
                    while piece := file.read(_PIECE):
                        self._check(piece)
                        yield piece.decode("latin-1")
                        progress.update(len(piece))
        except OSError as error:
            raise DataError(f"cannot read dataset {self.path}: {error}") from error
        self._check(b"")

    def _check(self, piece: bytes) -> None:
        pending = len(self._utf8.getstate()[0])
        try:
            self._utf8.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            position = self._read - pending + error.start
            raise DataError(f"{self.path} is not UTF-8 text (byte {position}); convert it, e.g. with iconv") from None
        self._digest.update(piece)
        self._read += len(piece)


_CONTINUED = bytes(range(0x80, 0xC0))
"""What follows the first byte of a character in UTF-8."""


def place(path: Path, position: int) -> str:
    """`line 2, column 5 (byte 31)` for a position in bytes, columns counted in characters."""
    line, column, left = 1, 1, position
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(_PIECE, left))):
            left -= len(piece)
            before, newline, after = piece.rpartition(b"\n")
            line, column = (line + before.count(b"\n") + 1, 1) if newline else (line, column)
            column += len(after.removeprefix(codecs.BOM_UTF8).translate(None, _CONTINUED))
    return f"line {line}, column {column} (byte {position})"


class IndexedFile:
    """The bytes of each row of a file that has an index; picklable, the positions not copied but mapped again.

    Rows are read, not mapped: a mapped file that is cut short meanwhile would kill the process. Processes share what
    the system keeps of the file all the same.
    """

    def __init__(self, path: Path, kind: str, build: Callable[[Path], RowIndex]) -> None:
        self.path = path
        self._made = (kind, build)
        self._open(None)

    def _open(self, index: RowIndex | None) -> None:
        try:
            self._file = os.open(self.path, os.O_RDONLY)
            self._closing = weakref.finalize(self, os.close, self._file)
            self._state = _state(os.fstat(self._file))
            self.index = index or row_index(self.path, *self._made)
            now = _state(self.path.stat())
        except OSError as error:
            raise DataError(f"cannot read dataset {self.path}: {error}") from error
        if now != self._state:
            raise DataError(f"{self.path} changed while it was read; open it again when it is written")

    def __len__(self) -> int:
        return len(self.index.starts) - 1

    def __getitem__(self, row: int, /) -> bytes:
        start, stop = self.index.starts[row : row + 2].tolist()
        content = os.pread(self._file, stop - start, start)
        if len(content) != stop - start:
            raise self.changed()
        return content

    def changed(self) -> DataError:
        """What to raise when a row is not what the index says."""
        return DataError(f"{self.path} changed since it was opened; start again")

    def __getstate__(self) -> dict[str, Any]:
        is_mapped = isinstance(self.index.starts, np.memmap)
        return {
            "path": self.path,
            "made": self._made,
            "state": self._state,
            "index": None if is_mapped else self.index,
        }

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.path, self._made = kept["path"], kept["made"]
        self._open(kept["index"])
        if self._state != kept["state"]:
            raise self.changed()


class IndexedRows:
    """What the rows of any indexed text file have in common; a subclass says what the bytes of a row mean."""

    def __init__(self, path: Path, kind: str, build: Callable[[Path], RowIndex]) -> None:
        self._file = IndexedFile(path, kind, build)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def fields(self) -> frozenset[str]:
        return self._file.index.fields

    @property
    def fingerprint(self) -> str:
        return self._file.index.fingerprint

    def __len__(self) -> int:
        return len(self._file)


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
