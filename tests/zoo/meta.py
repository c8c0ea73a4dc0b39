"""Llama's own."""

from __future__ import annotations

from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from zoo.base import TEXT, Entry, byte_tokenizer, ids

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SIDE, PATCH = 24, 8


def mllama():
    tokenizer = byte_tokenizer(
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|pad|>"],
        {"image_token": "<|image|>"},  # the last id: it has an embedding and no logit
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
    )
    processor = MllamaProcessor(
        image_processor=MllamaImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_image_tiles=4),
        tokenizer=tokenizer,
        chat_template=LLAMA3,
    )
    config = MllamaConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 48,
            "intermediate_layers_indices": [0, 1],
            "image_size": SIDE,
            "patch_size": PATCH,
            "max_num_tiles": 4,
        },
        text_config={
            **TEXT,
            **ids(tokenizer),
            "vocab_size": tokenizer.image_token_id,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
        },
        image_token_index=tokenizer.image_token_id,
    )
    return MllamaForConditionalGeneration(config), processor


ENTRIES = [
    Entry(
        name="mllama",
        since="5.23",
        blind="drop",
        way="cached",  # cross-attention
        make=mllama,
        ends=("<|eot_id|>",),
        looks_ahead=True,
        note="cross-attention: one image token, tiles seen by two of four layers by cross_attention_mask [1, T, ...]; "
        "tokens before the first picture, which may see none, attend to all of all pictures",
    ),
]
