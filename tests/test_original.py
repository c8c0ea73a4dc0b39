"""A checkpoint of the original LLaVA code computes the same as a Hugging Face folder; a bad one is told in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tiny_llava import SMALL, vicuna_like
from tiny_models import make_sample
from visgain.errors import ModelError
from visgain.vlm.load import load_vlm
from visgain.vlm.original import convert, main
from visgain.vlm.template import make_encoder

SIDE, WIDTH = 28, SMALL["hidden_size"]


class Original:
    """LLaVA as its code has it: a language model with a tower and a projector beside it."""

    def __init__(self, projector: str = "mlp2x_gelu") -> None:
        torch.manual_seed(5)
        self.tokenizer = vicuna_like("legacy", sees=False)
        self.language = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=len(self.tokenizer))).eval()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**SMALL, image_size=SIDE, patch_size=14, projection_dim=8)).eval()
        layers = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)]
        self.projector = nn.Sequential(*layers) if projector == "mlp2x_gelu" else layers[0]
        for module in (self.language, self.tower, self.projector):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)

    def tensors(self, *, tower: bool) -> dict[str, Tensor]:
        """Under the names of the original code."""
        named = dict(self.language.state_dict())
        named |= {f"model.mm_projector.{name}": value for name, value in self.projector.state_dict().items()}
        if tower:
            states = self.tower.state_dict().items()
            named |= {f"model.vision_tower.vision_tower.vision_model.{name}": value for name, value in states}
        named["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        return {name: value.clone() for name, value in named.items()}

    def config(self, **changes: Any) -> dict[str, Any]:
        kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
        return {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            **{name: getattr(self.language.config, name) for name in kept},
            "vocab_size": len(self.tokenizer),
            "rope_theta": 10000.0,
            "mm_vision_tower": "tower",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_hidden_size": WIDTH,
            "image_aspect_ratio": "pad",
            "use_mm_proj": True,
            **changes,
        }

    @torch.no_grad()
    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """Of a sequence [T] in which -200 stands for the picture: its features in that place."""
        states = self.tower(pixels[None], output_hidden_states=True).hidden_states[-2][:, 1:]
        hole = int((ids == -200).nonzero())
        embed = self.language.get_input_embeddings()
        together = [embed(ids[:hole]), self.projector(states)[0], embed(ids[hole + 1 :])]
        return self.language(inputs_embeds=torch.cat(together)[None]).logits[0]


def write(folder: Path, original: Original, shards: str, *, tower: bool, **changes: Any) -> Path:
    folder.mkdir()
    original.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(original.config(**changes)))
    tensors = original.tensors(tower=tower)
    if shards == "one .bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif shards == "one .safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        kind, save = ("bin", torch.save) if shards.endswith("bin") else ("safetensors", save_file)
        stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
        files = {name: f"{stem}-0000{1 + k % 2}-of-00002.{kind}" for k, name in enumerate(names)}
        for file in set(files.values()):
            save({name: tensors[name] for name in names if files[name] == file}, folder / file)
        index = {"metadata": {}, "weight_map": files}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("projector", "shards", "tower", "changes"),
    [
        ("mlp2x_gelu", "one .bin", True, {}),
        ("mlp2x_gelu", "two .bin", False, {}),
        ("linear", "two .safetensors", True, {"mm_projector_type": "linear"}),
        ("mlp2x_gelu", "one .safetensors", False, {"model_type": "llava"}),
        ("mlp2x_gelu", "one .bin", True, {"model_type": "share4v", "architectures": ["Share4VLlamaForCausalLM"]}),
    ],
)
@torch.no_grad()
def test_a_converted_checkpoint_has_the_originals_logits(
    projector: str, shards: str, tower: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    original = Original(projector)
    # A tower in the checkpoint was tuned: the folder then says only how it is built.
    (CLIPVisionModel(original.tower.config) if tower else original.tower).save_pretrained(tmp_path / "tower")
    checkpoint = write(tmp_path / "llava", original, shards, tower=tower, **changes)
    out = convert(checkpoint, tmp_path / "hf", vision=str(tmp_path / "tower"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "llava", "tower"]
    vlm = load_vlm(str(out), device="cpu")
    encoder = make_encoder(vlm)
    assert encoder.name == "llava-1.5"
    image = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
    encoded = encoder.encode(make_sample("<image>\nWhat is this?", "A red cup, 2 dogs."), [image])
    assert encoded.n_image_tokens == 4
    ids = torch.from_numpy(encoded.input_ids)
    pixels = encoded.model_inputs["pixel_values"]
    logits = vlm.model(input_ids=ids[None], pixel_values=pixels).logits[0]
    first = int((ids == vlm.image_token_id).nonzero()[0])
    holed = torch.cat([ids[:first], torch.tensor([-200]), ids[first + 4 :]])
    expected = original.logits(holed, pixels[0])
    n_known = len(original.tokenizer)
    assert logits.shape[1] == n_known + 1
    assert expected.std() > 0.1
    assert torch.allclose(logits[:, :n_known], expected, rtol=0, atol=1e-5)
    assert torch.equal(logits[:, n_known], logits[:, original.tokenizer.unk_token_id])


def test_text_is_tokenised_as_before(tmp_path: Path) -> None:
    original = Original()
    original.tower.save_pretrained(tmp_path / "tower")
    checkpoint = write(tmp_path / "llava", original, "one .bin", tower=True)
    converted = load_vlm(str(convert(checkpoint, tmp_path / "hf", vision=str(tmp_path / "tower")))).tokenizer
    for text in ("USER: What is this? ASSISTANT: 2 cups.</s>USER:", "\nÜnïcode 🙂", "a  b"):
        assert converted.encode(text) == original.tokenizer.encode(text)
    assert converted.convert_tokens_to_ids("<image>") == len(original.tokenizer)


# ---------------------------------------------------------------- what is refused


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def damaged(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        torch.save(change(tensors) or tensors, folder / "pytorch_model.bin")

    return spoil


def reconfigured(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return spoil


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"cannot read .*config\.json"),
    "no tower named": (
        reconfigured(mm_vision_tower=None, mm_projector_type=None),
        "no checkpoint of the original LLaVA",
    ),
    "adapters": (lambda f: (f / "adapter_config.json").touch(), "holds LoRA adapters; merge them"),
    "tiles": (reconfigured(image_aspect_ratio="anyres"), "cuts pictures into tiles"),
    "start and end": (reconfigured(mm_use_im_start_end=True), "puts tokens around pictures"),
    "architecture": (reconfigured(architectures=["LlavaMptForCausalLM"]), "'LlavaMptForCausalLM' is not known"),
    "no weights": (lambda f: (f / "pytorch_model.bin").unlink(), "holds no weights"),
    "pickle": (damaged(lambda t: {**t, "x": Harmful()}), r"needs posix\.mkdir to be read"),
    "foreign": (
        damaged(lambda t: t.update({"model.image_newline": torch.zeros(2)})),
        "holds model.image_newline, which",
    ),
    "missing": (
        damaged(lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"}),
        "incomplete, or its sizes differ: Missing",
    ),
    "sizes": (damaged(lambda t: t.update({"model.norm.weight": torch.zeros(3)})), "sizes differ: size mismatch"),
    "no projector": (damaged(lambda t: {n: v for n, v in t.items() if "mm_" not in n}), "holds no projector"),
    "projector alone": (damaged(lambda t: {n: v for n, v in t.items() if "mm_" in n}), "alone goes into an assembled"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "cannot load the tokenizer of"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_checkpoint_that_cannot_be_converted_is_told_in_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    original = Original()
    original.tower.save_pretrained(tmp_path / "tower")
    checkpoint = write(tmp_path / "llava", original, "one .bin", tower=True)
    spoil, message = BAD[kind]
    spoil(checkpoint)
    with pytest.raises(ModelError, match=message) as caught:
        convert(checkpoint, tmp_path / "hf", vision="tower")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava", "tower"]


def test_the_command_line_says_what_it_wrote_or_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = Original()
    original.tower.save_pretrained(tmp_path / "tower")
    checkpoint = str(write(tmp_path / "llava", original, "one .bin", tower=False))
    capsys.readouterr()
    assert main([checkpoint]) == 2
    assert "usage: " in capsys.readouterr().err
    assert main([checkpoint, str(tmp_path / "hf"), str(tmp_path / "nowhere")]) == 1
    assert "cannot load the vision tower" in capsys.readouterr().err
    assert main([checkpoint, str(tmp_path / "hf"), str(tmp_path / "tower")]) == 0
    assert capsys.readouterr().out == f"model: {tmp_path / 'hf'}\n"
    assert main([checkpoint, str(tmp_path / "hf")]) == 1
    assert "is there already" in capsys.readouterr().err


def test_an_original_folder_given_as_model_is_pointed_to_its_conversion(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "llava", Original(), "one .bin", tower=True)
    with pytest.raises(ModelError, match=r"convert it once: python -m visgain\.vlm\.original .*llava llava-hf"):
        load_vlm(str(checkpoint))
    (checkpoint / "mm_projector.bin").touch()
    (checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"holds a projector alone; give the model .* --projector .*mm_projector\.bin"):
        load_vlm(str(checkpoint))
