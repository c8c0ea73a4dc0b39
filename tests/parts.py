"""Vision towers and language models of several families, tiny, random and saved as their checkpoints are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tiny_llava import vicuna_like
from zoo.base import TEXT, byte_tokenizer, ids, randomise

SIDE, PATCH, LAYERS = 24, 8, 3
EYE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
WORDS: dict[str, Any] = {**EYE, "vocab_size": 60, "max_position_embeddings": 16}
del WORDS["patch_size"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's: it knows text alone."""


def _clip() -> tuple[Any, Any]:
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    config = CLIPConfig(vision_config={**EYE, "image_size": SIDE}, text_config=WORDS, projection_dim=16)
    return CLIPModel(config), images


def _clip_tower() -> tuple[Any, Any]:
    return CLIPVisionModel(CLIPVisionConfig(**EYE, image_size=SIDE)), _clip()[1]


def _siglip() -> tuple[Any, Any]:
    config = SiglipConfig(vision_config={**EYE, "image_size": SIDE}, text_config=WORDS)
    return SiglipModel(config), SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})


def _siglip_tower() -> tuple[Any, Any]:
    return SiglipVisionModel(SiglipVisionConfig(**EYE, image_size=SIDE)), _siglip()[1]


def _siglip2() -> tuple[Any, Any]:
    config = Siglip2Config(vision_config={**EYE, "num_patches": 9}, text_config=WORDS)
    return Siglip2Model(config), Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=9)


def _dinov2() -> tuple[Any, Any]:
    """No text was near it, but it is a tower as well."""
    return Dinov2Model(Dinov2Config(**EYE, image_size=SIDE, use_swiglu_ffn=False)), _clip()[1]


def _dinov2_with_registers() -> tuple[Any, Any]:
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**EYE, image_size=SIDE)), _clip()[1]


TOWERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "clip": _clip,
    "clip tower": _clip_tower,
    "siglip": _siglip,
    "siglip tower": _siglip_tower,
    "siglip2": _siglip2,
    "dinov2": _dinov2,
}
NO_TOWERS = {"dinov2 with registers": _dinov2_with_registers}
"""Those that give more than a vector a patch and a class token."""


def _llama() -> tuple[Any, Any]:
    tokenizer = vicuna_like("legacy", sees=False)
    return LlamaForCausalLM(LlamaConfig(**TEXT, **ids(tokenizer))), tokenizer


def _qwen(config: Any, model: Any, **options: Any) -> tuple[Any, Any]:
    """Head and embeddings are one, and there are more rows than tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    sizes = {**ids(tokenizer), "vocab_size": len(tokenizer) + 20}
    return model(config(**TEXT, **sizes, tie_word_embeddings=True, **options)), tokenizer


def _plain(config: Any, model: Any, **options: Any) -> tuple[Any, Any]:
    """Without a chat template or anything to pad with."""
    tokenizer = byte_tokenizer(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    sizes = {**TEXT, **ids(tokenizer), "pad_token_id": None, **options}
    if config in (GPTNeoXConfig, OPTConfig):
        del sizes["num_key_value_heads"]
    if config is OPTConfig:
        del sizes["intermediate_size"]
    return model(config(**sizes)), tokenizer


LANGUAGES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama": _llama,
    "qwen2": lambda: _qwen(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda: _qwen(Qwen3Config, Qwen3ForCausalLM, head_dim=8),
    "phi3": lambda: _plain(Phi3Config, Phi3ForCausalLM),
    "gpt_neox": lambda: _plain(GPTNeoXConfig, GPTNeoXForCausalLM),
    "opt": lambda: _plain(OPTConfig, OPTForCausalLM, ffn_dim=64, word_embed_proj_dim=32),
    "gemma": lambda: _plain(GemmaConfig, GemmaForCausalLM, head_dim=8),
}
NO_LANGUAGES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "phi": lambda: _plain(PhiConfig, PhiForCausalLM),
    "gemma2": lambda: _plain(Gemma2Config, Gemma2ForCausalLM, head_dim=8, final_logit_softcapping=1.0),
    "opt of two widths": lambda: _plain(OPTConfig, OPTForCausalLM, ffn_dim=64, word_embed_proj_dim=16),
}
"""Those whose logits LLaVA's head cannot give."""


def save(make: Callable[[], tuple[nn.Module, Any]], folder: Path) -> Path:
    """The checkpoint of a part, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, beside = make()
        randomise(model)
    model.save_pretrained(folder)
    beside.save_pretrained(folder)
    return folder
