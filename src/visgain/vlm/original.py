r"""Whole checkpoints of the original LLaVA code (LLaVA-1.5, ShareGPT4V) as Hugging Face folders.

    python -m visgain.vlm.original llava-v1.5-7b llava-v1.5-7b-hf [clip-vit-large-patch14-336]

The same parameters under other names, the vision tower from the checkpoint if it is in there, else from the folder or
hub name that the checkpoint or the caller names. An image token is added behind the vocabulary: its embedding is never
used, and its output row is a copy of the unknown token's, which a trained model gives no probability to speak of.
Weights are read as tensors and nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from visgain.errors import ModelError, VisgainError
from visgain.storage import storage_errors
from visgain.types import IMAGE_MARK
from visgain.vlm.load import is_original
from visgain.vlm.projector import projector_tensors, read_tensors

LANGUAGES = {"Llama": "llama", "Mistral": "mistral", "Qwen": "qwen2"}
"""What the name of an original architecture (LlavaLlamaForCausalLM) says about its language model."""

OWN_KEYS = re.compile(
    r"mm_|tune_|freeze_|unfreeze_|use_mm|use_cache|image_|tokenizer_|vision_|pretrain|hidden_size_|architectures$|"
    r"model_type$|_name_or_path$|transformers_version$|torch_dtype$|auto_map$"
)
"""Keys of an original configuration that say nothing about the language model."""

PLACES = (
    (re.compile(r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)"), r"model.vision_tower.\1"),
    (re.compile(r"model\.((?:embed_tokens|layers|norm)\..+)"), r"model.language_model.\1"),
    (re.compile(r"(lm_head\.weight)"), r"\1"),
)
"""Where the parameters of an original checkpoint are, and where in Hugging Face's LLaVA, projector apart."""

BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|position_ids)")
"""What old checkpoints keep that is computed today."""

KNOWN_TOWER = "clip-vit-large-patch14-336"


def convert(checkpoint: Path, out: Path, vision: str | None = None) -> Path:
    """Write `checkpoint`, a folder of the original LLaVA code, as a Hugging Face LLaVA to `out`, which must not exist.

    `vision` is the folder or hub name of the vision tower, if that of the checkpoint's configuration is not it. Raises
    ModelError if the checkpoint is another kind, incomplete, or needs more than tensors to be read; StorageError if
    `out` cannot be written.
    """
    config = _read_config(checkpoint)
    if out.exists():
        raise ModelError(f"{out} is there already; name a folder that is not")
    tensors = dict(_renamed(_weights(checkpoint), checkpoint))
    tower = vision or str(config.get("mm_vision_tower", ""))
    if not any(name.startswith("model.vision_tower.") for name in tensors):
        tensors |= _tower_tensors(tower)
    tokenizer = _tokenizer(checkpoint)
    whole = LlavaConfig(
        vision_config=_tower_config(tower),
        text_config=_language_config(config, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if config.get("mm_vision_select_feature") == "cls_patch" else "default",
        projector_hidden_act="gelu" if "model.multi_modal_projector.linear_2.weight" in tensors else "linear",
    )
    if "model.language_model.embed_tokens.weight" not in tensors:
        raise ModelError(
            f"{checkpoint} holds no language model; a projector alone goes into an assembled one: --projector"
        )
    model = _filled(whole, _completed(tensors, len(tokenizer), tokenizer.unk_token_id), checkpoint)
    save_whole(model, _processor(whole, tokenizer), out)
    return out


# ---------------------------------------------------------------- what is read


def _read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json. Raises ModelError if it is not that of a LLaVA-1.5."""
    try:
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {checkpoint / 'config.json'}: {str(error).splitlines()[0]}") from error
    if not is_original(config):
        raise ModelError(f"{checkpoint} is no checkpoint of the original LLaVA code: its config.json names no tower")
    if (checkpoint / "adapter_config.json").exists() or (checkpoint / "non_lora_trainables.bin").exists():
        raise ModelError(f"{checkpoint} holds LoRA adapters; merge them into their model with the original code first")
    tiles = "anyres" in str(config.get("image_aspect_ratio")) or "unpad" in str(config.get("mm_patch_merge_type"))
    if tiles:
        raise ModelError(f"{checkpoint} cuts pictures into tiles (LLaVA-NeXT); use its llava-hf version")
    if config.get("mm_use_im_start_end"):
        raise ModelError(f"{checkpoint} puts tokens around pictures (mm_use_im_start_end), which no LLaVA-1.5 does")
    return config


def _weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in the folder's shards. Raises ModelError if there are none or one is missing."""
    shards: list[Path] = []
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = checkpoint / f"{kind}.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            shards = [checkpoint / Path(name).name for name in sorted(names)]
        elif (checkpoint / kind).is_file():
            shards = [checkpoint / kind]
        if shards:
            break
    if not shards:
        raise ModelError(f"{checkpoint} holds no weights (model.safetensors or pytorch_model.bin, or shards of them)")
    for shard in shards:
        yield from read_tensors(shard).items()


def _renamed(weights: Iterator[tuple[str, Tensor]], checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights under Hugging Face's names. Raises ModelError for one that has no place there."""
    projector: dict[str, Tensor] = {}
    for name, tensor in weights:
        places = (pattern.fullmatch(name) for pattern, _ in PLACES)
        found = next(((match, new) for match, (_, new) in zip(places, PLACES, strict=True) if match), None)
        if ".mm_projector." in name:
            projector[name] = tensor
        elif BUFFERS.fullmatch(name):
            continue
        elif found is None:
            raise ModelError(f"{checkpoint} holds {name}, which has no place in a LLaVA-1.5")
        else:
            yield found[0].expand(found[1]), tensor
    for name, tensor in projector_tensors(projector, str(checkpoint)).items():
        yield f"model.multi_modal_projector.{name}", tensor


def _tower_config(tower: str) -> PreTrainedConfig:
    """The CLIP that `tower` names; the one that everybody uses is known without looking."""
    if Path(tower).name == KNOWN_TOWER and not Path(tower).is_dir():
        return LlavaConfig().vision_config
    return _from_tower(tower, CLIPVisionConfig)


def _tower_tensors(tower: str) -> dict[str, Tensor]:
    model = _from_tower(tower, CLIPVisionModel, use_safetensors=True)
    return {f"model.vision_tower.{name}": tensor for name, tensor in model.state_dict().items()}


def _from_tower(tower: str, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(tower, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load the vision tower {tower!r}: {str(error).splitlines()[0]}; name another folder for it"
        ) from error


def _tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's tokenizer with an image token behind its vocabulary."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"cannot load the tokenizer of {checkpoint}: {str(error).splitlines()[0]}; a tokenizer.model needs "
            "`pip install sentencepiece protobuf`, or a tokenizer.json beside it"
        ) from error
    tokenizer.add_tokens(AddedToken(IMAGE_MARK, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _language_config(config: Mapping[str, Any], tokenizer: Any) -> PreTrainedConfig:
    architecture = next(iter(config.get("architectures") or [""]))
    kind = next((kind for name, kind in LANGUAGES.items() if name in architecture), None)
    if kind is None:
        raise ModelError(f"the architecture {architecture!r} is not known; known: LLaVA with {', '.join(LANGUAGES)}")
    own = {name: value for name, value in config.items() if not OWN_KEYS.match(name)}
    return AutoConfig.for_model(kind, **{**own, "vocab_size": max(config.get("vocab_size", 0), len(tokenizer))})


# ---------------------------------------------------------------- what is made of it


def _completed(tensors: dict[str, Tensor], vocabulary: int, unknown: int | None) -> dict[str, Tensor]:
    """Weights with rows for every token, and with the second matrix of a projector that has one."""
    embeddings = tensors["model.language_model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embeddings)
    more = max(0, vocabulary - len(head))
    like = head.mean(dim=0) if unknown is None else head[unknown]
    tensors["model.language_model.embed_tokens.weight"] = torch.cat(
        [embeddings, embeddings.mean(dim=0).expand(more, -1)]
    )
    tensors["lm_head.weight"] = torch.cat([head, like.expand(more, -1)])
    place, width = "model.multi_modal_projector.linear_2", head.shape[1]
    if f"{place}.weight" not in tensors:
        tensors |= {f"{place}.weight": torch.eye(width), f"{place}.bias": torch.zeros(width)}
    return tensors


def _filled(config: LlavaConfig, tensors: dict[str, Tensor], checkpoint: Path) -> LlavaForConditionalGeneration:
    """The model without memory of its own for the weights. Raises ModelError if names or sizes differ."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    dtype = tensors["lm_head.weight"].dtype
    try:
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(
            f"{checkpoint} is incomplete, or its sizes differ: {str(error).splitlines()[1].strip()}"
        ) from error
    model.config.dtype = dtype
    return model


def _processor(config: LlavaConfig, tokenizer: Any) -> LlavaProcessor:
    side = config.vision_config.image_size
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )


def save_whole(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write beside `out` and rename: a folder that exists is complete."""
    with storage_errors(out):
        part = out.with_name(f".{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            model.save_pretrained(part)
            processor.save_pretrained(part)
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Convert from the command line. Returns the exit code."""
    if len(arguments) not in (2, 3):
        print("usage: python -m visgain.vlm.original CHECKPOINT OUT [VISION_TOWER]", file=sys.stderr)
        return 2
    checkpoint, out, *vision = arguments
    try:
        print(f"model: {convert(Path(checkpoint), Path(out), *vision)}")
    except VisgainError as error:
        print(f"visgain: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
