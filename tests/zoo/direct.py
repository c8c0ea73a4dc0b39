"""Families whose image processors are written for torchvision alone: real processors, pictures prepared here."""

from __future__ import annotations

import numpy as np
import torch
from PIL.Image import Image
from transformers import (
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionProcessor,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlProcessor,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4Processor,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalProcessor,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from visgain.vlm.load import NoVideos
from zoo.base import TEXT, VISION, Entry, Prepared, byte_tokenizer, ids, plain_template
from zoo.qwen import ROPE

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
    processor = Cohere2VisionProcessor(
        image_processor=Prepared(cohere_tiles, patch_size=SIDE // PATCH // 2),
        tokenizer=tokenizer,
        chat_template=plain_template("<|IMG_PATCH|>", "<|END_OF_TURN_TOKEN|>"),
    )
    return Cohere2VisionForConditionalGeneration(config), processor


def cohere_tiles(image: Image) -> dict[str, torch.Tensor]:
    stack = tiles(image, thumbnail_first=False)
    return {"pixel_values": stack, "num_patches": torch.tensor([len(stack)])}


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
    processor = Lfm2VlProcessor(
        image_processor=Prepared(
            lfm2_picture, use_thumbnail=False, tile_size=SIDE, encoder_patch_size=PATCH, downsample_factor=2
        ),
        tokenizer=tokenizer,
        chat_template=plain_template("<image>", "<|im_end|>"),
    )
    return Lfm2VlForConditionalGeneration(config), processor


def lfm2_picture(image: Image) -> dict[str, torch.Tensor]:
    """As many patches as the picture's shape asks for, padded to 48."""
    rows, columns = (4, 6) if image.width > image.height else (4, 4)
    flat = patches(pixels(image, rows * PATCH, columns * PATCH)[None])
    padded = torch.zeros(1, 48, flat.shape[2])
    padded[:, : flat.shape[1]] = flat
    return {
        "pixel_values": padded,
        "pixel_attention_mask": (torch.arange(48) < flat.shape[1]).int()[None],
        "spatial_shapes": torch.tensor([[rows, columns]]),
        "image_rows": torch.tensor([1]),
        "image_cols": torch.tensor([1]),
        "image_sizes": torch.tensor([[rows * PATCH, columns * PATCH]]),
    }


# ---------------------------------------------------------------- Molmo 2

MOLMO = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<frame_start>", "<frame_end>"]
MOLMO += ["<im_low>", "<|image|>", "<|video|>"]


def molmo2():
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration, Molmo2Processor

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
    processor = Molmo2Processor(
        image_processor=Prepared(molmo_crops),
        video_processor=NoVideos({"video_processor_type": "Molmo2VideoProcessor"}),
        tokenizer=tokenizer,
        chat_template=plain_template("<|image|>", "<|im_end|>").removeprefix("{{ bos_token }}"),
    )
    return Molmo2ForConditionalGeneration(config), processor


def molmo_crops(image: Image) -> dict[str, torch.Tensor]:
    """All of the picture small, then its crops as one grid; a token pools 2 x 2 patches, named by their numbers."""
    stack = patches(tiles(image, thumbnail_first=True))
    side = SIDE // PATCH
    number = torch.arange(stack.shape[0] * stack.shape[1]).reshape(-1, side, side)
    grids = [number[0], torch.cat(list(number[1:]), dim=1)]
    pooling, sizes = [], []
    for grid in grids:
        rows, columns = grid.shape[0] // 2, grid.shape[1] // 2
        pooling.append(grid.reshape(rows, 2, columns, 2).permute(0, 2, 1, 3).reshape(-1, 4))
        sizes += [rows, columns]
    return {
        "pixel_values": stack,
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor([sizes]),
        "image_num_crops": torch.tensor([len(stack)]),
    }


# ---------------------------------------------------------------- Phi-4-multimodal


# Text alone, as its own: a picture is a token in the text.
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def phi4_multimodal():
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|end|>", "<|image|>", "<|audio|>", "<|user|>", "<|assistant|>"],
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
    processor = Phi4MultimodalProcessor(
        image_processor=Prepared(phi_crops),
        audio_processor=Phi4MultimodalFeatureExtractor(),
        tokenizer=tokenizer,
        chat_template=PHI,
    )
    return Phi4MultimodalForCausalLM(config), processor


def phi_crops(image: Image) -> dict[str, torch.Tensor]:
    stack = tiles(image, thumbnail_first=True)
    side, columns = SIDE // PATCH // 2, len(stack) - 1
    n_tokens = side * (side * columns + 1) + 1 + side * (side + 1)
    return {
        "image_pixel_values": stack[None],
        "image_sizes": torch.tensor([[SIDE, SIDE * columns]]),
        "image_attention_mask": torch.ones(1, len(stack), SIDE // PATCH, SIDE // PATCH),
        "num_img_tokens": torch.tensor([n_tokens]),
    }


# ---------------------------------------------------------------- Llama 4


def llama4():
    special = ["<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>"]
    tokenizer = byte_tokenizer(
        ["<|begin_of_text|>", "<|eot|>", "<|finetune_right_pad|>", "<|tile_y_separator|>", *special],
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
    )
    config = Llama4Config(
        vision_config={
            **VISION,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "image_size": SIDE,
            "patch_size": PATCH,
            "rope_parameters": ROPE,
        },
        text_config={
            **TEXT,
            **ids(tokenizer),
            "num_hidden_layers": 3,
            "head_dim": 8,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "moe_layers": [1],
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 1, 0],
            "floor_scale": 8,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
    )
    processor = Llama4Processor(
        image_processor=Prepared(llama4_tiles),
        tokenizer=tokenizer,
        patch_size=PATCH,
        chat_template=plain_template("<|image|>", "<|eot|>"),
    )
    return Llama4ForConditionalGeneration(config), processor


def llama4_tiles(image: Image) -> dict[str, torch.Tensor]:
    """Tiles, and all of the picture small if there are several."""
    stack = tiles(image, thumbnail_first=False)
    columns = len(stack) - 1
    return {"pixel_values": stack if columns > 1 else stack[:1], "aspect_ratios": torch.tensor([[1, columns]])}


ENTRIES = [
    Entry(
        name="cohere2_vision",
        cuttable=False,
        make=cohere2_vision,
        missing="Cohere2VisionImageProcessor",
        ends=("<|END_OF_TURN_TOKEN|>",),
        note="tiles by the picture's shape; one layer with a window of 12, one without positions; tied",
    ),
    Entry(
        name="lfm2_vl",
        cuttable=False,
        make=lfm2_vl,
        missing="Lfm2VlImageProcessor",
        way="cached",  # a state goes from token to token
        ends=("<|im_end|>",),
        note="short convolutions over tokens in two of three layers, which see no attention mask; tied",
    ),
    Entry(
        name="molmo2",
        since="5.23",
        make=molmo2,
        missing="Molmo2ImageProcessor",
        way="cached",  # all tokens of all pictures see each other
        looks_ahead=True,
        ends=("<|im_end|>",),
        note="image_token_pooling numbers patches within pixel_values; the processor writes BOS before any template",
    ),
    Entry(
        name="phi4_multimodal",
        make=phi4_multimodal,
        missing="Phi4MultimodalImageProcessor",
        ends=("<|end|>",),
        note="crops and row ends; a template of text alone; the image token's id is in the vision configuration",
    ),
    Entry(
        name="llama4",
        cuttable=False,
        make=llama4,
        missing="Llama4ImageProcessor",
        way="cached",  # the body is not apart from the head
        ends=("<|eot|>",),
        note="attention in chunks of 16, a layer without positions and scaled by position, experts",
    ),
]
