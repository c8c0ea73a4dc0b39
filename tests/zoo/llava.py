"""LLaVA and its descendants: a vision tower's patches, projected, in place of image tokens."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from visgain.vlm.load import NoVideos
from zoo.base import TEXT, VISION, Entry, byte_tokenizer, ids

VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% else %}ASSISTANT: {% for part in message['content'] %}{% generation %}{{ part['text'] }}</s>{% endgeneration %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} \n"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ part['text'] }}<|im_end|>{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant \n{% endif %}"
)

SIDE, PATCH = 24, 8
GRID = [[24, 48], [48, 24], [48, 48]]


def clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=16)


def llama_tokenizer():
    return byte_tokenizer(
        ["<pad>", "<s>", "</s>", "<image>"],
        {"image_token": "<image>"},
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def llava_processor(tokenizer) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


def llava():
    tokenizer = llama_tokenizer()
    config = LlavaConfig(
        vision_config=clip(),
        text_config=LlamaConfig(**TEXT, **ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config), llava_processor(tokenizer)


def vipllava():
    tokenizer = llama_tokenizer()
    config = VipLlavaConfig(
        vision_config=clip(),
        text_config=LlamaConfig(**TEXT, **ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layers=[-2, -1, 1],
    )
    return VipLlavaForConditionalGeneration(config), llava_processor(tokenizer)


def llava_next():
    tokenizer = llama_tokenizer()
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRID
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    config = LlavaNextConfig(
        vision_config=clip(),
        text_config=LlamaConfig(**TEXT, **ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=GRID,
        vision_feature_layer=-2,
    )
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision():
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        {"image_token": "<image>", "video_token": "<video>"},
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRID
        ),
        tokenizer=tokenizer,
        video_processor=NoVideos({"video_processor_type": "LlavaOnevisionVideoProcessor"}),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=QWEN,
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, **ids(tokenizer), tie_word_embeddings=True),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=GRID,
        tie_word_embeddings=True,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


ENTRIES = [
    Entry(name="llava", make=llava, ends=("</s>",)),
    Entry(name="vipllava", make=vipllava, ends=("</s>",), note="features of several layers side by side"),
    Entry(name="llava_next", make=llava_next, ends=("</s>",), note="tiles; the token count depends on the size"),
    Entry(
        name="llava_onevision",
        make=llava_onevision,
        ends=("<|im_end|>",),
        note="SigLIP and Qwen2, tied embeddings; tiles, bilinear pooling; a video processor in the class",
    ),
]
