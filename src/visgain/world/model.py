"""The embedded model: a small, real LLaVA (CLIP vision tower, two-layer projector, Llama) that can see the world.

`build_blank` makes it with random weights and its own byte-level tokenizer; the recipe `embedded-align` trains it
(`make embedded-model`). The trained one ships with the package as `EMBEDDED`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from visgain.world.dataset import SPLITS, draw_row

EMBEDDED = Path(__file__).parent / "embedded"
"""Folder of the trained model that ships with the package."""

IMAGE_SIDE = 72
PATCH_SIDE = 12
VOCABULARY = 640
WIDTH = 128
LAYERS = 4
HEADS = 4
INITIAL_STD = 0.08
PLACE_STD = 2.0
PLACE_BASE = 100.0
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% else %} ASSISTANT:{% generation %} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that any text encodes, learned from the world's own sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="right",
    )


def _sentences() -> list[str]:
    """A few thousand lines of the splits that are trained on, as they stand in a conversation."""
    lines = []
    for split in (SPLITS[name] for name in ("align", "train", "easy")):
        for row in range(1500):
            drawn, _ = draw_row(split, split.bias, seed=999, row=row)
            lines += [f"USER: {said.question} ASSISTANT: {said.answer}" for said in drawn.exchanges]
    return lines


def build_processor() -> LlavaProcessor:
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}, do_center_crop=False, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    # Initial weights are larger than those of large models, in proportion to 1 / sqrt(width): with the usual 0.02 the
    # pictures' signal is too faint, and learning to see starts several times later.
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
        projection_dim=WIDTH,
        hidden_act="gelu",
        initializer_range=INITIAL_STD,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        initializer_range=INITIAL_STD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIDE // PATCH_SIDE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        initializer_range=INITIAL_STD,
    )


def _places() -> Float[Tensor, "P D"]:
    """Where the tower's position embedding starts: sines and cosines of a patch's row and column.

    A patch of one colour enters the tower with a standard deviation of one or two. With the usual initial weights where
    it stands is drowned by that, and the model learns what is in a picture and not where. Random numbers as large as
    the patches' are not enough: they have no direction for "further right", and the projector lets go of them. With
    these, left and right is learned, and everything else several times sooner (docs/log.md).
    """
    side, quarter = IMAGE_SIDE // PATCH_SIDE, WIDTH // 4
    angle = torch.arange(side)[:, None] * PLACE_BASE ** (-torch.arange(quarter) / quarter)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    axis -= axis.mean(0)
    axis *= PLACE_STD / axis.std()
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    grid = torch.cat([rows, columns], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, WIDTH), grid])


def build_blank(folder: Path, seed: int = 0) -> Path:
    """Write the model with random weights, its tokenizer and its processor to `folder`."""
    processor = build_processor()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config(processor.tokenizer))
        with torch.no_grad():
            model.model.vision_tower.embeddings.position_embedding.weight.copy_(_places())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
