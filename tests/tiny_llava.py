"""LLaVAs of the published shapes (336 pixels in patches of 14, SigLIP-384), a few thousand weights wide, and tokenizers
in the manner of Vicuna's and Qwen2's. No test may depend on their vocabularies."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from visgain.vlm.load import VLM

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,",
    "and polite answers to the user's questions. USER: What is this? ASSISTANT: A red cup on a table. No, a dog there.",
    "USER: How many people are in the image? ASSISTANT: There are two people, a man and a woman, in front of a house.",
    "system You are a helpful assistant. user Describe the picture in detail. assistant The white cat is sitting.",
] * 4


def vicuna_like(manner: str, *, sees: bool = True) -> PreTrainedTokenizerFast:
    """Words carry the space before them as a mark, digits stand alone, bytes are the last resort, BOS is added.

    `manner` is where else a mark stands: "legacy" (behind every special token, by a normalizer, as converted Llama
    tokenizers have it), "always" (the same by the pre-tokenizer), "first" (only where a text begins).
    Without `sees` it has no image token, as Vicuna's own.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always"), digits])
    special = ["<unk>", "<s>", "</s>", *["<image>"] * sees, *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if manner == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = digits
    else:
        spaces = pre_tokenizers.Metaspace(prepend_scheme=manner, split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, digits])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        **({"extra_special_tokens": {"image_token": "<image>"}} if sees else {}),
    )


def qwen2_like(bos: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen2's normalization and pre-tokenization; no BOS unless there is one to name."""
    tokenizer = Tokenizer(models.BPE())
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    spaces = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{words}|{spaces}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", *([bos] if bos else [])],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Sizes of a tower, or of a language model."""


def clip_llava(tokenizer: PreTrainedTokenizerFast, side: int = 336, *, do_pad: bool | None = None) -> VLM:
    """LLaVA-1.5: CLIP, Llama. `do_pad` gives it the image processor that can pad, and tells it whether to."""
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images = CLIPImageProcessorPil(**sizes) if do_pad is None else LlavaImageProcessorPil(**sizes, do_pad=do_pad)
    vision = CLIPVisionConfig(**SMALL, image_size=side, patch_size=14, projection_dim=8)
    text = LlamaConfig(**SMALL, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.image_token_id, vision_feature_layer=-2
    )
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VLM(name="tiny", model=LlavaForConditionalGeneration(config).eval(), processor=processor)


def siglip_llava(tokenizer: PreTrainedTokenizerFast, side: int = 384) -> VLM:
    """Open-Qwen2VL's shape: SigLIP without a class token, Qwen2."""
    images = SiglipImageProcessorPil(size={"height": side, "width": side})
    vision = SiglipVisionConfig(**SMALL, image_size=side, patch_size=14, vision_use_head=False)
    text = Qwen2Config(**SMALL, num_key_value_heads=2, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VLM(name="tiny", model=LlavaForConditionalGeneration(config).eval(), processor=processor)
