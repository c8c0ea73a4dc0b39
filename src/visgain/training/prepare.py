"""What of a model is trained: whole parts, low-rank adapters, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from visgain.errors import ConfigError
from visgain.training.recipe import Recipe
from visgain.vlm.families import named_parts, part_modules
from visgain.vlm.load import LOADING, VLM, loading_reason
from visgain.vlm.logits import output_head


def prepare_model(vlm: VLM, recipe: Recipe) -> Any:
    """The model with only the recipe's parts (and adapters) left trainable.

    Raises ModelError if it has not all of them.
    """
    model = vlm.model
    if recipe.attention is not None:
        _set_attention(model, recipe.attention)
    trained = named_parts(model, recipe.parts)
    if recipe.vision_from_layer is not None:
        trained -= named_parts(model, ("vision",)) - _upper_layers(model, recipe.vision_from_layer)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model if recipe.lora_rank is None else _with_lora(model, recipe, recipe.lora_rank)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Let `model` compute attention by the implementation of this name. Raises ConfigError if it cannot."""
    try:
        model.set_attn_implementation(name)
    except LOADING as error:
        raise ConfigError(
            f"the recipe's attention is {name!r}, which cannot be used here: {loading_reason(error).rstrip('.')}; "
            "leave it out, or take eager or sdpa"
        ) from error


def set_precision(model: nn.Module, dtype: str) -> None:
    """Keep what is trained in float32, and what is frozen in `dtype`.

    Optimiser steps are small beside the weights, so 16 bits would round most of them away.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else getattr(torch, dtype))


def recompute_activations(model: Any) -> None:
    """Let the layers of `model` forget their activations, and compute them again in the backward pass."""
    # transformers renamed it; only this variant of torch's works when parts of the model are frozen or left out.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"--gradient-checkpointing: {error}") from error


def _upper_layers(model: PreTrainedModel, first: int) -> set[int]:
    """Ids of the parameters in the vision part's layers from number `first` on, and of nothing that is in no layer.

    Raises ConfigError if there are no such layers.
    """
    stacks = [
        stack for part in part_modules(model, "vision") for stack in part.modules() if isinstance(stack, nn.ModuleList)
    ]
    layers = max(stacks, key=len, default=nn.ModuleList())
    if not first < len(layers):
        raise ConfigError(f"vision_from_layer is {first}, and the vision part has {len(layers)} layers, counted from 0")
    return {id(parameter) for layer in layers[first:] for parameter in layer.parameters()}


def shard_by_layer(model: Any) -> None:
    """Let FSDP cut `model` at the layers that it has. LLaVA names those of a text tower, which it has not, as well."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner._no_split_modules = set(inner._no_split_modules or ()) & {type(module).__name__ for module in model.modules()}


def _with_lora(model: PreTrainedModel, recipe: Recipe, rank: int) -> Any:
    """Low-rank adapters on every linear layer of the language part; what was trainable stays so."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("LoRA needs peft: pip install 'visgain[lora]'") from None
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = output_head(model)
    language = {id(m) for part in part_modules(model, "language") for m in part.modules() if m is not head}
    matrices = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in language  # Conv1D: GPT-2's transposed linear layer
    }
    if not matrices:
        raise ConfigError(f"--lora-rank {rank}: the language part of {type(model).__name__} has no linear layers")
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if recipe.lora_alpha is None else recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(matrices),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in matrices.values()),
    )
    adapted = get_peft_model(model, lora)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return adapted
