"""`visgain export`: a selection as files for the trainer that somebody already uses. One file an exporter.

The rule of every trainer: the k-th supervised label of a row, in order, must equal `token_id[k]` of its scores, and
becomes -100 unless `keep[k]`. It holds whatever the trainer does to images, padding and truncation, as long as
tokenizer and template are those that were scored with; where they are not, the first difference stops the training
with a message. The check runs inside the trainer, so it lies in a shim: one Python file that needs torch and the
standard library alone, and `masks.safetensors` (masks.py, docs/schema.md) beside it.

How a shim knows which row it sees:

- by index, where the trainer reads a file that we wrote and keeps its order and number (`Masks.at(index)`: the
  index-th kept row), or the user's own rows (`Masks.of(row)`);
- by a key in the row, where the trainer lets unknown fields or fields of messages through: write `row` there;
- by content, where rows are dropped or shuffled and nothing travels along: give `MaskWriter` a column `key` of
  `content_key(...)` of what both sides see (image paths as written, the question), and ask
  `Masks.matching(key, labels)`.

An exporter is a frozen dataclass (its fields are the options of `--to name:key=value`) with the method `export`, here
or in an entry point of the group `visgain.exporters`. It goes through the kept rows once (rows.py: `for kept in
selected`), writes what its trainer reads, and puts its shim beside it (`shim.py: write_shim`, which makes one file of
the shim and `shims/masks.py`). docs/trainers.md is the index; each trainer has a page docs/trainers/NAME.md, whose
code blocks the tests run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from visgain.registry import Registry

if TYPE_CHECKING:
    from visgain.export.rows import Selected


@runtime_checkable
class Exporter(Protocol):
    """How a selection is written for one trainer. Made by `EXPORTERS.make(spec)`."""

    def export(self, selected: Selected, out: Path) -> Sequence[str]:
        """Write files to `out`, a folder of ours. Returns lines for the user: what to do with them, what to know.

        Raises ConfigError for a selection that the trainer cannot follow.
        """
        ...


EXPORTERS: Registry[Exporter] = Registry(
    "exporter",
    {
        "finevision": "visgain.export.finevision:FineVision",
        "hf": "visgain.export.hf:HuggingFace",
        "llama-factory": "visgain.export.llama_factory:LlamaFactory",
        "llava": "visgain.export.llava:Llava",
        "llava-json": "visgain.export.llava_json:LlavaJson",
        "llava-next": "visgain.export.llava:LlavaNext",
        "ms-swift": "visgain.export.swift:Swift",
        "nanovlm": "visgain.export.nanovlm:NanoVLM",
        "open-qwen2vl": "visgain.export.llava:OpenQwen2VL",
        "prismatic": "visgain.export.llava:Prismatic",
        "sharegpt4v": "visgain.export.llava:ShareGPT4V",
        "tinyllava": "visgain.export.llava:TinyLlava",
        "trl": "visgain.export.trl:Trl",
    },
)
