"""The model that ships with the package is as good as the file beside it says, and real data runs through it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from visgain.config import ReportConfig, ScoreConfig, SelectConfig, TrainConfig, WorldConfig
from visgain.report.html import write_report
from visgain.scoring.run import run_score
from visgain.selection import run_select
from visgain.storage import read_scores
from visgain.training.run import run_train
from visgain.vlm.load import EMBEDDED, load_vlm
from visgain.world.dataset import write_world
from visgain.world.evaluate import evaluate_world
from visgain.world.rebuild import STAGES, rebuild


def test_the_embedded_model_is_a_small_plain_llava_folder() -> None:
    size = sum(path.stat().st_size for path in EMBEDDED.iterdir())
    assert size < 10_000_000
    assert not list(EMBEDDED.glob("*.bin"))
    vlm = load_vlm("embedded")
    assert type(vlm.model).__name__ == "LlavaForConditionalGeneration"


def test_any_text_encodes_and_decodes_to_itself() -> None:
    tokenizer = load_vlm("embedded").tokenizer
    for text in ("Ünïcode 🙂", "a\tb\n\nc", "数学", "plain words"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bias"), [("independent", 0.0), ("priors broken", -1.0)])
def test_the_embedded_model_is_as_good_as_it_says(name: str, bias: float, tmp_path: Path) -> None:
    """On pictures that were in no data before, within four standard errors."""
    claimed = json.loads((EMBEDDED / "quality.json").read_text())[name]
    write_world(WorldConfig(out=tmp_path, split="test", rows=400, bias=bias, seed=4242))
    measured = evaluate_world("embedded", tmp_path)
    for key in ("accuracy", "captions_with_hallucination"):
        n = measured.questions if key == "accuracy" else measured.captions
        spread = math.sqrt(max(claimed[key] * (1 - claimed[key]), 0.01) / n)
        assert abs(getattr(measured, key) - claimed[key]) < 4 * spread, key
    assert len(measured.accuracy_by_topic) == 7
    assert min(measured.accuracy_by_topic.values()) > 0.75, "of some sorts of question there are ten here"


@pytest.mark.slow
def test_one_command_rebuilds_it_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """With two steps to a stage, which the 16 bits between stages show in matrices, not in norms close to 1."""
    stages = [replace(stage, rows=128) for stage in STAGES]
    model = rebuild(tmp_path, stages=stages, test_rows=12)
    blank, trained = (load_file(folder / "model.safetensors") for folder in (tmp_path / "blank", model))
    assert not [name for name, weight in trained.items() if weight.dim() > 1 and torch.equal(weight, blank[name])]
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert set(json.loads((tmp_path / "quality.json").read_text())) == {"independent", "priors hold", "priors broken"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/train.json")}
    assert len(before) == len(stages)
    assert rebuild(tmp_path, stages=stages, test_rows=12) == model
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_real_data_runs_from_scores_to_a_trained_model_and_a_report(shared_data: Path, tmp_path: Path) -> None:
    data = {"data": shared_data / "mix.json", "image_root": shared_data}
    done = run_score(ScoreConfig(model="embedded", out=tmp_path / "scores", limit=400, **data))
    assert (done.rows, done.skipped) == (400, 0)
    assert done.text_only > 0
    gain = read_scores(tmp_path / "scores").column("gain").drop_null().to_numpy()
    assert np.isfinite(gain).all()
    record = run_select(SelectConfig(scores=tmp_path / "scores", out=tmp_path / "selection"))
    assert record["totals"]["text_only"] == done.text_only
    selection = {"selection": tmp_path / "selection"}
    trained = run_train(
        TrainConfig(
            model="embedded",
            out=tmp_path / "model",
            recipe="embedded-tune",
            max_steps=3,
            batch_size=8,
            **data,
            **selection,
        )
    )
    assert trained.active_tokens > 0
    report = write_report(
        ReportConfig(scores=tmp_path / "scores", out=tmp_path / "report.html", samples=6, **selection)
    )
    assert "mantis_chat" in report.read_text()
