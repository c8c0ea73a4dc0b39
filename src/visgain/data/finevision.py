r"""The layout of FineVision: pairs of user and assistant in `texts`, and ratings that are not read here.

    {"texts": [{"user": "What is this?", "assistant": "A kettle."}], "images": [...], "relevance_ratings": [5], ...}

The ratings are numbers of the row, to select by: `visgain select --by column:relevance_ratings` (columns.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from visgain.data.conversation import Said, Unusable, kind_of
from visgain.data.records import Columns, Layout, Talk

_TEXTS = "texts"


def _name(columns: Columns) -> str:
    return columns.names.get("messages", _TEXTS)


def _recognises(fields: Collection[str], columns: Columns) -> bool:
    return _name(columns) == _TEXTS and _TEXTS in fields


def _read(record: Mapping[str, Any], columns: Columns, n_images: int) -> Talk:
    pairs = record.get(_name(columns))
    if not isinstance(pairs, list):
        raise Unusable(f"{_name(columns)} is {kind_of(pairs)}, not a list")
    said: list[Said] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, Mapping):
            raise Unusable(f"{_name(columns)} {index} is {kind_of(pair)}, not a pair of user and assistant")
        for role in ("user", "assistant"):
            text = pair.get(role)
            if not isinstance(text, str):
                raise Unusable(f"{_name(columns)} {index} has {kind_of(text)} under {role!r}, not a string")
            said.append((role, text))
    return Talk(said=said)


TEXTS = Layout(recognises=_recognises, read=_read)
