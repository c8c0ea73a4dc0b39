r"""The LLaVA format: a JSON list, or one JSON object a line, of rows with `conversations` and maybe an `image`.

    {"id": "33", "image": "coco/33.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                                           {"from": "gpt", "value": "A kettle."}]}

`image` is a path, a list of paths, or absent for a text-only row. The files in the wild have their habits; those that
lose nothing are mended here, everything else is a Skipped with the reason:

- turns before the first human turn and a last human turn without an answer are dropped, unless they hold an image;
- the roles `user` and `assistant` are read as `human` and `gpt`;
- where no turn says where the images stand, they stand at the front of the first human turn.
"""

from __future__ import annotations

import json
import operator
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from visgain.data.conversation import Role, Said, Unusable, id_text, kind_of, make_turns, printable, raw_fingerprint
from visgain.data.images import ImageFile
from visgain.errors import DataError
from visgain.storage import file_hash
from visgain.types import Sample, Skipped

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class LlavaDataset:
    """The rows of one LLaVA file, parsed when opened and turned into samples when asked for."""

    def __init__(self, path: Path, image_root: Path, *, max_pixels: int, follow_links: bool) -> None:
        self.path = path
        self.image_root = image_root
        self.max_pixels = max_pixels
        self.follow_links = follow_links
        self._rows = _read_rows(path)

    @classmethod
    def recognises(cls, path: Path, head: bytes) -> bool:
        """Whether the content begins like a JSON list or object; names lie too often to be asked."""
        return head.startswith((b"[", b"{"))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the file's bytes in hexadecimal."""
        return file_hash(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int, /) -> Sample | Skipped:
        row = operator.index(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a dataset of {len(self)} rows")
        record = self._rows[row]
        fields = record if isinstance(record, dict) else {}
        row_id = id_text(fields.get("id"), row)
        images: tuple[ImageFile, ...] = ()
        try:
            images = tuple(self._image(path) for path in _image_paths(fields))
            turns = make_turns(_said(record), n_images=len(images))
        except Unusable as reason:
            return Skipped(
                row=row,
                id=row_id,
                reason=str(reason),
                source=self._source(fields, images),
                fingerprint=raw_fingerprint(record),
                n_images=len(images),
            )
        return Sample(row=row, id=row_id, turns=turns, images=images, source=self._source(fields, images))

    def _image(self, path: str) -> ImageFile:
        return ImageFile(root=self.image_root, path=path, max_pixels=self.max_pixels, follow_links=self.follow_links)

    def _source(self, fields: dict[str, Any], images: tuple[ImageFile, ...]) -> str:
        """What the row says, else the first folder of its first image, else the file's name; `text` without images."""
        for name in ("source", "data_source"):
            if isinstance(said := fields.get(name), str) and said:
                return printable(said)
        if fields.get("image") in (None, []):
            return "text"
        folder, slash, _ = images[0].key.partition("/") if images else ("", "", "")
        return printable(folder if slash and folder not in ("", "..") else self.path.stem)


# ---------------------------------------------------------------- from a row to turns


def _said(record: Any) -> list[Said]:
    if not isinstance(record, dict):
        raise Unusable(f"the row is {kind_of(record)}, not an object")
    conversations = record.get("conversations")
    if conversations is None or conversations == []:
        raise Unusable("the row has no conversations")
    if not isinstance(conversations, list):
        raise Unusable(f"conversations is {kind_of(conversations)}, not a list")
    return [_parse_turn(index, turn) for index, turn in enumerate(conversations)]


def _parse_turn(index: int, turn: Any) -> Said:
    if not isinstance(turn, dict):
        raise Unusable(f"turn {index} is {kind_of(turn)}, not an object")
    said_by, text = turn.get("from"), turn.get("value")
    if not isinstance(said_by, str):
        raise Unusable(f"'from' of turn {index} is {kind_of(said_by)}, not a role")
    if said_by not in _ROLES:
        raise Unusable(f"turn {index} has the unknown role {said_by[:40]!r}; known: {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise Unusable(f"'value' of turn {index} is {kind_of(text)}, not a string")
    return _ROLES[said_by], text


def _image_paths(fields: dict[str, Any]) -> list[str]:
    image = fields.get("image")
    if image is None:
        return []
    paths = image if isinstance(image, list) else [image]
    for path in paths:
        if not isinstance(path, str):
            raise Unusable(f"'image' holds {kind_of(path)}, not a path")
    return paths


# ---------------------------------------------------------------- from a file to rows


def _read_rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None
    except OSError as error:
        raise DataError(f"cannot read dataset {path}: {error}") from error
    is_list = re.match(r"\s*\[", text) is not None
    rows = _parse_list(path, text) if is_list else _parse_lines(path, text)
    if not rows:
        raise DataError(f"{path} holds no rows: its list is empty")
    return rows


def _parse_list(path: Path, text: str) -> list[Any]:
    try:
        rows: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {_what_is_wrong(text, error)}") from None
    return rows


def _parse_lines(path: Path, text: str) -> list[Any]:
    """One row from each line that is not blank."""
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also splits inside of JSON strings
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if not rows and _is_json(text):
                raise _single_object(path) from None
            raise DataError(f"line {number} of {path} is not valid JSON: {_what_is_wrong(line, error)}") from None
    if len(rows) == 1 and path.suffix == ".json":
        raise _single_object(path)
    return rows


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _single_object(path: Path) -> DataError:
    return DataError(
        f"{path} holds one JSON object, not a list of rows; write the rows as one list [...], "
        "or one row a line in a .jsonl file"
    )


def _what_is_wrong(text: str, error: ValueError | RecursionError) -> str:
    """Where the JSON breaks and what to do about it."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply; this is no LLaVA dataset"
    if not isinstance(error, json.JSONDecodeError):  # e.g. a number of more than 4,300 digits
        return str(error)
    is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
    remedy = "the end is missing, so copy or download the file again" if is_cut else "mend the file there"
    return f"{error.msg} at line {error.lineno}, column {error.colno} (char {error.pos}); {remedy}"
