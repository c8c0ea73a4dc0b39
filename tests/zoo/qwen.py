"""Pictures of any size as grids of merged patches, and rotary positions in three dimensions."""

from __future__ import annotations

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from visgain.vlm.load import NoVideos
from zoo.base import TEXT, Entry, byte_tokenizer, ids

# Qwen2-VL's own template, less videos.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PATCH = 4
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def tokenizer_and_processor(kind: type, **image_options):
    tokenizer = byte_tokenizer(
        [*SPECIAL, "<|image_pad|>", "<|video_pad|>"],
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, **image_options
    )
    processor = kind(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=NoVideos({"video_processor_type": "Qwen2VLVideoProcessor"}),
        chat_template=TEMPLATE,
    )
    return tokenizer, processor


def special(tokenizer) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def qwen2_vl():
    tokenizer, processor = tokenizer_and_processor(Qwen2VLProcessor)
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
        },
        text_config={**TEXT, **ids(tokenizer), "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
        tie_word_embeddings=True,
        **special(tokenizer),
    )
    return Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl():
    tokenizer, processor = tokenizer_and_processor(Qwen2_5_VLProcessor)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "window_size": 16,
            "fullatt_block_indexes": [2],
        },
        text_config={**TEXT, **ids(tokenizer), "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
        **special(tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "num_position_embeddings": 36,
}
QWEN3_TEXT = {
    **TEXT,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def qwen3_vl():
    tokenizer, processor = tokenizer_and_processor(Qwen3VLProcessor, **HALVES)
    config = Qwen3VLConfig(
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]},
        text_config={**QWEN3_TEXT, **ids(tokenizer)},
        **special(tokenizer),
    )
    return Qwen3VLForConditionalGeneration(config), processor


def qwen3_vl_moe():
    tokenizer, processor = tokenizer_and_processor(Qwen3VLProcessor, **HALVES)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    config = Qwen3VLMoeConfig(
        vision_config={**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]},
        text_config={**QWEN3_TEXT, **experts, **ids(tokenizer)},
        **special(tokenizer),
    )
    return Qwen3VLMoeForConditionalGeneration(config), processor


def qwen3_5():
    tokenizer, processor = tokenizer_and_processor(Qwen3VLProcessor, **HALVES)
    config = Qwen3_5Config(
        vision_config=QWEN3_VISION,
        text_config={
            **QWEN3_TEXT,
            **ids(tokenizer),
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                **ROPE,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.5,
            },
        },
        **special(tokenizer),
    )
    return Qwen3_5ForConditionalGeneration(config), processor


ENDS = ("<|im_end|>\n",)
ENTRIES = [
    Entry(name="qwen2_vl", make=qwen2_vl, ends=ENDS, note="M-RoPE; tied embeddings; tokens by the picture's size"),
    Entry(name="qwen2_5_vl", make=qwen2_5_vl, ends=ENDS, note="as qwen2_vl, with windows in the vision tower"),
    Entry(
        name="qwen3_vl",
        make=qwen3_vl,
        ends=ENDS,
        note="interleaved M-RoPE, q/k norms, and deepstack: vision features added to the first layers' image tokens",
    ),
    Entry(name="qwen3_vl_moe", make=qwen3_vl_moe, ends=ENDS, note="as qwen3_vl, experts in all layers but the first"),
    Entry(
        name="qwen3_5",
        cuttable=False,
        way="cached",  # a state goes from token to token
        make=qwen3_5,
        ends=ENDS,
        note="linear attention (gated delta rule, convolution) in two of three layers: a state instead of a mask",
    ),
]
