"""Export to the Hugging Face Trainer, and to anything that takes a collator: masks and a wrapper round the collator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visgain.export.masks import write_masks
from visgain.export.rows import Selected
from visgain.export.shim import write_shim


@dataclass(frozen=True)
class HuggingFace:
    """`--to hf`: the dataset stays where it is, the masks know the rows by their number in it."""

    def export(self, selected: Selected, out: Path) -> Sequence[str]:
        write_masks(out, selected)
        write_shim(out, "hf", "visgain_collator.py")
        return [f"wrap your collator in SelectiveCollator of {out / 'visgain_collator.py'}; docs/trainers/hf.md"]
