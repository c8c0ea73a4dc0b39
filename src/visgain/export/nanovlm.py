"""Export to nanoVLM: the kept rows as a table in the manner of FineVision, masks, and the launcher of shims/llava.py.

nanoVLM shuffles, shards and splits its rows, and carries their columns along, so each says which row it is. Since it
trains on FineVision it reads `texts` and `images`; for a while before that `conversations` and `image`, which are not
written. Where that was read is in docs/trainers/nanovlm.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from visgain.export.conversations import require_ends_of_turns, write_table
from visgain.export.llava import LAUNCHER, require_hard
from visgain.export.masks import open_masks
from visgain.export.pictures import picture_paths
from visgain.export.rows import KeptRow, Selected
from visgain.export.shim import write_shim
from visgain.export.shims.llava import ROW
from visgain.types import IMAGE_MARK

TABLE = "data/train-00000-of-00001.parquet"
"""In a folder of its own: `datasets` takes any JSON beside it for rows."""

_MOST_PICTURES = 4
"""nanoVLM's own `max_images_per_example`: rows with more are left out."""

_TEXT = {"dtype": "string", "_type": "Value"}
FEATURES = {
    "images": {"feature": {"_type": "Image"}, "_type": "List"},
    "texts": {"feature": {"user": _TEXT, "assistant": _TEXT}, "_type": "List"},
    ROW: {"dtype": "int64", "_type": "Value"},
}
"""The same schema as the package `datasets` calls it, so that pictures are opened and not told as paths."""

SCHEMA = pa.schema(
    {
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "texts": pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string()})),
        ROW: pa.int64(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


@dataclass(frozen=True)
class NanoVLM:
    """`--to nanovlm`."""

    def export(self, selected: Selected, out: Path) -> Sequence[str]:
        require_hard(selected)
        require_ends_of_turns(selected, "nanoVLM")
        table = out / TABLE
        table.parent.mkdir(parents=True, exist_ok=True)
        crowded = 0
        with open_masks(out, selected) as masks:

            def rows() -> Iterator[Mapping[str, Any]]:
                nonlocal crowded
                for kept in selected:
                    masks.add(kept)
                    crowded += len(kept.sample.images) > _MOST_PICTURES
                    yield fine_vision_row(kept, out)

            write_table(table, rows(), SCHEMA)
        launcher = write_shim(out, "llava", LAUNCHER)
        folder = table.parent.absolute()
        start = f"in place of `python train.py`: python {launcher} train.py --train_dataset_path {folder} ..."
        left_out = (
            f"{crowded:,} rows have more than {_MOST_PICTURES} pictures, and nanoVLM leaves them out unless its "
            "models/config.py says a larger max_images_per_example"
        )
        return [start, left_out] if crowded else [start]


def fine_vision_row(kept: KeptRow, out: Path) -> dict[str, Any]:
    """A row of FineVision. There all pictures go before the first question, so the text has no marks."""
    texts = [turn.text.replace(f"{IMAGE_MARK}\n", "").replace(IMAGE_MARK, "") for turn in kept.sample.turns]
    pairs = [{"user": user, "assistant": answer} for user, answer in zip(texts[::2], texts[1::2], strict=True)]
    return {
        "images": [{"bytes": None, "path": path} for path in picture_paths(kept, out)],
        "texts": pairs,
        ROW: kept.row,
    }
