"""Families whose picture processing is written for torchvision alone: prepared here, in the same layout."""

from __future__ import annotations

import numpy as np
import torch
from PIL.Image import Image
from transformers import (
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from visgain.types import Encoded, Sample
from visgain.vlm.load import VLM
from zoo.base import TEXT, VISION, Entry, Pieces, TokenizerOnly, byte_tokenizer, ids

SIDE, PATCH = 16, 4


def pixels(image: Image, height: int, width: int) -> torch.Tensor:
    """[3, height, width] in [-1, 1]."""
    values = np.asarray(image.convert("RGB").resize((width, height))) / 127.5 - 1
    return torch.from_numpy(values).float().permute(2, 0, 1)


def tiles(image: Image, *, thumbnail_first: bool) -> torch.Tensor:
    """[tiles, 3, SIDE, SIDE]: the picture in one row of two tiles if it is wide, else one tile; and all of it small."""
    columns = 2 if image.width > image.height else 1
    whole = pixels(image, SIDE, columns * SIDE)
    cut = list(whole.split(SIDE, dim=2))
    small = pixels(image, SIDE, SIDE)
    return torch.stack([small, *cut] if thumbnail_first else [*cut, small])


def patches(stack: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] as [N, patches, PATCH * PATCH * 3]."""
    n, _, height, width = stack.shape
    grid = stack.reshape(n, 3, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, PATCH * PATCH * 3)


# ---------------------------------------------------------------- Cohere's Command A Vision


def cohere2_vision():
    named = {
        "image_token": "<|IMG_PATCH|>",
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    tokenizer = byte_tokenizer(
        ["<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", *named.values()],
        named,
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
    )
    config = Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, vision_use_head=False),
        text_config=Cohere2Config(
            **TEXT,
            **ids(tokenizer),
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"],
            logit_scale=0.5,
        ),
        image_token_id=tokenizer.image_token_id,
        alignment_intermediate_size=64,
    )
    return Cohere2VisionForConditionalGeneration(config), TokenizerOnly(tokenizer)


def cohere_tiles(vlm: VLM, image: Image) -> Pieces:
    stack = tiles(image, thumbnail_first=False)
    tile = "<|IMG_PATCH|>" * (SIDE // PATCH // 2) ** 2 + "<|IMG_LINE_BREAK|>"
    return f"<|START_OF_IMG|>{tile * len(stack)}<|END_OF_IMG|>", {"pixel_values": stack}


# ---------------------------------------------------------------- LFM2-VL


def lfm2_vl():
    special = ["<|pad|>", "<|startoftext|>", "<|im_end|>", "<image>", "<|image_start|>", "<|image_end|>"]
    tokenizer = byte_tokenizer(
        special,
        {"image_token": "<image>"},
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    config = Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(**VISION, patch_size=PATCH, num_patches=16, vision_use_head=False),
        text_config=Lfm2Config(
            **TEXT | {"num_hidden_layers": 3},
            **ids(tokenizer),
            layer_types=["conv", "full_attention", "conv"],
            block_auto_adjust_ff_dim=False,
        ),
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=32,
    )
    return Lfm2VlForConditionalGeneration(config), TokenizerOnly(tokenizer)


def lfm2_picture(vlm: VLM, image: Image) -> Pieces:
    """As many patches as the picture's shape asks for, padded to 48."""
    rows, columns = (4, 6) if image.width > image.height else (4, 4)
    flat = patches(pixels(image, rows * PATCH, columns * PATCH)[None])
    padded = torch.zeros(1, 48, flat.shape[2])
    padded[:, : flat.shape[1]] = flat
    inputs = {
        "pixel_values": padded,
        "pixel_attention_mask": (torch.arange(48) < flat.shape[1]).int()[None],
        "spatial_shapes": torch.tensor([[rows, columns]]),
    }
    return f"<|image_start|>{'<image>' * (rows * columns // 4)}<|image_end|>", inputs


# ---------------------------------------------------------------- Molmo 2

MOLMO = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<frame_start>", "<frame_end>"]


def molmo2():
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_end|>"],
        {f"extra_{number}": token for number, token in enumerate(MOLMO)},  # the last ids: embedded, never predicted
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    known = {token: tokenizer.convert_tokens_to_ids(token) for token in MOLMO}
    text = {
        **TEXT,
        **ids(tokenizer),
        "vocab_size": len(tokenizer) - len(MOLMO),
        "additional_vocab_size": len(MOLMO),
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Molmo2Config(
        vision_config={**VISION, **heads, "image_size": [SIDE, SIDE], "patch_size": PATCH},
        adapter_config={
            **heads,
            "hidden_size": 32,
            "vision_feature_layer": [1, 0],
            "intermediate_size": 48,
            "text_hidden_size": 32,
        },
        text_config=text,
        image_start_token_id=known["<im_start>"],
        low_res_image_start_token_id=known["<low_res_im_start>"],
        image_end_token_id=known["<im_end>"],
        image_patch_id=known["<im_patch>"],
        frame_start_token_id=known["<frame_start>"],
        frame_end_token_id=known["<frame_end>"],
    )
    return Molmo2ForConditionalGeneration(config), TokenizerOnly(tokenizer)


def molmo_crops(vlm: VLM, image: Image) -> Pieces:
    """All of the picture small, then its crops as one grid; a token pools 2 x 2 patches, named by their numbers."""
    stack = patches(tiles(image, thumbnail_first=True))
    side = SIDE // PATCH
    number = torch.arange(stack.shape[0] * stack.shape[1]).reshape(-1, side, side)
    grids = [number[0], torch.cat(list(number[1:]), dim=1)]
    pooling, text, sizes = [], "", []
    for grid, start in zip(grids, ("<low_res_im_start>", "<im_start>"), strict=True):
        rows, columns = grid.shape[0] // 2, grid.shape[1] // 2
        pooling.append(grid.reshape(rows, 2, columns, 2).permute(0, 2, 1, 3).reshape(-1, 4))
        text += start + ("<im_patch>" * columns + "<im_col>") * rows + "<im_end>"
        sizes += [rows, columns]
    inputs = {
        "pixel_values": stack,
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor([sizes]),
        "image_num_crops": torch.tensor([len(stack)]),
    }
    return text, inputs


def molmo_types(vlm: VLM, sample: Sample, encoded: Encoded) -> dict[str, torch.Tensor]:
    """1 at every token of a picture, marks included: all of them see each other, across pictures too."""
    known = vlm.tokenizer.convert_tokens_to_ids(MOLMO)
    return {"mm_token_type_ids": torch.from_numpy(np.isin(encoded.input_ids, known)).long()[None]}


# ---------------------------------------------------------------- Phi-4-multimodal


def phi4_multimodal():
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|end|>", "<|image|>", "<|audio|>"],
        {"image_token": "<|image|>", "audio_token": "<|audio|>"},
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
    )
    config = Phi4MultimodalConfig(
        **TEXT,
        **ids(tokenizer),
        vision_config={
            **VISION,
            "num_hidden_layers": 3,
            "image_size": SIDE,
            "crop_size": SIDE,
            "patch_size": PATCH,
            "image_token_id": tokenizer.image_token_id,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 4,
            "input_size": 8,
            "audio_token_id": tokenizer.audio_token_id,
        },
    )
    return Phi4MultimodalForCausalLM(config), TokenizerOnly(tokenizer)


def phi_crops(vlm: VLM, image: Image) -> Pieces:
    stack = tiles(image, thumbnail_first=True)
    side, columns = SIDE // PATCH // 2, len(stack) - 1
    n_tokens = side * (side * columns + 1) + 1 + side * (side + 1)
    inputs = {
        "image_pixel_values": stack[None],
        "image_sizes": torch.tensor([[SIDE, SIDE * columns]]),
        "image_attention_mask": torch.ones(1, len(stack), SIDE // PATCH, SIDE // PATCH),
    }
    return "<|image|>" * n_tokens, inputs


WHY = "no processor: its image processor is written for torchvision"
ENTRIES = [
    Entry(
        name="cohere2_vision",
        make=cohere2_vision,
        picture=cohere_tiles,
        ends=("<|END_OF_TURN_TOKEN|>",),
        note=f"tiles by the picture's shape; one layer with a window of 12, one without positions; tied; {WHY}",
    ),
    Entry(
        name="lfm2_vl",
        make=lfm2_vl,
        picture=lfm2_picture,
        ends=("<|im_end|>",),
        note=f"short convolutions over tokens in two of three layers, which see no attention mask; tied; {WHY}",
    ),
    Entry(
        name="molmo2",
        make=molmo2,
        picture=molmo_crops,
        more=molmo_types,
        looks_ahead=True,
        ends=("<|im_end|>",),
        note=f"image_token_pooling numbers patches within pixel_values; all image tokens see each other; {WHY}",
    ),
    Entry(
        name="phi4_multimodal",
        make=phi4_multimodal,
        picture=phi_crops,
        ends=("<|end|>",),
        note=f"crops and row ends; the image token's id is in the vision part's configuration; {WHY}",
    ),
]
