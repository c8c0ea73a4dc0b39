"""Families that share little with the rest: packed pictures, patches without a tower, experts, chunked attention."""

from __future__ import annotations

from PIL.Image import Image
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaProcessor,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    FuyuConfig,
    FuyuForCausalLM,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    LlamaConfig,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6Processor,
    PixtralVisionConfig,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from visgain.vlm.load import VLM, NoVideos
from zoo.base import TEXT, VISION, Entry, Pieces, TokenizerOnly, byte_tokenizer, ids
from zoo.direct import PATCH, SIDE, patches, pixels
from zoo.qwen import ROPE
from zoo.tiles import CHATML

N_PATCHES = (SIDE // PATCH) ** 2
ARIA_SIDE, ARIA_PATCH = 980, 140  # its processor asks for pictures of this size, whatever the image processor's

# ---------------------------------------------------------------- DeepSeek

DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {% else %}Assistant: {% endif %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image_placeholder>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %}\n\n{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def deepseek_tokenizer():
    named = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    return byte_tokenizer(
        ["<|begin|>", "<|end|>", "<|pad|>", *named.values()],
        named,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )


def deepseek_vl():
    tokenizer = deepseek_tokenizer()
    processor = DeepseekVLProcessor(
        image_processor=DeepseekVLImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=2),
        tokenizer=tokenizer,
        chat_template=DEEPSEEK,
        num_image_tokens=N_PATCHES,
    )
    config = DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=LlamaConfig(**TEXT, **ids(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    return DeepseekVLForConditionalGeneration(config), processor


def janus():
    tokenizer = deepseek_tokenizer()
    processor = JanusProcessor(
        image_processor=JanusImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=2),
        tokenizer=tokenizer,
        chat_template=DEEPSEEK,
        num_image_tokens=N_PATCHES,
    )
    config = JanusConfig(
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 32, "depth": 2},
        vq_config={
            "num_embeddings": 8,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        text_config=LlamaConfig(**TEXT, **ids(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    return JanusForConditionalGeneration(config), processor


# ---------------------------------------------------------------- Aria


def aria():
    tokenizer = byte_tokenizer(
        ["<unk>", "<|im_start|>", "<|im_end|>", "<|img|>"],
        {"image_token": "<|img|>"},
        eos_token="<|im_end|>",
        pad_token="<unk>",
    )
    processor = AriaProcessor(
        image_processor=AriaImageProcessorPil(max_image_size=ARIA_SIDE, min_image_size=ARIA_PATCH),
        tokenizer=tokenizer,
        chat_template=CHATML.replace("PICTURE", "<|img|>"),
        size_conversion={ARIA_SIDE: 4},
    )
    config = AriaConfig(
        vision_config={"model_type": "idefics3_vision", **VISION, "image_size": ARIA_SIDE, "patch_size": ARIA_PATCH},
        text_config={**TEXT, **ids(tokenizer), "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        projector_patch_to_query_dict={(ARIA_SIDE // ARIA_PATCH) ** 2: 4},
        image_token_index=tokenizer.image_token_id,
    )
    return AriaForConditionalGeneration(config), processor


# ---------------------------------------------------------------- LightOnOCR


def lighton_ocr():
    named = {"image_token": "<|image_pad|>", "image_break_token": "<|break|>", "image_end_token": "<|end|>"}
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()],
        named,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    processor = LightOnOcrProcessor(
        image_processor=PixtralImageProcessorPil(size={"longest_edge": 24}, patch_size=2 * PATCH),
        tokenizer=tokenizer,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=CHATML.replace("PICTURE", "<|image_pad|>"),
    )
    config = LightOnOcrConfig(
        vision_config=PixtralVisionConfig(**VISION, image_size=24, patch_size=PATCH),
        text_config=Qwen3Config(**TEXT, **ids(tokenizer), head_dim=16),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    return LightOnOcrForConditionalGeneration(config), processor


# ---------------------------------------------------------------- MiniCPM-V


def minicpm():
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()],
        named,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    processor = MiniCPMV4_6Processor(
        image_processor=MiniCPMV4_6ImageProcessorPil(patch_size=PATCH, scale_resolution=32, max_slice_nums=4),
        video_processor=NoVideos(
            {"video_processor_type": "MiniCPMV4_6VideoProcessor", "slice_mode": False, "downsample_mode": "16x"}
        ),
        tokenizer=tokenizer,
        chat_template=CHATML.replace("PICTURE", "<|image_pad|>\n"),
    )
    config = MiniCPMV4_6Config(
        vision_config={**VISION, "image_size": 64, "patch_size": PATCH},
        text_config={
            "model_type": "qwen3_5_text",
            **TEXT,
            **ids(tokenizer),
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
        insert_layer_id=0,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    return MiniCPMV4_6ForConditionalGeneration(config), processor


# ---------------------------------------------------------------- Fuyu


def fuyu():
    tokenizer = byte_tokenizer(
        ["<pad>", "<s>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|"],
        {"image_token": "|SPEAKER|"},
        bos_token="<s>",
        eos_token="|ENDOFTEXT|",
        pad_token="<pad>",
    )
    text = {**TEXT, **ids(tokenizer), "model_type": "persimmon"}
    del text["num_key_value_heads"]
    config = FuyuConfig(patch_size=PATCH, image_size=SIDE, text_config=text, image_token_id=tokenizer.image_token_id)
    return FuyuForCausalLM(config), TokenizerOnly(tokenizer)


def fuyu_rows(vlm: VLM, image: Image) -> Pieces:
    rows, columns = (2, 4) if image.width > image.height else (3, 3)
    flat = patches(pixels(image, rows * PATCH, columns * PATCH)[None])[0]
    return ("|SPEAKER|" * columns + "|NEWLINE|") * rows, {"pixel_values": flat}


ENTRIES = [
    Entry(name="deepseek_vl", make=deepseek_vl, ends=("<|end|>",), note="as llava with SigLIP"),
    Entry(name="janus", make=janus, ends=("<|end|>",), note="has a second vision part, for drawing, that stays unused"),
    Entry(
        name="aria", since="5.23", make=aria, ends=("<|im_end|>\n",), note="experts; a padded picture with pixel_mask"
    ),
    Entry(name="lighton_ocr", make=lighton_ocr, ends=("<|im_end|>\n",), note="Pixtral's tower and Qwen3; image_sizes"),
    Entry(
        name="minicpmv4_6",
        since="5.23",
        cuttable=False,
        make=minicpm,
        way="cached",  # linear attention: a state goes from token to token
        ends=("<|im_end|>\n",),
        note="all pictures packed in one row of pixel_values [1, 3, patch, length] by target_sizes; linear attention",
    ),
    Entry(
        name="fuyu",
        since="5.23",
        make=fuyu,
        picture=fuyu_rows,
        ends=("|ENDOFTEXT|",),
        text="(none)",
        why="FuyuProcessor writes the prompt anew and ends it with a mark of its own",
        note="no vision tower: patches [N, values] go straight in",
    ),
]
