"""Pixtral's vision tower: pictures of any size, a token that ends each row."""

from __future__ import annotations

from PIL.Image import Image
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from zoo.base import TEXT, VISION, Entry, Pieces, TokenizerOnly, byte_tokenizer, ids

PATCH = 4


def tokenizer_and_processor():
    tokenizer = byte_tokenizer(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    return tokenizer, TokenizerOnly(tokenizer)


def rows(image: Image, merge: int) -> Pieces:
    side = PATCH * merge
    processor = PixtralImageProcessorPil(size={"longest_edge": 24}, patch_size=side)
    inputs = dict(processor([image], return_tensors="pt"))
    height, width = inputs["image_sizes"][0].tolist()
    lines = ["[IMG]" * (width // side)] * (height // side)
    return "[IMG_BREAK]".join(lines) + "[IMG_END]", inputs


def pixtral():
    tokenizer, processor = tokenizer_and_processor()
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**VISION, image_size=24, patch_size=PATCH),
        text_config=MistralConfig(**TEXT, **ids(tokenizer), head_dim=16, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config), processor


def mistral3():
    tokenizer, processor = tokenizer_and_processor()
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, image_size=24, patch_size=PATCH),
        text_config=MistralConfig(**TEXT, **ids(tokenizer), head_dim=8, sliding_window=12),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config), processor


WHY = "no processor: PixtralProcessor's module imports torchvision"
ENTRIES = [
    Entry(
        name="pixtral",
        make=pixtral,
        picture=lambda vlm, image: rows(image, 1),
        ends=("</s>",),
        note=f"a LLaVA with Pixtral's tower; image_sizes; row ends; {WHY}",
    ),
    Entry(
        name="mistral3",
        make=mistral3,
        picture=lambda vlm, image: rows(image, 2),
        ends=("</s>",),
        note=f"merged patches; windows of 12 tokens in every layer; {WHY}",
    ),
]
