"""LLaMA-Factory's `dataset_info.json`: what the fields of the files beside it are called, in that tool's words.

{"mine": {"file_name": "mine.json", "formatting": "sharegpt", "columns": {"messages": "dialog", "images": "pics"},
          "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "asker", "assistant_tag": "helper"}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visgain.data.records import Columns
from visgain.errors import DataError

FILE = "dataset_info.json"

_COLUMNS = {
    "messages": "messages",
    "images": "images",
    "videos": "videos",
    "prompt": "prompt",
    "query": "input",
    "response": "response",
    "history": "history",
}
_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def columns_beside(path: Path) -> Columns:
    """What a `dataset_info.json` in the folder of `path` says of it; nothing where there is none, or no word of it.

    Raises DataError if it cannot be read, contradicts itself, or says that the file holds preferences.
    """
    info = path.parent / FILE
    if path.name == FILE or not path.is_file() or not info.is_file():
        return Columns()
    try:
        entries = json.loads(info.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {info}, which lies beside the dataset: {error}; mend or move it") from error
    found = {
        name: _names(name, entry, info)
        for name, entry in (entries.items() if isinstance(entries, dict) else ())
        if isinstance(entry, dict) and entry.get("file_name") == path.name
    }
    if any(names != next(iter(found.values())) for names in found.values()):
        raise DataError(
            f"{info} describes {path.name} in different ways ({', '.join(found)}); say which with --columns"
        )
    return Columns(next(iter(found.values()), {}), said_by=str(info))


def _names(name: str, entry: Mapping[str, Any], info: Path) -> dict[str, str]:
    if entry.get("ranking"):
        raise DataError(
            f"{info} says that {name!r} holds preferences (ranking); answers to choose between are not read"
        )
    return {
        ours: str(given[theirs])
        for section, known in (("columns", _COLUMNS), ("tags", _TAGS))
        if isinstance(given := entry.get(section), dict)
        for theirs, ours in known.items()
        if given.get(theirs)
    }
