"""Export to LLaMA-Factory: a dataset of the kept rows, their masks, and a program that tokenises in its place.

LLaMA-Factory lets no column through its tokenisation. What it does let through, up to its tokeniser, is a row's list of
tools, a text: the row's number travels there. Our program (shims/llama_factory.py) runs LLaMA-Factory's own
tokenisation, takes the number out, and holds the labels to the masks. Without it LLaMA-Factory takes the text for a
list of tools, fails to parse it and stops, so that nobody trains on all tokens by mistake.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from visgain.errors import ConfigError
from visgain.export.conversations import TABLE, messages_of, require_ends_of_turns, without_breaks, write_table
from visgain.export.masks import MaskWriter, open_masks
from visgain.export.pictures import in_export, picture_paths
from visgain.export.rows import KeptRow, Selected
from visgain.export.shim import write_shim
from visgain.export.shims.llama_factory import DATASET, TOKENIZED, row_text
from visgain.storage import write_json, write_text

_SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "images": pa.list_(pa.string()),
        "visgain": pa.string(),
    }
)

_INFO = {
    DATASET: {
        "file_name": TABLE,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images", "tools": "visgain"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
}

_LINES = """\
# What a configuration of LLaMA-Factory needs to train on this selection (docs/trainers/llama-factory.md).
stage: sft
dataset: {dataset}
dataset_dir: {out}
tokenized_path: {tokenized}
"""


@dataclass(frozen=True)
class LlamaFactory:
    """`--to llama-factory`. Selections with soft weights are refused: its loss knows labels alone."""

    def export(self, selected: Selected, out: Path) -> Sequence[str]:
        require_ends_of_turns(selected, "LLaMA-Factory")
        if selected.soft:
            raise ConfigError("LLaMA-Factory's loss has no weights of tokens; select with --weights hard")
        shutil.rmtree(out / TOKENIZED, ignore_errors=True)  # made of a former export, and LLaMA-Factory would take it
        with open_masks(out, selected) as masks:
            write_table(out / TABLE, _rows(selected, masks, out), _SCHEMA)
        write_json(out / "dataset_info.json", _INFO)
        folder = out.absolute()
        lines = _LINES.format(dataset=DATASET, out=folder, tokenized=folder / TOKENIZED)
        write_text(out / "selection.yaml", lines)
        shim = write_shim(out, "llama_factory", "visgain_labels.py")
        return [
            f"add the lines of {out / 'selection.yaml'} to your configuration, say train.yaml, and run:",
            f"  python {shim} train.yaml && llamafactory-cli train train.yaml",
        ]


def _rows(selected: Selected, masks: MaskWriter, out: Path) -> Iterator[dict[str, Any]]:
    """The rows with pictures, then those without; masks stay in row order, since rows know their number.

    LLaMA-Factory makes nothing of an empty list of pictures, and `datasets` takes the types from the first rows that
    each of its processes sees: where these had no picture, it would fail on the first one that has.
    """
    chat = selected.identity.get("template") == "chat"
    text_only = 0
    for kept in selected:
        masks.add(kept)
        if kept.sample.images:
            yield _row(kept, out, chat)
        else:
            text_only += 1
    if text_only:
        yield from (_row(kept, out, chat) for kept in selected if not kept.sample.images)


def _row(kept: KeptRow, out: Path, chat: bool) -> dict[str, Any]:
    messages = messages_of(kept.sample)
    paths = picture_paths(kept, out)
    return {
        "messages": without_breaks(messages) if chat else messages,
        # LLaMA-Factory looks in dataset_dir first, which is this folder wherever it is moved to.
        "images": [in_export(path, out) or path for path in paths],
        "visgain": row_text(kept.row),
    }
