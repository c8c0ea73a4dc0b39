"""What cannot be loaded says why in one line, before anything large is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, LlavaProcessor
from transformers.utils import is_torchvision_available

from naive import built, picture
from tiny_models import make_sample
from visgain.errors import ModelError
from visgain.vlm.load import VLM, load_processor, load_vlm
from visgain.vlm.template import make_encoder

SAMPLE = make_sample("<image>\nWhat?", "A cup.")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    built("llava").model.save_pretrained(folder)
    built("llava").processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A model to damage."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def why(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_vlm(str(folder), device="cpu", **options)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_a_good_model_loads(good: Path) -> None:
    assert load_vlm(str(good), device="cpu").image_token_id == built("llava").image_token_id


def test_weights_that_are_pickled_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "no weights in safetensors" in why(folder)


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "damaged or incomplete" in why(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    name = "model.multi_modal_projector.linear_1.weight"
    edit_weights(folder, lambda weights: weights | {_like(weights, name): torch.zeros(3, 3)})
    assert "other shapes" in why(folder)


def _like(weights: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in weights if name.endswith(end.removeprefix("model.")))


@pytest.mark.parametrize("part", ["multi_modal_projector", "vision_tower", "language_model"])
def test_a_part_without_any_weight_is_not_left_random(part: str, folder: Path) -> None:
    edit_weights(folder, lambda weights: {name: value for name, value in weights.items() if part not in name})
    assert f"has no weights for model.{part}" in why(folder)


def test_a_model_of_text_alone(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    assert "is a llama model, which takes no pictures" in why(tmp_path)
    built("llava").processor.save_pretrained(tmp_path)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "is a llama model, which takes no pictures" in why(tmp_path)


def test_an_encoder_decoder(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(model_type="pix2struct", vision_config={}))
    assert "encoder-decoder model (pix2struct)" in why(folder)


def test_a_model_type_that_transformers_does_not_know(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(model_type="zzz"))
    assert "model type `zzz`" in why(folder)


@pytest.mark.parametrize("missing", ["processor_config.json", "tokenizer.json"])
def test_missing_files_of_the_processor(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    assert "cannot load the processor" in why(folder)


def test_a_tokenizer_that_tells_no_offsets(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = LlavaProcessor(image_processor=built("llava").processor.image_processor, tokenizer=ByT5Tokenizer())
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: slow)
    assert "gives no character offsets; convert it to tokenizer.json" in why(good)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed here")
def test_an_image_processor_that_needs_torchvision(folder: Path) -> None:
    edit(
        folder / "processor_config.json",
        lambda config: config["image_processor"].update(image_processor_type="Lfm2VlImageProcessor"),
    )
    assert "needs torchvision" in why(folder)


def test_a_library_that_is_missing(folder: Path) -> None:
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336"}
    edit(folder / "config.json", lambda config: config.update(model_type="perception_lm", vision_config=vision))
    assert "pip install timm" in why(folder)


# ---------------------------------------------------------------- code that comes with a model

CONFIGURATION = """
from transformers import LlavaConfig
print("RAN")
class OwnConfig(LlavaConfig):
    model_type = "own_vl"
"""
MODELING = """
from transformers import LlavaForConditionalGeneration
from .configuration_own import OwnConfig
class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig
"""


@pytest.fixture
def own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    # transformers knows the names of old checkpoints by the model type, which is another here
    edit_weights(
        folder,
        lambda weights: {name.replace("language_model.lm_head", "lm_head"): value for name, value in weights.items()},
    )
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(folder / "config.json", lambda config: config.update(model_type="own_vl", auto_map=auto))
    return folder


def test_code_that_comes_with_a_model_does_not_run_unasked(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "--trust-remote-code" in why(own)
    assert "RAN" not in capfd.readouterr().out


def test_a_model_with_code_of_its_own_loads_when_allowed(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vlm = load_vlm(str(own), device="cpu", trust_remote_code=True)
    assert "RAN" in capfd.readouterr().out
    assert type(vlm.model).__name__ == "OwnModel"
    ids = make_encoder(vlm).encode(SAMPLE, [picture(0)]).input_ids
    assert ids.tolist() == make_encoder(built("llava")).encode(SAMPLE, [picture(0)]).input_ids.tolist()


# ---------------------------------------------------------------- the image token


class Config:
    """A configuration that names no image token."""

    vision_config = None


def test_an_image_token_that_the_processor_alone_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = built("llava")
    monkeypatch.setattr(type(vlm.model), "config", Config(), raising=False)
    monkeypatch.setitem(vlm.model.__dict__, "config", Config())
    alone = VLM(name="llava", model=vlm.model, processor=vlm.processor)
    assert alone.image_token_id == vlm.tokenizer.convert_tokens_to_ids("<image>")
    monkeypatch.setattr(vlm.processor, "image_token_id", None)
    assert alone.image_token_id == vlm.tokenizer.convert_tokens_to_ids("<image>")
    monkeypatch.setattr(vlm.processor, "image_token", None)
    with pytest.raises(ModelError, match="names an image token"):
        assert alone.image_token_id


def test_pixtrals_processor_loads_without_torchvision(tmp_path: Path) -> None:
    built("pixtral").processor.save_pretrained(tmp_path)
    built("pixtral").model.config.save_pretrained(tmp_path)
    assert type(load_processor(str(tmp_path))).__name__ == "PixtralProcessor"
