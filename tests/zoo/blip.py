"""A Q-Former's queries in place of a picture."""

from __future__ import annotations

from typing import Any

from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    OPTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from zoo.base import TEXT, VISION, Entry, byte_tokenizer, ids

SIDE, QUERIES = 24, 3
QFORMER: dict[str, Any] = {**VISION, "encoder_hidden_size": 32, "cross_attention_frequency": 1}


def tokenizer():
    return byte_tokenizer(
        ["<s>", "<pad>", "</s>", "<image>"],  # without a name: the processors then take it for a string that it is not
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def pictures() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})


def blip2():
    fast = tokenizer()
    config = Blip2Config(
        vision_config={**VISION, "image_size": SIDE, "patch_size": 8},
        qformer_config=QFORMER,
        text_config=OPTConfig(
            **ids(fast),
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            word_embed_proj_dim=32,
        ),
        num_query_tokens=QUERIES,
        image_token_index=fast.convert_tokens_to_ids("<image>"),
    )
    processor = Blip2Processor(pictures(), fast, num_query_tokens=QUERIES)
    return Blip2ForConditionalGeneration(config), processor


def instructblip():
    fast = tokenizer()
    config = InstructBlipConfig(
        vision_config={**VISION, "image_size": SIDE, "patch_size": 8},
        qformer_config={**QFORMER, "vocab_size": len(fast)},
        text_config=LlamaConfig(**TEXT, **ids(fast)),
        num_query_tokens=QUERIES,
        image_token_index=fast.convert_tokens_to_ids("<image>"),
    )
    processor = InstructBlipProcessor(pictures(), fast, tokenizer(), num_query_tokens=QUERIES)
    return InstructBlipForConditionalGeneration(config), processor


ENTRIES = [
    Entry(
        name="blip-2",
        blind="mask",
        cuttable=False,  # takes no text without pictures
        text="completion",
        way="single",  # the body is not apart from the head
        make=blip2,
        ends=("</s>",),
        pictures="one",
        note="no chat template: a question that is completed; OPT: learned positions that are counted from the "
        "attention mask; tied embeddings",
    ),
    Entry(
        name="instructblip",
        blind="mask",
        cuttable=False,  # takes no text without pictures
        text="completion",
        way="single",  # the body is not apart from the head
        make=instructblip,
        ends=("</s>",),
        pictures="one",
        note="as blip-2; the Q-Former reads the question too (qformer_input_ids), so its features depend on the text",
    ),
]
