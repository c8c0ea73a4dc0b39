"""Pixtral's vision tower: pictures of any size, a token that ends each row."""

from __future__ import annotations

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from visgain.vlm.pixtral import mend_pixtral
from zoo.base import TEXT, VISION, Entry, byte_tokenizer, ids

PATCH = 4
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' }}{% for block in message['content'] %}"
    "{% if block['type'] == 'text' %}{{ block['text'] }}{% elif block['type'] in ['image', 'image_url'] %}{{ '[IMG]' }}"
    "{% endif %}{% endfor %}{{ '[/INST]' }}{% else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def tokenizer_and_processor(merge: int):
    mend_pixtral()
    from transformers.models.pixtral import PixtralProcessor  # is there without torchvision from here on

    tokenizer = byte_tokenizer(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessorPil(size={"longest_edge": 24}, patch_size=PATCH * merge),
        tokenizer=tokenizer,
        patch_size=PATCH,
        spatial_merge_size=merge,
        chat_template=TEMPLATE,
    )
    return tokenizer, processor


def pixtral():
    tokenizer, processor = tokenizer_and_processor(1)
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**VISION, image_size=24, patch_size=PATCH),
        text_config=MistralConfig(**TEXT, **ids(tokenizer), head_dim=16, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config), processor


def mistral3():
    tokenizer, processor = tokenizer_and_processor(2)
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, image_size=24, patch_size=PATCH),
        text_config=MistralConfig(**TEXT, **ids(tokenizer), head_dim=8, sliding_window=12),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config), processor


ENTRIES = [
    Entry(
        name="pixtral",
        make=pixtral,
        ends=("</s>",),
        note="a LLaVA with Pixtral's tower; image_sizes; row ends; its processor is mended to do without torchvision",
    ),
    Entry(
        name="mistral3",
        cuttable=False,
        make=mistral3,
        ends=("</s>",),
        note="merged patches; windows of 12 tokens in every layer; its processor is mended as Pixtral's",
    ),
]
