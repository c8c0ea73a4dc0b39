"""masks.safetensors: which tokens of the kept rows carry loss, for shims that have torch and the standard library.

The layout is that of safetensors (8 bytes: length of the header; the header: JSON; the values, little endian), so any
language can read it and a trainer's loader processes can map it: a row is found without reading another. Columns are
written side by side while the rows go by, so memory does not grow with them. docs/schema.md is the description.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from visgain.errors import StorageError
from visgain.export.rows import KeptRow, Selected
from visgain.storage import atomic_path

MASKS = "masks.safetensors"
"""Its name in every export."""

_TYPES = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "BOOL": np.bool_}
_BUFFER_ROWS = 1 << 12


class MaskWriter:
    """Takes the kept rows in order; made by `open_masks`."""

    def __init__(self, file: BinaryIO, selected: Selected, columns: Iterable[str]) -> None:
        self._file = file
        self._n_rows, self._n_tokens = selected.n_rows, selected.n_tokens
        self._columns = tuple(columns)
        self._rows: list[tuple[KeptRow, Mapping[str, int]]] = []
        self._done = self._done_tokens = 0
        # Wide values first, so that every column begins at a multiple of its width.
        shapes = {"row": ("I64", self._n_rows), "first": ("I64", self._n_rows + 1)}
        shapes |= dict.fromkeys(self._columns, ("I64", self._n_rows))
        shapes |= {"token_id": ("I32", self._n_tokens)} | ({"weight": ("F32", self._n_tokens)} if selected.soft else {})
        shapes |= {"keep": ("BOOL", self._n_tokens)}
        self._starts = self._write_header(shapes, selected)

    def add(self, kept: KeptRow, **values: int) -> None:
        """The next row, with a whole number (64 bits, signed) for each further column."""
        self._rows.append((kept, values))
        if len(self._rows) == _BUFFER_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._rows:
            return
        rows = [kept for kept, _ in self._rows]
        length = np.array([len(kept.token_id) for kept in rows], np.int64)
        self._put("row", np.array([kept.row for kept in rows], np.int64), self._done)
        self._put("first", self._done_tokens + np.cumsum(length) - length, self._done)
        for name in self._columns:
            self._put(name, np.array([values[name] for _, values in self._rows], np.int64), self._done)
        for name in {"token_id", "weight", "keep"} & set(self._starts):
            values = np.concatenate([getattr(kept, name) for kept in rows])
            self._put(name, values, self._done_tokens)
        self._done, self._done_tokens = self._done + len(rows), self._done_tokens + int(length.sum())
        self._rows = []

    def close(self) -> None:
        """Write the rest. Raises StorageError if rows are missing: whoever reads must not take a part for the whole."""
        self.flush()
        if (self._done, self._done_tokens) != (self._n_rows, self._n_tokens):
            raise StorageError(f"{self._done} of {self._n_rows} kept rows were written; export again")
        self._put("first", np.array([self._n_tokens], np.int64), self._n_rows)

    def _put(self, name: str, values: np.ndarray, at: int) -> None:
        start, kind = self._starts[name]
        values = np.ascontiguousarray(values, np.dtype(kind).newbyteorder("<"))
        self._file.seek(start + at * values.itemsize)
        self._file.write(values.data)

    def _write_header(self, shapes: Mapping[str, tuple[str, int]], selected: Selected) -> dict[str, tuple[int, type]]:
        """Returns where each column begins in the file, and its type."""
        header: dict[str, object] = {"__metadata__": _metadata(selected)}
        offset, starts = 0, {}
        for name, (kind, size) in shapes.items():
            end = offset + size * np.dtype(_TYPES[kind]).itemsize
            header[name] = {"dtype": kind, "shape": [size], "data_offsets": [offset, end]}
            starts[name], offset = (offset, _TYPES[kind]), end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)
        return {name: (8 + len(text) + start, kind) for name, (start, kind) in starts.items()}


def _metadata(selected: Selected) -> dict[str, str]:
    """What a shim's messages need to say what was scored; safetensors has texts here alone."""
    identity = selected.identity
    known = {name: identity.get(name) for name in ("model", "template", "max_length", "end_of_turn")}
    return {
        "format": "visgain-masks-1",
        "weights": str(selected.record.get("weights", "soft" if selected.soft else "hard")),
        "rule": str(selected.record.get("rule", "")),
        **{name: str(value) for name, value in known.items() if value is not None},
    }


@contextmanager
def open_masks(out: Path, selected: Selected, columns: Iterable[str] = ()) -> Iterator[MaskWriter]:
    """A writer of `out`/masks.safetensors, there when all rows were added. `columns`: further numbers of a row."""
    with atomic_path(out / MASKS) as temporary, temporary.open("wb") as file:
        masks = MaskWriter(file, selected, columns)
        yield masks
        masks.close()


def write_masks(out: Path, selected: Selected) -> None:
    """masks.safetensors alone, for exporters that write nothing else of the rows."""
    with open_masks(out, selected) as masks:
        for kept in selected:
            masks.add(kept)
