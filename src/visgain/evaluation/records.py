"""Reading the files that benchmarks come in: JSON, JSON lines, tables with tabs or commas, parquet.

A row becomes a `Record`, whose fields are asked for by name and type; whatever is missing or of another type is one
message with the file, the row, the field and the value seen.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from visgain.data.blocks import TableFile, unpacked
from visgain.data.images import ImageFile
from visgain.data.table import TableImage
from visgain.errors import DataError
from visgain.evaluation.benchmark import Question
from visgain.registry import suggest
from visgain.types import ImageRef

TABLES = {".tsv": "\t", ".csv": ","}
_MAX_CELL = 1 << 28  # characters; pictures stand in tables as base64
_SHOWN = 80
_MISSING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One row of a file, and where it stands, for messages."""

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """The string in field `name`. Raises DataError."""
        value = self._value(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(name, "valid Unicode; it has half of a surrogate pair") from None
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The list of strings in field `name`. Raises DataError."""
        value = self._value(name)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.wrong(name, "a list of strings")
        return tuple(value)

    def id(self, name: str) -> str:
        """The identifier in field `name`, a string or a whole number, as text. Raises DataError."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.wrong(name, "a string or a whole number")
        return str(value)

    def one_of(self, name: str, known: Sequence[str]) -> str:
        """The string in field `name`, which must be in `known`. Raises DataError."""
        value = self.text(name)
        if value not in known:
            raise self.wrong(name, f"one of {', '.join(known)}")
        return value

    def image(self, name: str, root: Path) -> ImageRef:
        """The picture in field `name`: in the cell itself, or a path relative to `root`. Raises DataError."""
        value = self._value(name)
        if isinstance(value, str) and value:
            return ImageFile(root=root, path=value)
        if not isinstance(value, ImageRef):
            raise self.wrong(name, "a picture or the name of one")
        return value

    def has(self, name: str) -> bool:
        """Whether field `name` is there and holds something."""
        return self.fields.get(name) not in (None, "")

    def _value(self, name: str) -> Any:
        value = self.fields.get(name, _MISSING)
        if value is _MISSING:
            raise DataError(f"{self.where} has no {name!r}; it has {', '.join(map(str, self.fields)) or 'nothing'}")
        return value

    def wrong(self, name: str, wanted: str) -> DataError:
        """The error that field `name` does not hold what is `wanted`."""
        return DataError(f"{self.where}: {name!r} is {_shown(self.fields.get(name))}, not {wanted}")


def read_records(path: Path, *, inside: str | None = None) -> list[Record]:
    """The rows of a JSON, JSONL, TSV, CSV or parquet file, in their order. Raises DataError.

    JSON files may hold a list, or one object a line whatever their name says, as many benchmarks do.
    inside: the key of the list, in JSON files that hold one object with a list in it.
    Pictures in parquet files become `TableImage`s, which are not read before they are opened.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if suffix in TABLES:
        return _table(path, text, TABLES[suffix])
    try:
        whole = _loaded(text)
    except ValueError as error:
        return _lines(path, text, error)
    if isinstance(whole, dict) and suffix == ".jsonl":
        return _lines(path, text, ValueError())  # one line, called so in messages
    if isinstance(whole, dict) and inside is not None and isinstance(whole.get(inside), list):
        whole = whole[inside]
    rows = whole if isinstance(whole, list) else [whole]
    return [_record(f"entry {n} of {path}", row) for n, row in enumerate(rows, start=1)]


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises DataError."""
    try:
        return _loaded(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises DataError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def unique(questions: Sequence[Question], data: Path) -> list[Question]:
    """`questions`, of which there is at least one and no two have the same key. Raises DataError."""
    twice = [key for key, n in Counter(question.key for question in questions).items() if n > 1]
    if twice:
        names = ", ".join("/".join(part for part in key if part) for key in twice[:10])
        raise DataError(f"{data} has {len(twice)} ids more than once: {names}{', ...' if len(twice) > 10 else ''}")
    if not questions:
        raise DataError(f"{data} holds no questions")
    return list(questions)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _lines(path: Path, text: str, error: ValueError) -> list[Record]:
    """One object a line. `error`: why the text is not JSON; told if the first line is none either."""
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(f"line {number} of {path}", _loaded(line)))
        except ValueError as problem:
            if not records:
                raise DataError(f"{path} is neither valid JSON ({error}) nor one JSON object a line") from None
            raise DataError(f"line {number} of {path} is not valid JSON: {problem}") from None
    return records


def _record(where: str, row: Any) -> Record:
    if not isinstance(row, dict):
        raise DataError(f"{where} is {_shown(row)}, not a JSON object")
    return Record(where=where, fields=row)


def _table(path: Path, text: str, delimiter: str) -> list[Record]:
    """Rows of a table with a header, every cell a string as it stands."""
    before = csv.field_size_limit(_MAX_CELL)  # csv has one limit for the whole process
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"cannot read the table {path}: {error}") from error
    finally:
        csv.field_size_limit(before)
    header, *body = rows or [[]]
    if twice := [name for name, n in Counter(header).items() if n > 1]:
        raise DataError(f"the table {path} has more than one column called {twice[0]!r}")
    records = []
    for number, row in enumerate(body, start=1):
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(f"row {number} of {path} has {len(row)} cells; the header names {len(header)} columns")
        records.append(Record(where=f"row {number} of {path}", fields=dict(zip(header, row, strict=True))))
    return records


def _parquet(path: Path) -> list[Record]:
    file = TableFile.of(path)
    pictures = {name: steps for field in file.schema for name, steps in [(field.name, _bytes_in(field))] if steps}
    others = [name for name in file.schema.names if name not in pictures]
    try:
        rows = pq.read_table(path, columns=others).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read the table {path}: {error}") from error
    count = len(file) if pictures else len(rows)
    tables = {name: unpacked([file], (name,))[0] for name in pictures}

    empty = {name: _without_bytes(path, steps) for name, steps in pictures.items()}

    def fields(row: int) -> dict[str, Any]:
        images = {
            name: TableImage(table=tables[name], names=(name,), row=row, steps=steps, path=f"{name} of row {row + 1}")
            for name, steps in pictures.items()
        }
        return {
            **(rows[row] if rows else {}),
            **images,
            **{name: paths[row] for name, paths in empty.items() if row in paths},
        }

    return [Record(where=f"row {row + 1} of {path}", fields=fields(row)) for row in range(count)]


def _without_bytes(path: Path, steps: tuple[str, ...]) -> dict[int, str | None]:
    """The rows whose cell has no picture in it, with the path that stands there in its place, if one does."""
    with pq.ParquetFile(path) as file:
        leaf = ".".join(steps)
        metadata = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        parts = [group.column(k) for group in metadata for k in range(group.num_columns)]
        known = [part.statistics for part in parts if part.path_in_schema == leaf]
        if all(one is not None and one.null_count == 0 for one in known):
            return {}
        cells: dict[int, str | None] = {}
        start = 0
        for batch in file.iter_batches(256, columns=[steps[0]]):
            column = batch.column(0)
            for place, one in enumerate(column):
                if not one.is_valid or not (one if len(steps) == 1 else one[steps[1]]).is_valid:
                    value = one.as_py()
                    cells[start + place] = value.get("path") if isinstance(value, dict) else None
            start += len(column)
        return cells


def _bytes_in(field: pa.Field) -> tuple[str, ...]:
    """The way to the bytes of a picture in a column: plain, or as the hub stores them, with a path; else empty."""
    if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
        return (field.name, "bytes")
    return (field.name,) if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type) else ()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def field_named(record: Record, names: Sequence[str]) -> str:
    """The first of `names` that the record has: copies of a dataset rename columns. Raises DataError."""
    found = next((name for name in names if name in record.fields), None)
    if found is None:
        near = suggest(names[0], map(str, record.fields)) if record.fields else "it is empty"
        raise DataError(f"{record.where} has no {' or '.join(map(repr, names))}; {near}")
    return found


def by_id(records: Sequence[Record], name: str) -> dict[str, Record]:
    """The records by the identifier in field `name`. Raises DataError if one is there twice."""
    found: dict[str, Record] = {}
    for record in records:
        key = record.id(name)
        if key in found:
            raise DataError(f"{record.where}: the {name} {key!r} was there before, in {found[key].where}")
        found[key] = record
    return found
