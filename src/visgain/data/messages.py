r"""Conversations as `messages`: OpenAI, Hugging Face, LLaMA-Factory, ms-swift, xtuner.

    {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A kettle."}],
     "images": ["33.jpg"]}

`content` is a text or a list of parts. An image part may hold its image (path, URL, object) or only its place: then the
images are in the row's field of images. Where the text of a turn holds image marks, they say where the images stand,
and not the place of its image parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from visgain.data.conversation import Role, Said, Unusable, kind_of
from visgain.data.records import MARKS, Columns, Layout, Talk
from visgain.data.videos import VIDEO_MARK, is_video, part_video
from visgain.types import IMAGE_MARK

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
}
_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_turns(turns: Any, columns: Columns, name: str) -> Talk:
    """The turns that the field `name` of a row holds, with roles and texts under any of their usual names.

    Raises Unusable.
    """
    if turns is None or turns == []:
        raise Unusable(f"the row has no {name}")
    if not isinstance(turns, list):
        raise Unusable(f"{name} is {kind_of(turns)}, not a list")
    said: list[Said] = []
    images: list[Any] = []
    videos: list[Any] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise Unusable(f"turn {index} is {kind_of(turn)}, not an object")
        role = _role(index, turn, columns)
        text, images_inside, videos_inside = _content(index, turn, columns)
        said.append((role, text))
        images += images_inside
        videos += videos_inside
    return Talk(said=said, images=images, videos=videos)


def _role(index: int, turn: Mapping[str, Any], columns: Columns) -> Role:
    name = columns.name("role", turn) or ("from" if "value" in turn else "role")
    said_by = turn.get(name)
    if not isinstance(said_by, str):
        raise Unusable(f"'{name}' of turn {index} is {kind_of(said_by)}, not a role")
    roles = {**ROLES, **columns.roles}
    if said_by == "pretrain" and said_by not in roles:
        raise Unusable("text to pre-train on, in which nobody answers")
    if said_by not in roles:
        raise Unusable(f"turn {index} has the unknown role {said_by[:40]!r}; known: {', '.join(roles)}")
    return roles[said_by]


def _content(index: int, turn: Mapping[str, Any], columns: Columns) -> tuple[str, list[Any], list[Any]]:
    name = columns.name("content", turn) or ("value" if "from" in turn else "content")
    content = turn.get(name)
    if isinstance(content, str):
        return content, [], []
    if not isinstance(content, list):
        raise Unusable(f"'{name}' of turn {index} is {kind_of(content)}, not a string")
    return _join_parts(index, content)


def _join_parts(index: int, parts: Sequence[Any]) -> tuple[str, list[Any], list[Any]]:
    """The text of the parts, with a mark for each image and video part, and those of either that the parts hold."""
    texts: list[str] = []
    images: list[Any] = []
    videos: list[Any] = []
    written = "".join(text for text in map(_part_text, parts) if text)
    marked = any(mark in written for mark in (IMAGE_MARK, *MARKS))
    for part in parts:
        text = _part_text(part)
        if text is not None:
            texts.append(text)
        elif is_video(part):
            texts += [] if VIDEO_MARK in written else [VIDEO_MARK]
            videos += part_video(part)
        else:
            image = _part_image(index, part)
            texts += [] if marked else [IMAGE_MARK]
            images += [] if image is None else [image]
    return "".join(texts), images, videos


def _part_text(part: Any) -> str | None:
    """The text of a text part, None for any other."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in (None, *_TEXT_PARTS) and isinstance(part.get("text"), str):
        return str(part["text"])
    return None


def _part_image(index: int, part: Any) -> Any:
    """What an image part holds, None where it only holds the place. Raises Unusable for parts of other kinds."""
    if not isinstance(part, Mapping):
        raise Unusable(f"turn {index} has a part that is {kind_of(part)}, not an object")
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in _IMAGE_PARTS if part.get(name)), None)
    if kind not in _IMAGE_PARTS:
        raise Unusable(f"turn {index} has a part of type {str(kind)[:40]!r}; text and images are read")
    return next((part[name] for name in (*_IMAGE_PARTS, "url", "path") if part.get(name)), None)


def _recognises(fields: Collection[str], columns: Columns) -> bool:
    return "messages" in fields if "messages" not in columns.names else columns.names["messages"] in fields


def _read(record: Mapping[str, Any], columns: Columns, n_images: int) -> Talk:
    name = columns.names.get("messages", "messages")
    return read_turns(record.get(name), columns, name)


MESSAGES = Layout(recognises=_recognises, read=_read)
