"""What of a model is trained: whole parts, low-rank adapters, or both."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from visgain.errors import ConfigError
from visgain.training.recipe import Recipe
from visgain.vlm.families import named_parts, part_modules
from visgain.vlm.load import VLM
from visgain.vlm.logits import output_head


def prepare_model(vlm: VLM, recipe: Recipe) -> Any:
    """The model with only the recipe's parts (and adapters) left trainable."""
    model = vlm.model
    if recipe.attention is not None:
        model.set_attn_implementation(recipe.attention)
    trained = named_parts(model, recipe.parts)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model if recipe.lora_rank is None else _with_lora(model, recipe, recipe.lora_rank)


def _with_lora(model: PreTrainedModel, recipe: Recipe, rank: int) -> Any:
    """Low-rank adapters on every linear layer of the language part; what was trainable stays so."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("LoRA needs peft: pip install 'visgain[lora]'") from None
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = output_head(model)
    language = {id(m) for part in part_modules(model, "language") for m in part.modules() if m is not head}
    targets = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in language
    ]
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if recipe.lora_alpha is None else recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
    )
    adapted = get_peft_model(model, lora)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return adapted
