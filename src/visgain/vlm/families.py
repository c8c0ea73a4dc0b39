"""What differs between model families, as data: where the parts of a model are, and which profile repairs its template.

Nothing else in the project asks for a model's type. A family that needs no repair needs no entry.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from visgain.errors import ModelError

PART_PATHS = {
    "vision": (
        "model.vision_tower",
        "model.vision_model",
        "model.visual",
        "model.vision_encoder",  # LightOnOCR
        "vision_model",  # BLIP-2, InstructBLIP, Llama 4
        "model.embed_tokens_extend.image_embed.img_processor",  # Phi-4
    ),
    "projector": (
        "model.multi_modal_projector",
        "multi_modal_projector",  # Llama 4
        "model.connector",
        "model.visual.merger",
        "model.visual.deepstack_merger_list",  # Qwen3-VL
        "model.mm_projector",
        "model.aligner",
        "model.projector",
        "model.merger",  # MiniCPM-V
        "model.vision_projection",  # LightOnOCR
        "model.resampler_model",  # Ernie 4.5
        "model.embed_vision",  # Gemma 4
        "model.image_newline",  # a parameter: the end of a row of patches
        "model.vision_tower.head_linear",  # Ovis 2: scores of visual words ...
        "model.vision_tower.head_norm",
        "model.visual_embeddings_table",  # ... and their embeddings
        "model.vision_embed_tokens",  # Fuyu, which has no vision tower
        "query_tokens",  # BLIP-2, InstructBLIP; a parameter
        "qformer",
        "language_projection",
        "model.embed_tokens_extend.image_embed",  # Phi-4
    ),
    "language": (
        "model.language_model",
        "model.text_model",
        "language_model",  # BLIP-2, InstructBLIP, Llama 4
        "model.embed_tokens",  # Phi-4, whose body is the language model
        "model.layers",
        "model.norm",
        "lm_head",
    ),
}
"""Where transformers' models keep their parts, modules and single parameters; every path that exists counts.

What is at a path inside of another belongs to the part of the inner one.
"""

REPAIRS = {"llava": "llava-1.5"}
"""Model type -> profile to use where the processor's own does not supervise the end of a turn."""

NUMBERED_INPUTS = {"image_token_pooling": "pixel_values"}
"""Inputs whose values number the rows of another input [crops, rows, ...] within one sample, from 0; -1 is none."""

PACKED_INPUTS = {"target_sizes": "pixel_values"}
"""Where a sample has the first input, the second holds all its pictures in one row, [1, ..., length] (MiniCPM-V)."""


def part_modules(model: PreTrainedModel, part: str) -> list[nn.Module]:
    """The modules of `part` ("vision", "projector" or "language"); another part may be inside of them.

    Raises ModelError if the model has none.
    """
    found = [module for path in PART_PATHS[part] if isinstance(module := _resolve(model, path), nn.Module)]
    if not found:
        raise ModelError(_missing(model, part))
    return found


def part_of(model: PreTrainedModel) -> dict[int, str]:
    """Id of each parameter -> its part. What has no entry is in no part that visgain knows of (see `in_no_part`)."""
    paths = [(path, part) for part, some in PART_PATHS.items() for path in some]
    owner: dict[int, str] = {}
    for path, part in sorted(paths, key=lambda one: len(one[0])):  # so inner paths come after outer ones
        owner |= dict.fromkeys(_ids(_resolve(model, path)), part)
    return owner


def named_parts(model: PreTrainedModel, parts: Collection[str]) -> set[int]:
    """Ids of the parameters that belong to any of `parts`. Raises ModelError if the model has not all of these."""
    owner = part_of(model)
    for part in parts:
        if part not in owner.values():
            advice = "name those that it has with --parts" if owner else "visgain cannot train it"
            raise ModelError(f"{_missing(model, part)}; {advice}")
    return {parameter for parameter, part in owner.items() if part in parts}


def in_no_part(model: PreTrainedModel) -> list[str]:
    """Names of the modules and parameters that belong to no part, the largest that are whole."""
    return _outside(model, set(part_of(model)))


def _outside(module: nn.Module, owned: set[int]) -> list[str]:
    """Names in `module` under which there are parameters, and none of `owned`."""
    found = []
    for name, child in (*module.named_parameters(recurse=False), *module.named_children()):
        ids = _ids(child)
        if isinstance(child, nn.Module) and ids & owned:
            found += [f"{name}.{inner}" for inner in _outside(child, owned)]
        elif ids - owned:
            found.append(name)
    return found


def _missing(model: PreTrainedModel, part: str) -> str:
    """That the model has no such part, and what it has."""
    known, others = set(part_of(model).values()), in_no_part(model)
    has = ", ".join(one for one in PART_PATHS if one in known) or "none"
    strays = f"; in none of them: {', '.join(others)}" if others else ""
    return f"{type(model).__name__} has no part {part!r} that visgain knows of (its parts: {has}{strays})"


def _ids(found: object) -> set[int]:
    """Ids of the parameters in a module, or of a single parameter; none of anything else."""
    if isinstance(found, nn.Module):
        return {id(parameter) for parameter in found.parameters()}
    return {id(found)} if isinstance(found, nn.Parameter) else set()


def _resolve(model: nn.Module, path: str) -> object:
    """What is at `path`, or None."""
    found: object = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
