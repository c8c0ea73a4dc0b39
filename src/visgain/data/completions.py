r"""TRL's prompts with completions, as texts or as lists of messages.

    {"prompt": "What is this?", "completion": "A kettle.", "images": [...]}
    {"prompt": [{"role": "user", "content": "What is this?"}], "completion": [...], "images": [...]}

Messages may hold images among their parts, as those of `messages` may.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from visgain.data.conversation import Unusable, kind_of
from visgain.data.messages import read_turns
from visgain.data.records import Columns, Layout, Talk

_COMPLETION = "completion"


def _recognises(fields: Collection[str], columns: Columns) -> bool:
    return _COMPLETION in fields and columns.name("prompt", fields) is not None


def _read(record: Mapping[str, Any], columns: Columns, n_images: int) -> Talk:
    prompt, completion = columns.value("prompt", record), record.get(_COMPLETION)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Talk(said=[("user", prompt), ("assistant", completion)])
    if isinstance(prompt, list) and isinstance(completion, list):
        return read_turns([*prompt, *completion], columns, "prompt")
    raise Unusable(
        f"the prompt is {kind_of(prompt)} and the completion {kind_of(completion)}; both must be texts or messages"
    )


COMPLETIONS = Layout(recognises=_recognises, read=_read)
