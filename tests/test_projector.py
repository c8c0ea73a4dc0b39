"""mm_projector.bin computes in a Hugging Face LLaVA what it did in LLaVA, and nothing but tensors is ever read."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tiny_llava import clip_llava, vicuna_like
from visgain.config import ScoreConfig, TrainConfig
from visgain.errors import ModelError, StorageError
from visgain.scoring.run import run_score
from visgain.training.run import run_train
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.projector import load_projector

WIDTH = 16  # of the tiny models' towers and language models


@pytest.fixture
def vlm() -> VLM:
    return clip_llava(vicuna_like("legacy"), 28)


def llavas_projector(kind: str) -> nn.Module:
    """As LLaVA builds it."""
    torch.manual_seed(3)
    if kind == "linear":
        return nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def features(vlm: VLM) -> Tensor:
    """What the tower hands to the projector for one picture."""
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 28, 28)).astype(np.float32))
    states = vlm.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[vlm.model.config.vision_feature_layer][:, 1:]


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [("model.", "bin"), ("", "pt"), ("base_model.model.model.", "safetensors"), ("module.model.", "bin")],
)
@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
@torch.no_grad()
def test_an_imported_projector_computes_what_llavas_did(
    kind: str, prefix: str, suffix: str, vlm: VLM, tmp_path: Path
) -> None:
    theirs = llavas_projector(kind)
    tensors = OrderedDict((f"{prefix}mm_projector.{name}", value) for name, value in theirs.state_dict().items())
    path = tmp_path / f"mm_projector.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    seen = features(vlm)
    before = vlm.model.model.multi_modal_projector(seen)
    load_projector(vlm.model, path)
    after = vlm.model.model.multi_modal_projector(seen)
    assert torch.allclose(after, theirs(seen), rtol=0, atol=1e-6)
    assert not torch.allclose(after, before, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
@torch.no_grad()
def test_an_imported_projector_is_saved_with_the_model(kind: str, vlm: VLM, tmp_path: Path) -> None:
    theirs = llavas_projector(kind)
    torch.save({f"model.mm_projector.{n}": v for n, v in theirs.state_dict().items()}, tmp_path / "mm_projector.bin")
    load_projector(vlm.model, tmp_path / "mm_projector.bin")
    vlm.model.save_pretrained(tmp_path / "model")
    again = type(vlm.model).from_pretrained(tmp_path / "model")
    assert torch.allclose(again.model.multi_modal_projector(features(vlm)), theirs(features(vlm)), rtol=0, atol=1e-6)


def test_16_bits_become_the_models_own(vlm: VLM, tmp_path: Path) -> None:
    theirs = llavas_projector("mlp2x_gelu").to(torch.bfloat16)
    torch.save({f"model.mm_projector.{n}": v for n, v in theirs.state_dict().items()}, tmp_path / "mm_projector.bin")
    load_projector(vlm.model, tmp_path / "mm_projector.bin")
    ours = vlm.model.model.multi_modal_projector.linear_1.weight
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs[0].weight.float())


def test_a_projector_of_hugging_faces_own_names_is_read_too(vlm: VLM, tmp_path: Path) -> None:
    own = {f"multi_modal_projector.{n}": v + 1 for n, v in vlm.model.model.multi_modal_projector.state_dict().items()}
    save_file(own, tmp_path / "projector.safetensors")
    load_projector(vlm.model, tmp_path / "projector.safetensors")
    assert torch.equal(
        vlm.model.model.multi_modal_projector.linear_2.bias.data, own["multi_modal_projector.linear_2.bias"]
    )


# ---------------------------------------------------------------- what is refused


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def full(**changes: Tensor) -> dict[str, Tensor]:
    tensors = {f"model.mm_projector.{n}": v for n, v in llavas_projector("mlp2x_gelu").state_dict().items()}
    return {**tensors, **{name.replace("__", "."): value for name, value in changes.items()}}


@pytest.mark.parametrize("write", [torch.save, partial(torch.save, _use_new_zipfile_serialization=False)])
def test_a_pickle_that_would_run_something_is_refused_by_name_and_runs_nothing(
    write: Any, vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write({**full(), "extra": Harmful()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ModelError, match=r"mm_projector.bin needs (posix|nt)\.mkdir to be read") as caught:
        load_projector(vlm.model, tmp_path / "mm_projector.bin")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no projector: its tensors are $"),
        (
            {"model.embed_tokens.weight": torch.zeros(2)},
            r"holds no projector: its tensors are model\.embed_tokens\.weight$",
        ),
        (
            full(model__embed_tokens__weight=torch.zeros(2)),
            r"holds more than a projector: model\.embed_tokens\.weight;",
        ),
        (full(model__mm_projector__4__weight=torch.zeros(2)), "is neither mlp2x_gelu nor linear"),
        (full(model__mm_projector__0__weight=torch.zeros(8, 4)), r"linear_1\.weight is 8 x 4 there and 16 x 16 here"),
        ({k: v for k, v in full().items() if "bias" not in k}, r"linear_1\.bias is absent there and 16 here"),
        ({k: v for k, v in full().items() if "2.weight" not in k}, "is neither mlp2x_gelu nor linear"),
        ({"step": 3, **full()}, "step in it is no tensor"),
        ([torch.zeros(2)], "it holds a list, not tensors by name"),
    ],
)
def test_what_is_not_this_models_projector_is_refused_in_one_line(
    content: Any, message: str, vlm: VLM, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "mm_projector.bin")
    before = vlm.model.model.multi_modal_projector.linear_1.weight.clone()
    with pytest.raises(ModelError, match=message) as caught:
        load_projector(vlm.model, tmp_path / "mm_projector.bin")
    assert "\n" not in str(caught.value)
    assert torch.equal(vlm.model.model.multi_modal_projector.linear_1.weight, before)


@pytest.mark.parametrize("name", ["mm_projector.bin", "projector.safetensors"])
@pytest.mark.parametrize("content", [b"", b"abc", pickle.dumps({"a": 1}), "half"])
def test_a_file_that_is_damaged_is_told(name: str, content: Any, vlm: VLM, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "half":
        torch.save(full(), path)
        content = path.read_bytes()[:700]
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"is damaged, or no file of tensors|in it is no tensor"):
        load_projector(vlm.model, path)


def test_a_file_that_is_not_there_is_told(vlm: VLM, tmp_path: Path) -> None:
    for name in ("mm_projector.bin", "projector.safetensors"):
        with pytest.raises(ModelError, match=f"cannot read .*{name}: No such file"):
            load_projector(vlm.model, tmp_path / name)


def test_a_model_without_such_a_projector_is_told(llava_next: VLM, tmp_path: Path) -> None:
    torch.save(full(), tmp_path / "mm_projector.bin")
    llava_next.model.model.multi_modal_projector, kept = nn.Identity(), llava_next.model.model.multi_modal_projector
    try:
        with pytest.raises(ModelError, match="has no projector like LLaVA's"):
            load_projector(llava_next.model, tmp_path / "mm_projector.bin")
    finally:
        llava_next.model.model.multi_modal_projector = kept


# ---------------------------------------------------------------- --projector


def mm_projector(path: Path, seed: int) -> Path:
    """One of the embedded model's sizes."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128))
    torch.save({f"model.mm_projector.{name}": value for name, value in layers.state_dict().items()}, path)
    return path


def test_scores_are_those_of_the_model_that_has_the_projector_in_it(
    blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    path = mm_projector(tmp_path / "mm_projector.bin", seed=0)
    vlm = load_vlm(str(blank_model), device="cpu")
    load_projector(vlm.model, path)
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    data = {"data": small_world / "data.json", "limit": 2, "device": "cpu"}
    put_in = ScoreConfig(model=str(blank_model), projector=path, out=tmp_path / "one", **data)
    run_score(put_in)
    run_score(ScoreConfig(model=str(tmp_path / "model"), out=tmp_path / "other", **data))
    one, other = (
        pq.read_table(next((tmp_path / name).glob("*.parquet"))).column("nll_seen") for name in ("one", "other")
    )
    assert one.equals(other)
    mm_projector(path, seed=1)
    with pytest.raises(StorageError, match="projector: "):
        run_score(put_in)


def test_a_model_is_trained_from_the_projector_on(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    path = mm_projector(tmp_path / "mm_projector.bin", seed=0)
    run_train(
        TrainConfig(
            model=str(blank_model),
            projector=path,
            data=small_world / "data.json",
            out=tmp_path / "out",
            parts=("language",),
            max_steps=1,
            batch_size=2,
            device="cpu",
        )
    )
    trained = load_vlm(str(tmp_path / "out"), device="cpu").model.model.multi_modal_projector
    assert torch.equal(trained.linear_2.weight.data, torch.load(path)["model.mm_projector.2.weight"])


def test_a_bad_projector_is_told_before_the_model_is_loaded(small_world: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*nowhere\.bin"):
        run_score(
            ScoreConfig(
                model=str(tmp_path / "no model"),
                projector=tmp_path / "nowhere.bin",
                data=small_world / "data.json",
                out=tmp_path / "out",
            )
        )
