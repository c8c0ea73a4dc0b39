"""Rows in JSON: one list of them, or one a line, in one file or in all files of a folder.

A file is parsed once, in pieces, to see that it is sound and where its rows begin; then each row when it is asked for.
A row that is itself a list of turns is taken for its `messages`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visgain.data.index import MAX_FIELDS, IndexedRows, Pieces, RowIndex, place
from visgain.data.llamafactory import columns_beside
from visgain.data.parts import base_of, choose, find_parts, whole
from visgain.data.records import Columns, RecordDataset, find_layout
from visgain.errors import DataError

KIND = "json-1"
"""Name and version of the index."""

_BOM = codecs.BOM_UTF8.decode("latin-1")
_SPACE = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode
_SUFFIXES = (".json", ".jsonl", ".ndjson")
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_MAX_OBJECT = 64 << 20
_CUT_NEAR = 16
"""An error so near to the end of a piece may only mean that the rest is in the next: no literal or escape is longer."""


class JsonRows(IndexedRows):
    """The rows of one JSON file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND, build_index)

    def __getitem__(self, row: int, /) -> Any:
        record, _ = self._decoded(row)
        return {"messages": record} if _is_talk(record) else record

    def text(self, row: int) -> str:
        """The row as it is written in the file, to the letter: JSON."""
        return self._decoded(row)[1]

    def _decoded(self, row: int) -> tuple[Any, str]:
        """What the row holds, and how it is written."""
        try:
            text = self._file[row].decode("utf-8")
            record, end = _decode(text)
        except (ValueError, RecursionError) as error:
            raise self._file.changed() from error
        return record, text[:end]


class JoinedRows:
    """The rows of several files as one, in the order of the files."""

    def __init__(self, path: Path, parts: Sequence[JsonRows]) -> None:
        self.path = path
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)

    @property
    def fields(self) -> frozenset[str]:
        return frozenset[str]().union(*(part.fields for part in self._parts))

    @property
    def fingerprint(self) -> str:
        hashes = "\0".join(part.fingerprint for part in self._parts)
        return hashlib.blake2b(hashes.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int, /) -> Any:
        part, row = self._place(row)
        return part[row]

    def text(self, row: int) -> str:
        """The row as it is written in its file, to the letter: JSON."""
        part, row = self._place(row)
        return part.text(row)

    def _place(self, row: int) -> tuple[JsonRows, int]:
        """The file, and the row's number in it."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._parts[part], row - int(self._starts[part])


def find_files(path: Path) -> list[Path]:
    """The JSON files that `path` stands for: of a folder those directly in it, else see `find_parts`.

    Raises DataError if the folder holds several datasets, as told by the names.
    """
    if not path.is_dir():
        return find_parts(path, _SUFFIXES)
    names = [each.name for each in path.iterdir() if each.suffix in _SUFFIXES and each.is_file()]
    names = [name for name in names if not name.startswith(".") and name not in _NO_ROWS]
    return [path / name for name in choose(names, "", str(path))] if names else []


class JsonFormat:
    """JSON files, and folders of them."""

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether the content begins like a JSON list or object; names lie too often to be asked.

        For folders and patterns, whether files with fitting names are there.
        """
        return head.startswith((b"[", b"{")) if head else bool(find_files(path))

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
        base, files = base_of(path), [path] if path.is_file() else find_files(path)
        if not files:
            raise DataError(f"{path} holds no JSON files ({', '.join(_SUFFIXES)})")
        parts = [JsonRows(file) for file in files]
        _require_one_layout(parts, columns, layout)
        return RecordDataset(
            parts[0] if path.is_file() else JoinedRows(whole(path), parts),
            (base.parent if base.is_file() else base) if image_root is None else image_root,
            layout=layout,
            columns=columns or columns_beside(path),
            max_pixels=max_pixels,
            follow_links=follow_links,
            name=base.stem,
        )


def _require_one_layout(parts: Sequence[JsonRows], columns: Columns, layout: str | None) -> None:
    """Raises DataError for files that do not belong together: one would be read as what the other is."""
    if layout is None and not columns and len(parts) > 1:
        layouts = [find_layout(part.fields, columns, part.path) for part in parts]
        other = next((part for part, found in zip(parts, layouts, strict=True) if found != layouts[0]), None)
        if other is not None:
            raise DataError(
                f"{parts[0].path} and {other.path.name} hold rows of different layouts; "
                "let --data name one of the files"
            )


JSON = JsonFormat()


# ---------------------------------------------------------------- finding the rows


def build_index(path: Path) -> RowIndex:
    """Parse the whole file. Raises DataError that says where it is malformed, or if it holds no rows."""
    if _Window(path).sign() != "[":
        return _index(path, _rows_of_lines)
    try:
        return _index(path, _rows_of_list)
    except _ListsInLines:
        return _index(path, _rows_of_lines)


def _index(path: Path, find_rows: Callable[[_Window], Iterator[tuple[int, Any]]]) -> RowIndex:
    window = _Window(path)
    starts, fields = array("q"), set[str]()
    for start, row in find_rows(window):
        starts.append(start)
        if isinstance(row, dict):
            if len(fields) < MAX_FIELDS:
                fields.update(row)
        elif _is_talk(row):
            fields.add("messages")
    if not starts:
        raise DataError(f"{path} holds no rows: its list is empty")
    if find_rows is _rows_of_lines and len(starts) == 1 and path.suffix == ".json":
        raise _single_object(path)
    return RowIndex.of(starts, window.position, fields, window.fingerprint)


def _is_talk(row: Any) -> bool:
    return (
        isinstance(row, list) and len(row) > 0 and isinstance(row[0], dict) and ("role" in row[0] or "from" in row[0])
    )


class _ListsInLines(Exception):
    """The file begins with a list, and goes on behind it with another."""


def _rows_of_list(window: _Window) -> Iterator[tuple[int, Any]]:
    """Position in bytes and content of each element of the list that the file is."""
    sign = window.sign()  # the bracket
    while sign != "]":
        window.at += 1
        if window.sign() == "]" and sign == "[":
            break
        yield window.position, window.value()
        if (sign := window.sign()) not in (",", "]"):
            raise window.wrong("Expecting ',' delimiter", window.at)
    window.at += 1
    if sign := window.sign():
        raise _ListsInLines if sign == "[" else window.wrong("Extra data", window.at)


def _rows_of_lines(window: _Window) -> Iterator[tuple[int, Any]]:
    """Position in bytes and content of each line that is not blank."""
    n_rows = 0
    while (end := window.line_end()) is not None:
        text, start = window.text, _skip_space(window.text, window.at)
        if start < end:
            try:
                row, stop = _decode(text, start)
            except (ValueError, RecursionError):
                stop = end + 1
            if stop > end or _skip_space(text, stop) < end:
                if not n_rows and _is_one_value(window.path):
                    raise _single_object(window.path)
                raise window.wrong_line(start, end)
            window.at, n_rows = start, n_rows + 1
            yield window.position, row
        window.at = min(end + 1, len(text))


class _Window:
    """A piece of the file around `at`, the place that is read: it moves on, and grows for rows that are larger."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces = Pieces(path)
        self._coming = iter(self._pieces)
        self._begin = 0  # where in the file the text begins
        self.text = next(self._coming, "")
        self.at = 3 if self.text.startswith(_BOM) else 0
        self._is_last = False

    @property
    def position(self) -> int:
        return self._begin + self.at

    @property
    def fingerprint(self) -> str:
        return self._pieces.fingerprint

    def sign(self) -> str:
        """The next character that is no white space, where `at` is then; empty at the end of the file."""
        self.at = _skip_space(self.text, self.at)
        while self.at == len(self.text) and self._grow():
            self.at = _skip_space(self.text, self.at)
        return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The JSON value that begins at `at`, which is moved behind it. Raises DataError."""
        while True:
            try:
                value, end = _decode(self.text, self.at)
                if end <= len(self.text) - _CUT_NEAR or not self._grow():  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                near_end = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _CUT_NEAR
                if not (near_end and self._grow()):
                    raise self.wrong(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # e.g. a number of more than 4,300 digits
                raise self.wrong(_reason(error), self.at) from None

    def line_end(self) -> int | None:
        """Where the line that begins at `at` ends; None at the end of the file."""
        while (end := self.text.find("\n", self.at)) < 0:
            if not self._grow():
                return len(self.text) if self.at < len(self.text) else None
        return end

    def wrong_line(self, start: int, end: int) -> DataError:
        """Why the text from `start` to `end` is no JSON value."""
        line = self.text[start:end]
        try:
            _, stop = _decode(line)
        except json.JSONDecodeError as error:
            return self.wrong(error.msg, start + error.pos, of=end)
        except (ValueError, RecursionError) as error:
            return self.wrong(_reason(error), start)
        return self.wrong("Extra data", start + _skip_space(line, stop))

    def wrong(self, message: str, at: int, of: int | None = None) -> DataError:
        """The error for what is wrong at `at`. `of`: where the text ends that should be sound [default: here]."""
        end = len(self.text) if of is None else of
        is_cut = message.startswith("Unterminated string") or _skip_space(self.text, at) >= end
        remedy = "the end is missing, so copy or download the file again" if is_cut else "mend the file there"
        return DataError(f"{self.path} is not valid JSON: {message} at {place(self.path, self._begin + at)}; {remedy}")

    def _grow(self) -> bool:
        """Let go of what was read, and read on, as much again as is left. False at the end of the file."""
        kept = [self.text[self.at :]]
        length = wanted = len(kept[0])
        while length <= wanted and (piece := next(self._coming, "")):
            kept.append(piece)
            length += len(piece)
        if len(kept) == 1:
            return False
        self._begin += self.at
        self.text, self.at = "".join(kept), 0
        return True


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _is_one_value(path: Path) -> bool:
    """Whether the file is one JSON value, as far as it is small enough to be tried."""
    if path.stat().st_size > _MAX_OBJECT:
        return False
    try:
        json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _single_object(path: Path) -> DataError:
    return DataError(
        f"{path} holds one JSON object, not a list of rows; write the rows as one list [...], "
        "or one row a line in a .jsonl file"
    )
