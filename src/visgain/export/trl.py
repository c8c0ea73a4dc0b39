"""Export to TRL's SFTTrainer: the kept rows as a table of messages and pictures, masks, and a collator's wrapper."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from visgain.export.conversations import TABLE, write_table
from visgain.export.masks import open_masks
from visgain.export.pictures import picture_paths
from visgain.export.rows import KeptRow, Selected
from visgain.export.shim import write_shim
from visgain.export.shims.hf import ROW
from visgain.vlm.chat import chat_messages

_TEXT, _NUMBER = ({"dtype": kind, "_type": "Value"} for kind in ("string", "int64"))
_FEATURES = {
    "messages": [{"role": _TEXT, "content": [{"type": _TEXT, "text": _TEXT}], ROW: _NUMBER}],
    "images": {"feature": {"_type": "Image"}, "_type": "List"},
}
"""The same schema as the package `datasets` calls it, so that pictures are opened and not told as paths."""

_SCHEMA = pa.schema(
    {
        "messages": pa.list_(
            pa.struct(
                {
                    "role": pa.string(),
                    "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string()})),
                    ROW: pa.int64(),
                }
            )
        ),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    },
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


@dataclass(frozen=True)
class Trl:
    """`--to trl`: rows know their number by a field of their messages, which survives TRL's stripping of columns."""

    def export(self, selected: Selected, out: Path) -> Sequence[str]:
        with open_masks(out, selected) as masks:

            def rows() -> Iterator[dict[str, Any]]:
                for kept in selected:
                    masks.add(kept)
                    yield _row(kept, out)

            write_table(out / TABLE, rows(), _SCHEMA)
        write_shim(out, "hf", "visgain_collator.py")
        return [f"train on {out / TABLE} with SelectiveCollator of visgain_collator.py; docs/trainers/trl.md"]


def _row(kept: KeptRow, out: Path) -> dict[str, Any]:
    messages = [{**message, ROW: kept.row} for message in chat_messages(kept.sample.turns)]
    return {
        "messages": messages,
        "images": [{"bytes": None, "path": path} for path in picture_paths(kept, out)],
    }
