"""Others that take pictures of any size as grids of merged patches, as the Qwens do."""

from __future__ import annotations

from typing import Any

from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeProcessor,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VProcessor,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLProcessor,
    Qwen2Config,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3Processor,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from visgain.vlm.load import NoVideos
from zoo.base import TEXT, VISION, Entry, byte_tokenizer, ids
from zoo.qwen import ROPE

PATCH = 4
PICTURE: dict[str, Any] = {
    "patch_size": PATCH,
    "merge_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
}

# ---------------------------------------------------------------- GLM

GLM = (
    "[gMASK]<sop>{% for message in messages %}{% if message['role'] == 'user' %}<|user|>\n"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% else %}<|assistant|>\n"
    "{% for item in message['content'] %}{{ item['text'] }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKS = {f"{kind}_{edge}": f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")}


def glm(processor_class: type, image_processor: Any, config_class: type, model_class: type, **vision: Any):
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>", *MARKS.values()],
        {"image_token": "<|image|>", "video_token": "<|video|>"},
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    processor = processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=NoVideos({"video_processor_type": "Glm4vVideoProcessor"}),
        chat_template=GLM,
    )
    known = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MARKS.items()}
    config = config_class(
        vision_config={
            "model_type": "glm4v_vision",
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "image_size": 24,
        },
        text_config={
            "model_type": "glm4v_text",
            **TEXT,
            **ids(tokenizer),
            "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0},
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_start_token_id=known["image_begin"],
        image_end_token_id=known["image_end"],
        video_start_token_id=known["video_begin"],
        video_end_token_id=known["video_end"],
    )
    return model_class(config), processor


def glm4v():
    return glm(Glm4vProcessor, Glm4vImageProcessorPil(**PICTURE), Glm4vConfig, Glm4vForConditionalGeneration)


def glm46v():
    return glm(Glm46VProcessor, Glm46VImageProcessorPil(**PICTURE), Glm46VConfig, Glm46VForConditionalGeneration)


# ---------------------------------------------------------------- Baidu's

ERNIE = (
    "<|begin_of_sentence|>{% for message in messages %}{% if message['role'] == 'user' %}User: "
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}"
    "Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{% else %}{{ item['text'] }}{% endif %}{% endfor %}\n"
    "{% else %}Assistant: {% for item in message['content'] %}{{ item['text'] }}{% endfor %}<|end_of_sentence|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


def baidu_tokenizer():
    named = {
        f"{kind}_{name}token": f"<|{kind.upper()}_{mark}|>"
        for kind in ("image", "video")
        for name, mark in (("", "PLACEHOLDER"), ("start_", "START"), ("end_", "END"))
    }
    return byte_tokenizer(
        ["<unk>", "<|begin_of_sentence|>", "<|end_of_sentence|>", *named.values()],
        named,
        bos_token="<|begin_of_sentence|>",
        eos_token="<|end_of_sentence|>",
        pad_token="<unk>",
    )


def ernie():
    tokenizer = baidu_tokenizer()
    processor = Ernie4_5_VLMoeProcessor(
        image_processor=Ernie4_5_VLMoeImageProcessorPil(**PICTURE),
        tokenizer=tokenizer,
        video_processor=NoVideos({"video_processor_type": "Ernie4_5_VLMoeVideoProcessor", "font": "none"}),
        chat_template=ERNIE,
    )
    config = Ernie4_5_VLMoeConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
        },
        text_config={
            **TEXT,
            **ids(tokenizer),
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": [32, 16],
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]},
        },
        image_start_token_id=tokenizer.image_start_token_id,
        image_end_token_id=tokenizer.image_end_token_id,
        image_token_id=tokenizer.image_token_id,
        video_start_token_id=tokenizer.video_start_token_id,
        video_end_token_id=tokenizer.video_end_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    return Ernie4_5_VLMoeForConditionalGeneration(config), processor


def paddleocr():
    tokenizer = baidu_tokenizer()
    processor = PaddleOCRVLProcessor(
        image_processor=PaddleOCRVLImageProcessorPil(**PICTURE),
        tokenizer=tokenizer,
        chat_template=ERNIE,
    )
    config = PaddleOCRVLConfig(
        vision_config={**VISION, "patch_size": PATCH, "image_size": 24},
        text_config={
            **TEXT,
            **ids(tokenizer),
            "head_dim": 16,
            "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]},
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.image_start_token_id,
        vision_end_token_id=tokenizer.image_end_token_id,
        tie_word_embeddings=False,
    )
    return PaddleOCRVLForConditionalGeneration(config), processor


# ---------------------------------------------------------------- VideoLLaMA 3

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|image_pad|>\n{% else %}{{ item['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def video_llama_3():
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"],
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    processor = VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessorPil(**PICTURE),
        tokenizer=tokenizer,
        video_processor=NoVideos({"video_processor_type": "VideoLlama3VideoProcessor"}),
        chat_template=CHATML,
    )
    config = VideoLlama3Config(
        vision_config={**VISION, "patch_size": PATCH},
        text_config=Qwen2Config(**TEXT, **ids(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    return VideoLlama3ForConditionalGeneration(config), processor


UNENDED = "the template ends no turn: what follows an answer is the next speaker's mark"
ENTRIES = [
    Entry(name="glm4v", make=glm4v, ends=("",), note=f"M-RoPE in interleaved halves; {UNENDED}"),
    Entry(name="glm46v", make=glm46v, ends=("",), note=f"as glm4v; {UNENDED}"),
    Entry(
        name="ernie4_5_vl_moe",
        way="cached",  # feed-forward parts that take which tokens are a picture's
        make=ernie,
        ends=("<|end_of_sentence|>",),
        note="other experts for image tokens than for text (moe_mm_token_type_ids); M-RoPE; tied",
    ),
    Entry(
        name="paddleocr_vl",
        since="5.23",
        make=paddleocr,
        ends=("<|end_of_sentence|>",),
        note="M-RoPE; positions interpolated",
    ),
    Entry(name="video_llama_3", make=video_llama_3, ends=("<|im_end|>\n",), note="image_merge_sizes; plain positions"),
]
