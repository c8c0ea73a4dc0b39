r"""One question and one answer a row, maybe with what was said before: alpaca, ms-swift, question-answer tables.

    {"instruction": "Translate.", "input": "chat", "output": "cat", "history": [["Hi", "Hello"]]}
    {"query": "<image>What is this?", "response": "A kettle.", "images": ["33.jpg"]}
    {"conversation": [{"human": "What is this?", "assistant": "A kettle."}]}

PROMPTS reads the first two, PAIRS the third, of ms-swift and (with `input` and `output`) xtuner.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from visgain.data.conversation import Said, Unusable, kind_of
from visgain.data.records import Columns, Layout, Talk

_PAIRS = "conversation"
_ASKED, _ANSWERED = ("human", "input", "query", "user"), ("assistant", "output", "response")


def _recognises_prompts(fields: Collection[str], columns: Columns) -> bool:
    return columns.name("response", fields) is not None


def _read_prompts(record: Mapping[str, Any], columns: Columns, n_images: int) -> Talk:
    """History, then instruction and input joined by a line break, then the answer."""
    said = _read_history(columns.value("history", record))
    asked = [_text(columns, key, record) for key in ("prompt", "input")]
    prompt = "\n".join(text for text in asked if text)
    if not prompt and not n_images:
        raise Unusable("the row has an answer but no question and no image")
    answer = _text(columns, "response", record)
    if answer is None:
        raise Unusable(f"the row has no {columns.names.get('response', 'response')}")
    return Talk(said=[*said, ("user", prompt), ("assistant", answer)])


def _read_history(history: Any) -> list[Said]:
    """Pairs of question and answer, or null."""
    if history is not None and not isinstance(history, list | str):
        raise Unusable(f"'history' is {kind_of(history)}, not a list")
    said: list[Said] = []
    for index, pair in enumerate(history or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Unusable(f"'history' {index} is no pair of question and answer")
        said += [("user", pair[0]), ("assistant", pair[1])]
    return said


def _text(columns: Columns, key: str, record: Mapping[str, Any]) -> str | None:
    value = columns.value(key, record)
    if value is not None and not isinstance(value, str):
        raise Unusable(f"{columns.name(key, record)!r} is {kind_of(value)}, not a string")
    return value


def _recognises_pairs(fields: Collection[str], columns: Columns) -> bool:
    return columns.names.get("messages", _PAIRS) == _PAIRS and _PAIRS in fields


def _read_pairs(record: Mapping[str, Any], columns: Columns, n_images: int) -> Talk:
    pairs = record.get(_PAIRS)
    if not isinstance(pairs, list):
        raise Unusable(f"{_PAIRS} is {kind_of(pairs)}, not a list")
    said: list[Said] = []
    for index, pair in enumerate(pairs):
        asked, answered = (_one_of(index, pair, names) for names in (_ASKED, _ANSWERED))
        said += [("user", asked), ("assistant", answered)]
    return Talk(said=said)


def _one_of(index: int, pair: Any, names: tuple[str, ...]) -> str:
    text = next((pair[name] for name in names if name in pair), None) if isinstance(pair, Mapping) else None
    if not isinstance(text, str):
        raise Unusable(f"{_PAIRS} {index} has no text under one of {', '.join(names)}")
    return text


PROMPTS = Layout(recognises=_recognises_prompts, read=_read_prompts)
PAIRS = Layout(recognises=_recognises_pairs, read=_read_pairs)
