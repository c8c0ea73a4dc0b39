r"""Conversations as LLaVA has them, and ShareGPT4V, Qwen-VL fine-tuning, XComposer, lmms-finetune and many others.

    {"id": "33", "image": "coco/33.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                                           {"from": "gpt", "value": "A kettle."}]}

`image` (or `images`) is a path, a list of paths, or absent for a text-only row. The roles are human and gpt, or user
and assistant or bot; old Qwen-VL files have their images in the text, as `<img>coco/33.jpg</img>`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from visgain.data.messages import read_turns
from visgain.data.records import Columns, Layout, Talk

_FIELD = "conversations"


def _recognises(fields: Collection[str], columns: Columns) -> bool:
    return "messages" not in columns.names and _FIELD in fields


def _read(record: Mapping[str, Any], columns: Columns, n_images: int) -> Talk:
    name = columns.names.get("messages", _FIELD)
    return read_turns(record.get(name), columns, name)


LLAVA = Layout(recognises=_recognises, read=_read)
