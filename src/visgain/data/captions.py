"""An image and a text about it, and nobody who asked: the question is the image alone, unless a prompt is given."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from visgain.data.conversation import Unusable, kind_of
from visgain.data.records import MARKS, Columns, Layout, Talk
from visgain.types import IMAGE_MARK

_ABOUT_THE_TEXT = ("label", "question_id")
"""Beside these a text is a question, or may be a wrong caption: not to be taken for one unless the user says so."""

_END = "<|__dj__eoc|>"
"""With which Data-Juicer ends a text."""


def _recognises(fields: Collection[str], columns: Columns) -> bool:
    if columns.name("images", fields) is None or columns.name("caption", fields) is None:
        return False
    return "caption" in columns.names or not any(name in fields for name in _ABOUT_THE_TEXT)


def _read(record: Mapping[str, Any], columns: Columns, n_images: int) -> Talk:
    caption = columns.value("caption", record)
    if isinstance(caption, list) and len(caption) == 1:
        (caption,) = caption
    if isinstance(caption, list):
        raise Unusable(f"the row has {len(caption)} captions; a conversation has one; write a row for each")
    if not isinstance(caption, str):
        raise Unusable(f"the caption is {kind_of(caption)}, not a string")
    if not n_images:
        raise Unusable("the row has a caption and no image")
    caption = _without_marks(caption, columns)
    prompt = columns.value("prompt", record)
    return Talk(said=[("user", prompt if isinstance(prompt, str) else ""), ("assistant", caption)])


def _without_marks(caption: str, columns: Columns) -> str:
    """The caption without the image marks that it begins with, for there the images stand anyway."""
    marks = (IMAGE_MARK, *MARKS, *([columns.names["mark"]] if "mark" in columns.names else []))
    text = caption.removesuffix(_END).strip() if caption.endswith(_END) else caption
    while mark := next((mark for mark in marks if text.lstrip().startswith(mark)), None):
        text = text.lstrip().removeprefix(mark).lstrip()
    return text


CAPTIONS = Layout(recognises=_recognises, read=_read)
