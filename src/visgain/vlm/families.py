"""What differs between model families, as data: where the parts of a model are, and which profile repairs its template.

Nothing else in the project asks for a model's type. A family that needs no repair needs no entry.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from visgain.errors import ModelError

PART_PATHS = {
    "vision": ("model.vision_tower", "model.vision_model", "model.visual", "model.vision_embed_tokens"),
    "projector": (
        "model.multi_modal_projector",
        "model.connector",
        "model.visual.merger",
        "model.mm_projector",
        "model.aligner",
    ),
    "language": ("model.language_model", "model.text_model", "lm_head"),
}
"""Where transformers' models keep their parts; every path that exists counts."""

REPAIRS = {"llava": "llava-1.5"}
"""Model type -> profile to use where the processor's own does not supervise the end of a turn."""

NUMBERED_INPUTS = {"image_token_pooling": "pixel_values"}
"""Inputs whose values number the rows of another input [crops, rows, ...] within one sample, from 0; -1 is none."""

PACKED_INPUTS = {"target_sizes": "pixel_values"}
"""Where a sample has the first input, the second holds all its pictures in one row, [1, ..., length] (MiniCPM-V)."""


def part_modules(model: PreTrainedModel, part: str) -> list[nn.Module]:
    """The modules of `part` ("vision", "projector" or "language"). Raises ModelError if the model has none."""
    found = [module for path in PART_PATHS[part] if (module := _resolve(model, path)) is not None]
    if not found:
        raise ModelError(f"{type(model).__name__} has no part {part!r} that visgain knows of; train without --parts")
    return found


def named_parts(model: PreTrainedModel, parts: Iterator[str] | tuple[str, ...]) -> set[int]:
    """Ids of the parameters that belong to any of `parts`.

    A projector inside the vision tower (`visual.merger`) belongs to the projector alone.
    """
    owned = {part: {id(p) for module in part_modules(model, part) for p in module.parameters()} for part in PART_PATHS}
    owned["vision"] -= owned["projector"]
    return set().union(*(owned[part] for part in parts))


def _resolve(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module
