"""Rows in CSV: a header with the names of the fields, then a row a line, or more where cells hold line breaks.

Cells are texts, whatever they look like. Those of fields that hold several things (messages, images, history) may hold
JSON. An empty cell is no value.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visgain.data.index import IndexedRows, Pieces, RowIndex
from visgain.data.llamafactory import columns_beside
from visgain.data.records import KEYS, Columns, RecordDataset
from visgain.errors import DataError

KIND = "csv-1"
"""Name and version of the index."""

_BOM = codecs.BOM_UTF8.decode("latin-1")
_SUFFIXES = (".csv", ".tsv")
_LISTS = ("messages", "images", "history")


class CsvRows(IndexedRows):
    """The rows of one CSV file as objects, the header's names with the cells' texts."""

    def __init__(self, path: Path, columns: Columns) -> None:
        super().__init__(path, KIND, build_index)
        self._delimiter, self._names = _header(path)
        self._lists = {name for key in _LISTS for name in (columns.names.get(key), *KEYS[key]) if name}

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        lines = io.StringIO(self._file[row].decode("utf-8"), newline="")
        cells = next(csv.reader(lines, delimiter=self._delimiter, strict=True), [])
        if len(cells) != len(self._names):
            raise self._file.changed()
        return {name: self._value(name, cell) for name, cell in zip(self._names, cells, strict=True)}

    def _value(self, name: str, cell: str) -> Any:
        if name in self._lists and cell.lstrip().startswith(("[", "{")):
            try:
                return json.loads(cell)
            except (ValueError, RecursionError):
                return cell  # a name may begin like that
        return cell or None


class CsvFormat:
    """Files whose name ends in .csv or .tsv; the content alone could be any text."""

    def recognises(self, path: Path, head: bytes) -> bool:
        return path.suffix.lower() in _SUFFIXES and len(head) > 0 and b"\0" not in head

    def __call__(
        self,
        path: Path,
        image_root: Path | None,
        *,
        max_pixels: int,
        follow_links: bool,
        columns: Columns,
        layout: str | None,
    ) -> RecordDataset:
        return RecordDataset(
            CsvRows(path, columns),
            path.parent if image_root is None else image_root,
            layout=layout,
            columns=columns or columns_beside(path),
            max_pixels=max_pixels,
            follow_links=follow_links,
        )


CSV = CsvFormat()


# ---------------------------------------------------------------- finding the rows


def build_index(path: Path) -> RowIndex:
    """Read the whole file. Raises DataError that says where it is malformed, or if it holds no rows."""
    pieces = Pieces(path)
    lines = _Lines(pieces)
    delimiter, names = _header(path)
    starts, number = array("q"), 0
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start, number = lines.position, reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path} is not valid CSV: {error} in the row from line {number} on; mend it there"
            ) from None
        if cells is None:
            break
        if not cells:
            continue
        if len(cells) != len(names):
            raise DataError(f"line {number} of {path} has {len(cells)} cells, its header {len(names)}; mend it there")
        starts.append(start)
    del starts[0]  # the header
    if not starts:
        raise DataError(f"{path} holds no rows: there is only a header")
    return RowIndex.of(starts, lines.position, names, pieces.fingerprint)


class _Lines:
    """The lines of the file, with the position behind the last one that was taken."""

    def __init__(self, pieces: Pieces) -> None:
        self.position = 0
        self._lines = self._split(iter(pieces))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        begins = self.position == 0
        self.position += len(line)
        return line.removeprefix(_BOM) if begins else line

    @staticmethod
    def _split(pieces: Iterator[str]) -> Iterator[str]:
        rest = ""
        for piece in pieces:
            lines = io.StringIO(rest + piece, newline="\n").readlines()
            rest = lines.pop()
            yield from lines
        if rest:
            yield rest


def _header(path: Path) -> tuple[str, list[str]]:
    """What separates cells, and the names in the first line. Raises DataError if a name comes twice."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            first = next((line for line in file if line.strip()), "")
            delimiter = max(",\t;", key=first.count)
            file.seek(0)
            names = next(filter(None, csv.reader(file, delimiter=delimiter, strict=True)), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"the header of {path} is not valid CSV: {error}") from None
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"the header of {path} has the name {twice!r} more than once; rename one")
    return delimiter, names
