"""What of each family is trained: its parts, told apart down to the last weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from naive import picture
from tiny_models import make_sample
from visgain.config import TrainConfig
from visgain.errors import ModelError
from visgain.training.optimiser import divide_by_rate
from visgain.training.prepare import prepare_model
from visgain.training.recipe import Part, load_recipe
from visgain.training.run import run_train
from visgain.training.trainer import trains_more_than_language
from visgain.vlm.families import in_no_part
from visgain.vlm.load import VLM
from visgain.vlm.logits import output_head
from zoo import ZOO

RECIPE = load_recipe("tune")

LACKS = {"fuyu": "vision"}
"""Families without one of the parts."""

NO_PART = {
    "janus": {"model.vqmodel", "model.generation_embeddings", "model.generation_aligner", "model.generation_head"},
    "phi4_multimodal": {"model.embed_tokens_extend.audio_embed"},
}
"""What is in no part: it draws, or hears."""

BETWEEN = [
    ("blip-2", "query_tokens", "projector"),
    ("llama4", "vision_model.vision_adapter", "vision"),
    ("llava_next", "model.image_newline", "projector"),
    ("llava_onevision", "model.image_newline", "projector"),
    ("minicpmv4_6", "model.vision_tower.vit_merger", "vision"),
    ("ovis2", "model.vision_tower.head_linear", "projector"),
    ("phi4_multimodal", "model.embed_tokens_extend.image_embed.img_processor", "vision"),
    ("phi4_multimodal", "model.embed_tokens_extend.image_embed.sub_img_feature_extensor", "projector"),
    ("qwen2_vl", "model.visual.merger", "projector"),
    ("qwen3_vl", "model.visual.deepstack_merger_list", "projector"),
]
"""Where it takes a second look: family, weights, part."""


def prepared(vlm: VLM, *parts: str, **values) -> PreTrainedModel:
    """`vlm`'s model, again with nothing but `parts` left trainable."""
    return prepare_model(vlm, replace(RECIPE, parts=parts, **values))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def under(paths: set[str], names: set[str]) -> set[str]:
    return {name for name in names if any(f"{name}.".startswith(f"{path}.") for path in paths)}


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_weight_of_a_family_is_in_one_part_or_told_to_be_in_none(name: str) -> None:
    vlm = ZOO[name].build()
    everything = {one for one, _ in vlm.model.named_parameters()}  # Ernie 4.5 comes with some of them frozen
    parts = {part: trainable(prepared(vlm, part)) for part in get_args(Part) if part != LACKS.get(name)}
    outside = under(NO_PART.get(name, set()), everything)
    assert set(in_no_part(vlm.model)) == NO_PART.get(name, set())
    assert all(parts.values())
    assert sorted(one for some in (outside, *parts.values()) for one in some) == sorted(everything)
    model = prepared(vlm, *parts)
    assert trainable(model) == everything - outside
    for part in parts:
        assert trains_more_than_language(prepared(vlm, part)) == (part != "language")


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_language_part_is_what_transformers_takes_for_it(name: str) -> None:
    vlm = ZOO[name].build()
    model = vlm.model
    modules = (model.get_decoder(), model.get_input_embeddings(), output_head(model))
    expected = {id(parameter) for module in modules for parameter in module.parameters()}
    if name == "phi4_multimodal":  # its decoder holds the other parts
        expected -= {id(parameter) for parameter in model.model.embed_tokens_extend.parameters()}
    prepared(vlm, "language")
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize(("name", "path", "part"), BETWEEN)
def test_what_lies_between_two_parts_belongs_to_one(name: str, path: str, part: str) -> None:
    vlm = ZOO[name].build()
    weights = under({path}, {one for one, _ in vlm.model.named_parameters()})
    assert weights
    for one in get_args(Part):
        assert trainable(prepared(vlm, one)) & weights == (weights if one == part else set())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_part_learns_from_a_picture(name: str) -> None:
    vlm = ZOO[name].build()
    row = ZOO[name].encode(vlm, make_sample("<image>\nWhat is this?", "A red cup."), [picture(0)])
    ids = torch.from_numpy(row.input_ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **row.model_inputs}
    parts = {part: trainable(prepared(vlm, part)) for part in get_args(Part) if part != LACKS.get(name)}
    model = prepared(vlm, *parts)
    model(**inputs, use_cache=False).logits[0, -2, 0].backward()
    learning = {one for one, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(learning & names for names in parts.values())
    assert learning <= trainable(model)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_adapters_are_on_the_language_part_alone(name: str) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    vlm = ZOO[name].build()
    projector = trainable(prepared(vlm, "projector"))
    language = trainable(prepared(vlm, "language"))
    model = prepared(vlm, "projector", lora_rank=2)
    found = {one.removeprefix("base_model.model.") for one in trainable(model)}
    adapters = {one for one in found if ".lora_" in one}
    assert adapters
    assert {f"{one.split('.lora_')[0]}.weight" for one in adapters} <= language
    assert found - adapters == projector


@pytest.mark.parametrize("name", ["janus", "ovis2"])
def test_a_recipe_for_any_model_trains_a_family_from_its_folder_and_tells_what_is_in_no_part(
    name: str, small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vlm = ZOO[name].build()
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    sizes = {"batch_size": 2, "micro_batch": 2, "max_steps": 2, "device": "cpu"}  # the first step is warm-up
    model, data, out = str(tmp_path / "model"), small_world / "data.json", tmp_path / "out"
    run_train(TrainConfig(model=model, data=data, out=out, recipe="align", **sizes))
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", out))
    changed = {one for one, weights in before.items() if not torch.equal(weights, after[one])}
    assert changed
    assert changed <= trainable(prepared(vlm, "projector"))
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "stays frozen" in line]
    assert len(told) == (name in NO_PART)
    assert all(path in line for line in told for path in NO_PART[name])


# ---------------------------------------------------------------- models without a part


def bridged() -> VLM:
    """LLaVA with its projector under a name that nothing knows."""
    vlm = ZOO["llava"].build()
    vlm.model.model.bridge = vlm.model.model.multi_modal_projector
    del vlm.model.model.multi_modal_projector
    return vlm


def test_a_part_that_is_not_there_is_told_with_those_that_are() -> None:
    told = r"FuyuForCausalLM has no part 'vision' .*\(its parts: projector, language\); name those .* --parts"
    with pytest.raises(ModelError, match=told):
        prepared(ZOO["fuyu"].build(), "vision", "language")
    vlm = bridged()
    told = r"has no part 'projector' .*\(its parts: vision, language; in none of them: model\.bridge\)"
    with pytest.raises(ModelError, match=told):
        prepared(vlm, "projector", "language")


def test_only_parts_that_are_asked_for_must_be_there() -> None:
    vlm = bridged()
    frozen = {one for one, _ in vlm.model.named_parameters() if "bridge" in one or "vision_tower" in one}
    assert trainable(prepared(vlm, "language")).isdisjoint(frozen)
    assert trainable(prepared(vlm, "vision"))
    optimizer = AdamW(prepared(vlm, "language").parameters(), lr=1.0)
    divide_by_rate(optimizer, vlm.model, {"projector": 2.0, "language": 3.0})
    assert {p for group in optimizer.param_groups if group["lr"] == 3.0 for p in group["params"]} == {
        p for p in vlm.model.parameters() if p.requires_grad
    }
