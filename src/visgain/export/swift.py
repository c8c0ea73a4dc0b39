"""Export to ms-swift: a dataset of the kept rows, their masks, and a plugin that holds ms-swift's labels to them.

ms-swift drops columns that it does not know, and of a message all but its role, its text, `loss` and `loss_scale`. The
row's number travels as the `loss_scale` of its first answer, where our plugin (shims/swift.py) finds it. Without the
plugin ms-swift takes it for a weight, which a text is not: no row can be encoded, so that nobody trains on all tokens
by mistake. ms-swift's own way to give weights to tokens always trains on ends of turns, and miscounts the tokens of
LLaVA's pictures when a weight is neither 0 nor 1; the plugin does neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from visgain.export.conversations import TABLE, messages_of, require_ends_of_turns, without_breaks, write_table
from visgain.export.masks import MaskWriter, open_masks
from visgain.export.pictures import picture_paths
from visgain.export.rows import Selected
from visgain.export.shim import write_shim
from visgain.export.shims.swift import row_text

_SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "loss_scale": pa.string()})),
        "images": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True)
class Swift:
    """`--to ms-swift`."""

    def export(self, selected: Selected, out: Path) -> Sequence[str]:
        require_ends_of_turns(selected, "ms-swift")
        with open_masks(out, selected) as masks:
            write_table(out / TABLE, _rows(selected, masks, out), _SCHEMA)
        shim = write_shim(out, "swift")
        return [
            f"swift sft ... --dataset {out / TABLE} --external_plugins {shim} --strict true; docs/trainers/ms-swift.md"
        ]


def _rows(selected: Selected, masks: MaskWriter, out: Path) -> Iterator[dict[str, Any]]:
    for kept in selected:
        masks.add(kept)
        messages: list[dict[str, str]] = without_breaks(messages_of(kept.sample))
        answer = next(message for message in messages if message["role"] == "assistant")
        answer["loss_scale"] = row_text(kept.row)
        yield {"messages": messages, "images": picture_paths(kept, out)}
