"""A Q-Former's queries in place of a picture."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from visgain.types import Encoded, Sample
from visgain.vlm.load import VLM
from zoo.base import TEXT, VISION, Entry, Pieces, TokenizerOnly, byte_tokenizer, ids

SIDE, QUERIES = 24, 3
QFORMER: dict[str, Any] = {**VISION, "encoder_hidden_size": 32, "cross_attention_frequency": 1}


def tokenizer():
    return byte_tokenizer(
        ["<s>", "<pad>", "</s>", "<image>"],
        {"image_token": "<image>"},
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


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
        image_token_index=fast.image_token_id,
    )
    return Blip2ForConditionalGeneration(config), TokenizerOnly(fast)


def instructblip():
    fast = tokenizer()
    config = InstructBlipConfig(
        vision_config={**VISION, "image_size": SIDE, "patch_size": 8},
        qformer_config={**QFORMER, "vocab_size": len(fast)},
        text_config=LlamaConfig(**TEXT, **ids(fast)),
        num_query_tokens=QUERIES,
        image_token_index=fast.image_token_id,
    )
    return InstructBlipForConditionalGeneration(config), TokenizerOnly(fast)


def queries(vlm: VLM, image: Image) -> Pieces:
    processor = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return "<image>" * QUERIES, dict(processor([image], return_tensors="pt"))


def instruction(vlm: VLM, sample: Sample, encoded: Encoded) -> dict[str, Any]:
    """The first question without its picture, once a picture: the Q-Former reads it too."""
    if not sample.images:
        return {}
    text = sample.turns[0].text.replace("<image>", "").strip()
    read = vlm.tokenizer([text] * len(sample.images), add_special_tokens=False, return_tensors="pt")
    return {"qformer_input_ids": read["input_ids"], "qformer_attention_mask": read["attention_mask"]}


WHY = "no processor: it puts the queries before the text on its own and takes no chat template"
ENTRIES = [
    Entry(
        name="blip-2",
        make=blip2,
        picture=queries,
        ends=("</s>",),
        note=f"OPT: learned positions that are counted from the attention mask; tied embeddings; {WHY}",
    ),
    Entry(
        name="instructblip",
        make=instructblip,
        picture=queries,
        more=instruction,
        ends=("</s>",),
        note=f"the Q-Former reads the question too (qformer_input_ids), so its features depend on the text; {WHY}",
    ),
]
