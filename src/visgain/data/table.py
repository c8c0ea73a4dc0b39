"""Tables: parquet and Arrow files, one or many as one dataset, with pictures as bytes, as paths, or as both.

A row is read without its pictures: where the record of another container holds a path, that of a table holds a
`TableImage`, which knows the file and the place and nothing else. Columns of numbers alone (ratings, embeddings) are
not read at all.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL.Image import Image
from tqdm import tqdm

from visgain.data.blocks import Names, TableFile, unpacked
from visgain.data.conversation import printable
from visgain.data.identity import content_hash
from visgain.data.images import decode, require_plausible
from visgain.data.records import KEYS, Columns
from visgain.errors import ConfigError, DataError

Step = int | str
"""On the way from a row to a value inside of it: a position in a list, a name in a struct."""

_INNER = "json"
"""The column that holds a record of its own in a WebDataset that the hub made a table of."""

_OTHER_TURNS = ("conversation", "texts")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")


@dataclass(frozen=True, kw_only=True)
class TableImage:
    """A picture whose bytes stand in a table."""

    table: TableFile
    names: Names  # of the columns that are read together, so that a row's text and pictures come at once
    row: int  # in this file
    steps: tuple[Step, ...]
    path: str  # what the table calls it; may be empty
    max_pixels: int = 100_000_000

    @cached_property
    def key(self) -> str:
        """Hash of the bytes: a copy of the picture in another row has the same, a changed picture another."""
        return hashlib.blake2b(self._buffer(), digest_size=16).hexdigest()

    def hint(self) -> str | None:
        """None: the key says it all."""
        return None

    def open(self) -> Image:
        """Decode as `ImageFile` does. Raises ImageError, and nothing else."""
        return decode(self._shown, self.content, self.max_pixels)

    @property
    def _shown(self) -> str:
        return self.path or ".".join(map(str, self.steps))

    def content(self) -> io.BytesIO:
        """The picture's file as it lies there. Raises ImageError, OSError or what a damaged container makes of it."""
        buffer = self._buffer()
        require_plausible(self._shown, buffer.size, self.max_pixels)
        return io.BytesIO(buffer)

    def _buffer(self) -> pa.Buffer:
        value: Any = self.table.cells(self.names, self.row)
        for step in self.steps:
            value = value[step]
        return value.as_buffer()  # of the block: nothing is copied

    def __repr__(self) -> str:
        return f"image {self.key}"  # part of the fingerprint of a row that cannot be scored


class TableRows:
    """The rows of parquet and Arrow files, in the order of the files. In memory: names of files and counts of rows."""

    def __init__(self, path: Path, files: Sequence[Path], columns: Columns, max_pixels: int) -> None:
        """`path`: what the user named. Raises DataError for what cannot be read, ConfigError for unclear pictures."""
        self.path = path
        self.max_pixels = max_pixels
        self._files = tuple(files)
        with tqdm(files, desc="opening tables", unit="file", delay=1, leave=False) as shown:
            tables = [TableFile.of(file) for file in shown]
            schemas = [table.schema for table in tables]
        self.fields: Collection[str] = sorted({name for schema in schemas for name in _field_names(schema)})
        self.kinds = {frozenset(_field_names(schema)): file for file, schema in zip(files, schemas, strict=True)}
        """The different sets of fields, each with a file that has it."""
        self.columns = _with_pictures(columns, schemas, path)
        """What the user said, and the column of pictures if it has an unusual name."""
        self._names = [_names_to_read(schema, self.columns) for schema in schemas]
        self._tables = _unpacked(tables, self._names)
        self._starts = np.cumsum([0, *map(len, self._tables)], dtype=np.int64)
        if not len(self):
            raise DataError(f"{path} holds no rows: its tables are empty")

    @cached_property
    def fingerprint(self) -> str:
        """See `content_hash`."""
        return content_hash(self._files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        """The row as JSON would have it, with a TableImage for each picture that is there as bytes."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        table, names, place = self._tables[number], self._names[number], row - int(self._starts[number])
        cells = table.cells(names, place)

        def image(path: str, steps: tuple[Step, ...]) -> TableImage:
            return TableImage(table=table, names=names, row=place, steps=steps, path=path, max_pixels=self.max_pixels)

        record = {name: _plain(cells[name], (name,), image) for name in names}
        record = {name: self._mended(name, value) for name, value in record.items()}
        inner = record.get(_INNER)
        return {**inner, **record} if isinstance(inner, dict) else record

    def _mended(self, name: str, value: Any) -> Any:
        """A value of one of the columns whose form differs between tables."""
        if isinstance(value, TableImage) and name not in self._pictures:
            return printable(value._buffer().to_pybytes().decode("utf-8", "backslashreplace"))  # text without its type
        if name in (*_all_names("messages", self.columns), *_OTHER_TURNS):
            return _listed(value)
        return value

    @cached_property
    def _pictures(self) -> tuple[str, ...]:
        return (*_all_names("images", self.columns), *_OTHER_MEDIA)


def _unpacked(tables: Sequence[TableFile], names: Sequence[Names]) -> list[TableFile]:
    """`tables` as they are read, each with its columns."""
    of_names = {found: [table for table, own in zip(tables, names, strict=True) if own == found] for found in names}
    made = {
        table: other
        for found, same in of_names.items()
        for table, other in zip(same, unpacked(same, found), strict=True)
    }
    return [made[table] for table in tables]


# ---------------------------------------------------------------- from cells to a record


def _plain(value: pa.Scalar, steps: tuple[Step, ...], image: Any) -> Any:
    """A cell as JSON would have it, with `image(path, steps)` for bytes."""
    if not value.is_valid:
        return None
    kind = value.type
    if _is_json(kind):
        return _parsed(value.as_py())
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(value.value, steps, image)
    if _is_bytes(kind):
        return image("", steps)
    if not (_holds(kind, _is_bytes) or _holds(kind, _is_json)):
        return _json_like(value.as_py())
    if pa.types.is_struct(kind):
        if "bytes" in kind.names and _is_bytes(kind.field("bytes").type):
            return _picture(value, steps, image)
        return {name: _plain(value[name], (*steps, name), image) for name in kind.names}
    if _is_list(kind):
        return [_plain(each, (*steps, place), image) for place, each in enumerate(value)]
    return _json_like(value.as_py())


def _picture(value: pa.StructScalar, steps: tuple[Step, ...], image: Any) -> Any:
    """The form of Hugging Face: bytes, with or without a name, or else a path."""
    path = value["path"].as_py() if "path" in value.type.names else None
    if value["bytes"].is_valid:
        return image(path if isinstance(path, str) else "", (*steps, "bytes"))
    return path


def _json_like(value: Any) -> Any:
    """Dates, decimals and the like as text."""
    if isinstance(value, dict):
        return {str(name): _json_like(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_like(each) for each in value]
    return value if isinstance(value, str | bool | int | float | None) else str(value)


def _parsed(text: Any) -> Any:
    """What a text of JSON says; the text itself if it is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text


def _listed(value: Any) -> Any:
    """Turns that stand as JSON in a text, or as one list for each of their fields, as a list of turns."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return _parsed(value)
    if isinstance(value, dict) and value and all(isinstance(each, list) for each in value.values()):
        return [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    return value


# ---------------------------------------------------------------- which columns


def _with_pictures(columns: Columns, schemas: Sequence[pa.Schema], path: Path) -> Columns:
    """`columns` with the column of pictures, where it has none of the usual names but is the only one."""
    fields = {name for schema in schemas for name in schema.names}
    if columns.name("images", fields) is not None or "images" in columns.names:
        return columns
    found = sorted({each.name for schema in schemas for each in schema if _is_picture(each.type)} - {*_OTHER_MEDIA})
    known = [name for name in found if name not in _all_known(columns)]
    if len(known) > 1:
        raise ConfigError(
            f"{path} holds pictures in {', '.join(known)}; say in which, e.g. --columns images={known[0]}"
        )
    return replace(columns, names={**columns.names, "images": known[0]}) if known else columns


def _field_names(schema: pa.Schema) -> list[str]:
    """The names of the columns, and of what is in the inner record."""
    index = schema.get_field_index(_INNER)
    kind = None if index < 0 else schema.field(index).type
    return [*schema.names, *(kind.names if kind is not None and pa.types.is_struct(kind) else [])]


def _names_to_read(schema: pa.Schema, columns: Columns) -> Names:
    """The columns that can be part of a sample: text, the id, and the pictures."""
    pictures = {*_all_names("images", columns), *_OTHER_MEDIA}
    known = {*_all_known(columns), *_all_names("id", columns)}
    return tuple(
        each.name
        for each in schema
        if each.name in pictures or (each.name in known) or (_holds(each.type, _is_text) and not _is_picture(each.type))
    )


def _all_names(key: str, columns: Columns) -> tuple[str, ...]:
    return (columns.names[key],) if key in columns.names else KEYS[key]


def _all_known(columns: Columns) -> set[str]:
    """The names of fields that mean something, other than pictures."""
    return {name for key in KEYS if key != "images" for name in _all_names(key, columns)}


def _is_picture(kind: pa.DataType) -> bool:
    """Whether values are bytes, the form of Hugging Face, or lists of either."""
    if _is_list(kind):
        return _is_picture(kind.value_type)
    return _is_bytes(kind) or (
        pa.types.is_struct(kind) and "bytes" in kind.names and _is_bytes(kind.field("bytes").type)
    )


def _holds(kind: pa.DataType, wanted: Any) -> bool:
    """Whether `wanted` is true of the type or of one inside of it."""
    inner: Iterable[pa.DataType] = ()
    if isinstance(kind, pa.BaseExtensionType):
        inner = (kind.storage_type,)
    elif _is_list(kind) or pa.types.is_dictionary(kind):
        inner = (kind.value_type,)
    elif pa.types.is_struct(kind):
        inner = (kind.field(number).type for number in range(kind.num_fields))
    return bool(wanted(kind)) or any(_holds(each, wanted) for each in inner)


def _is_json(kind: pa.DataType) -> bool:
    """Whether values are texts of JSON and say so, as `datasets` writes values of mixed types."""
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json"


def _is_list(kind: pa.DataType) -> bool:
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in checks)


def _is_bytes(kind: pa.DataType) -> bool:
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _is_text(kind: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(check(kind) for check in checks)
