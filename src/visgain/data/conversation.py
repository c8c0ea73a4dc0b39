"""What every format shares: from what was said, by whom, with how many pictures, to turns that can be scored.

A format reads its rows into (role, text) pairs and images. The habits of files in the wild that lose nothing are
mended here, everything else is `Unusable`, whose message becomes the reason of a Skipped:

- turns before the first user turn and a last user turn without an answer are dropped, unless they hold an image;
- where no turn says where the images stand, they stand at the front of the first user turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from visgain.types import IMAGE_MARK, Turn

Role = Literal["user", "assistant", "system"]
Said = tuple[Role, str]

_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


class Unusable(Exception):
    """Why a row cannot be scored, on one printable line."""


def make_turns(said: Sequence[Said], *, n_images: int) -> tuple[Turn, ...]:
    """User and assistant turns in alternation, with one IMAGE_MARK per image in the user turns.

    `said` is the conversation as the file tells it, system turns included. Raises Unusable.
    """
    for index, (role, text) in enumerate(said):
        _check_text(index, role, text)
    said = _drop_leading(said)
    _check_alternation(said)
    said = _drop_unanswered(said)
    if not any(text.strip() for role, text in said if role == "assistant"):
        raise Unusable("every answer is empty")
    return _mark_images(tuple(Turn(role=role, text=text) for role, text in said if role != "system"), n_images)


def _check_text(index: int, role: Role, text: str) -> None:
    if _SURROGATE.search(text):
        raise Unusable(f"turn {index} holds half a surrogate pair, which no tokenizer can read")
    if role != "user" and IMAGE_MARK in text:
        raise Unusable(f"turn {index} ({role}) holds {IMAGE_MARK}, which belongs in user turns")


def _drop_leading(said: Sequence[Said]) -> Sequence[Said]:
    """From the first user turn on."""
    first = next((index for index, (role, _) in enumerate(said) if role == "user"), None)
    if first is None:
        raise Unusable("no user turn")
    return said[first:]


def _check_alternation(said: Sequence[Said]) -> None:
    for index, (role, _) in enumerate(said):
        if role != ("user", "assistant")[index % 2]:
            raise Unusable(f"user and assistant turns do not alternate: {role} after {said[index - 1][0]}")


def _drop_unanswered(said: Sequence[Said]) -> Sequence[Said]:
    """Without a last user turn that nobody answers; refuses to drop an image with it."""
    if len(said) == 1:
        raise Unusable("no answer")
    role, text = said[-1]
    if role != "user":
        return said
    if IMAGE_MARK in text:
        raise Unusable("the last user turn holds an image and has no answer")
    return said[:-1]


def _mark_images(turns: tuple[Turn, ...], n_images: int) -> tuple[Turn, ...]:
    """The turns with exactly `n_images` marks, which are put in front where there is none at all."""
    n_marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if n_marks == n_images:
        return turns
    if n_images == 0:
        raise Unusable(f"the row has no image but its text holds {IMAGE_MARK} {n_marks} times")
    if n_marks:
        raise Unusable(f"the row has {n_images} images but its text holds {IMAGE_MARK} {n_marks} times")
    first, *rest = turns
    lines = [IMAGE_MARK] * n_images + [first.text] * bool(first.text)
    return (Turn(role="user", text="\n".join(lines)), *rest)


def id_text(value: Any, row: int) -> str:
    """A row's id as text: strings as they are, other values as JSON writes them, the row number where there is none."""
    if value is None:
        return str(row)
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def raw_fingerprint(record: Any) -> int:
    """Signed 64-bit hash of a row that did not become a sample: of its JSON, foreign values as `repr`."""
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True, default=repr).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def printable(text: str) -> str:
    """The text with halves of surrogate pairs spelled out: it must survive in UTF-8 files."""
    return text.encode("utf-8", "backslashreplace").decode()


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON: `an object`, `a list` ..."""
    return _JSON_KINDS.get(type(value), "a number")
