"""The trained model as a plain Hugging Face folder, however it was shared while it was trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visgain.storage import storage_errors
from visgain.training.checkpoint import CheckpointedTrainer
from visgain.vlm.load import VLM


def outline(model: Any) -> Any:
    """A copy of `model` without memory for its weights, to put whole ones into when `model` itself has been sharded."""
    # What deepcopy finds in its memo it takes for copied.
    memo = {id(weight): _shape_of(weight) for weight in model.parameters()}
    return copy.deepcopy(model, memo)


def _shape_of(weight: nn.Parameter) -> nn.Parameter:
    shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 cuts weights while they are loaded
    return nn.Parameter(torch.empty(shape, dtype=weight.dtype, device="meta"), weight.requires_grad)


def whole_model(trainer: CheckpointedTrainer, empty: Any) -> Any:
    """The trained model with all its weights in the first process; to be called in all. None in the others.

    `empty`: the outline of the model before the training.
    """
    if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        return trainer.model if trainer.is_world_process_zero() else None
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return None
    empty.load_state_dict(weights, assign=True)
    inner = empty.get_base_model() if hasattr(empty, "get_base_model") else empty
    if any(hasattr(weight, "ds_id") for weight in trainer.model.parameters()):
        # Loading for ZeRO-3, transformers notes renamings that it has not done, and would undo them in the file.
        # Without a note it takes those of the model's type.
        inner._weight_conversions = None
    inner.tie_weights()
    return empty


def save_model(model: Any, vlm: VLM, out: Path, dtype: str) -> None:
    """Write `model` and its processor to `out`. Adapters are merged into the weights, and kept beside them."""
    with storage_errors(out):
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(out / "adapter")
            model = model.merge_and_unload()
        model.to(getattr(torch, dtype)).save_pretrained(out)
        vlm.processor.save_pretrained(out)
