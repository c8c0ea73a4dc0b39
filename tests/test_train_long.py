"""Long trainings: interrupted ones go on as if nothing had been, large ones fit, and what is logged is told once."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from visgain.config import TrainConfig
from visgain.errors import ConfigError, StorageError, TrainingError
from visgain.training import run as training
from visgain.training.arguments import PARALLEL, parallel_names, training_arguments
from visgain.training.prepare import prepare_model, set_precision, shard_by_layer
from visgain.training.recipe import resolve_recipe
from visgain.training.run import run_train
from visgain.training.save import outline
from visgain.vlm.load import load_vlm


@pytest.fixture
def config(blank_model: Path, small_world: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(blank_model),
        data=small_world / "data.json",
        out=tmp_path / "out",
        recipe="embedded-tune",
        learning_rate=1e-3,
        batch_size=4,
        micro_batch=2,
        max_steps=2,
    )


def log(folder: Path) -> list[dict[str, float]]:
    """The lines that tell of a step, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines if "loss" in line]


def furthest(one: Path, other: Path) -> float:
    """Largest difference between two models' weights."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


# ---------------------------------------------------------------- interrupted


DROPOUT = {
    "parts": ["projector"],
    "lora_rank": 4,
    "lora_dropout": 0.3,
    "learning_rate": 1e-3,
    "batch_size": 4,
    "micro_batch": 2,
}


@pytest.mark.parametrize(
    "how", [pytest.param("all", marks=pytest.mark.slow), pytest.param("parts", marks=pytest.mark.slow), "dropout"]
)
def test_one_that_ends_within_a_checkpoint_goes_on_from_the_one_before_as_if_nothing_had_been(
    how: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, max_steps=5, save_steps=2)
    if how == "parts":
        config = replace(config, parts=("vision", "projector"))
    if how == "dropout":
        (tmp_path / "dropout.yaml").write_text(yaml.safe_dump(DROPOUT))
        config = replace(config, recipe=str(tmp_path / "dropout.yaml"))
    whole = run_train(replace(config, out=tmp_path / "whole"))

    save = Trainer._save_checkpoint

    def interrupted(self: Trainer, *args: Any) -> None:
        save(self, *args)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_train(config)
    monkeypatch.undo()
    assert [line["step"] for line in log(config.out)] == [1, 2, 3, 4]
    with (config.out / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut off
    resumed = run_train(config)
    assert replace(resumed, seconds=0) == replace(whole, seconds=0)
    assert furthest(tmp_path / "whole", config.out) <= 1e-7
    assert log(config.out) == log(tmp_path / "whole")
    assert [line["step"] for line in log(config.out)] == [1, 2, 3, 4, 5]


def test_one_that_ends_after_its_last_checkpoint_takes_no_further_step(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an epoch: the small world has 60 rows."""
    config = replace(config, max_steps=4, save_steps=2)
    whole = run_train(replace(config, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_model", lambda *args: (_ for _ in ()).throw(StorageError("no space left")))
        with pytest.raises(StorageError, match="no space left"):
            run_train(config)
    resumed = run_train(config)
    assert replace(resumed, seconds=0) == replace(whole, seconds=0)
    assert furthest(tmp_path / "whole", config.out) <= 1e-7
    assert log(config.out) == log(tmp_path / "whole")


def test_a_resumed_training_took_the_seconds_of_all_its_starts(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr("visgain.training.checkpoint.time.monotonic", lambda: next(clock))
    config = replace(config, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_model", lambda *args: (_ for _ in ()).throw(StorageError("no space left")))
        with pytest.raises(StorageError, match="no space left"):
            run_train(config)
    before = json.loads((config.out / "checkpoints/checkpoint-2/visgain.json").read_text())["seconds"]
    assert before >= 200, "two checkpoints after the start"
    assert run_train(config).seconds >= before + 100


def test_a_model_whose_file_is_gone_is_written_again(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, save_steps=2)
    whole = run_train(config)
    (config.out / "model.safetensors").rename(tmp_path / "model.safetensors")
    again = run_train(config)
    assert replace(again, seconds=0) == replace(whole, seconds=0)
    assert furthest(tmp_path, config.out) == 0


def test_what_costs_only_time_and_memory_may_change_when_it_goes_on(config: TrainConfig) -> None:
    first = run_train(config)
    recipe = asdict(resolve_recipe(config))
    for name, value in {"gradient_checkpointing": True, "workers": 1, "save_steps": 7}.items():
        path = config.out.with_name("changed.yaml")
        path.write_text(yaml.safe_dump({**recipe, "parts": list(recipe["parts"]), name: value}))
        assert run_train(replace(config, recipe=str(path))) == first, name


def test_a_folder_with_somebody_elses_model_is_left_alone(config: TrainConfig, blank_model: Path) -> None:
    before = (blank_model / "model.safetensors").read_bytes()
    with pytest.raises(StorageError, match="holds a model that no training of ours has put there; use another --out"):
        run_train(replace(config, out=blank_model))
    assert (blank_model / "model.safetensors").read_bytes() == before
    assert not (blank_model / "run.json").exists()


@pytest.mark.parametrize(("rate", "told"), [(1e30, "loss nan"), (1e12, "")])
def test_a_training_that_diverges_stops_and_saves_nothing(rate: float, told: str, config: TrainConfig) -> None:
    config = replace(config, learning_rate=rate, max_steps=20, save_steps=1)
    with pytest.raises(
        TrainingError, match=rf"diverged: {told}.*(nan|inf).* at step \d+; no model was saved. Lower --learn"
    ):
        run_train(config)
    assert not (config.out / "model.safetensors").exists()
    for line in (config.out / "log.jsonl").read_text().splitlines():
        assert all(np.isfinite(value) for value in json.loads(line).values())
    for path in config.out.glob("checkpoints/*/model.safetensors"):
        assert all(bool(weight.isfinite().all()) for weight in load_file(path).values())


def test_every_step_is_logged_with_what_one_wants_to_see(config: TrainConfig) -> None:
    done = run_train(config)
    lines = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    wanted = {"step", "loss", "grad_norm", "learning_rate", "active_tokens", "active_tokens_per_second"}
    assert all(wanted <= line.keys() for line in lines[:-1])
    assert done.mean_loss == pytest.approx(sum(line["loss"] for line in lines[:-1]) / 2)
    assert lines[-1]["train_runtime"] > 0


# ---------------------------------------------------------------- memory


def test_recomputed_activations_change_nothing(config: TrainConfig, tmp_path: Path, monkeypatch: Any) -> None:
    config = replace(config, parts=("vision", "projector", "language"))
    run_train(config)
    enabled = []
    original = training.recompute_activations
    monkeypatch.setattr(training, "recompute_activations", lambda model: (enabled.append(model), original(model)))
    run_train(replace(config, out=tmp_path / "recomputed", gradient_checkpointing=True))
    assert getattr(enabled[0], "is_activation_checkpointing", None) or enabled[0].is_gradient_checkpointing
    assert furthest(config.out, tmp_path / "recomputed") <= 1e-6


def test_what_is_trained_is_float32_and_what_is_frozen_takes_half_the_room(config: TrainConfig) -> None:
    vlm = load_vlm(config.model, dtype="auto", device="cpu")
    model = prepare_model(vlm, resolve_recipe(replace(config, parts=("projector",), lora_rank=2)))
    set_precision(model, "bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_bfloat16_trains_about_as_float32_does_and_saves_16_bits(
    lora_rank: int | None, config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, lora_rank=lora_rank, max_steps=3)
    exact = run_train(config)
    half = replace(config, dtype="bfloat16", out=tmp_path / "half")
    assert run_train(half).mean_loss == pytest.approx(exact.mean_loss, abs=0.05)
    assert {w.dtype for w in load_file(half.out / "model.safetensors").values()} == {torch.bfloat16}
    assert furthest(config.out, half.out) < 0.02
    assert json.loads((half.out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_whole_model_trains_in_packs_in_bfloat16(config: TrainConfig, tmp_path: Path) -> None:
    """Nothing frozen: all weights are float32, and autocast alone makes 16 bits of them."""
    config = replace(config, parts=("vision", "projector", "language"), packing="on")
    exact = run_train(config)
    half = run_train(replace(config, dtype="bfloat16", out=tmp_path / "half"))
    assert half.mean_loss == pytest.approx(exact.mean_loss, abs=0.05)


def test_steps_of_tuning_would_be_lost_in_16_bits() -> None:
    """Why what is trained stays in float32: a step of 2e-5 is less than half the distance between bfloat16 numbers."""
    weight = torch.full((1,), 0.02)
    assert (weight.bfloat16() - torch.tensor(2e-5).bfloat16()).item() == weight.bfloat16().item()
    assert (weight - 2e-5).item() != weight.item()


# ---------------------------------------------------------------- sharing a model


def test_the_ways_to_share_a_model_are_known_by_name() -> None:
    assert parallel_names() == ["ddp", "fsdp", "zero2", "zero3"]


def test_fsdp_settings_are_understood_by_accelerate_and_name_layers_that_the_model_has(
    blank_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    values = yaml.safe_load((PARALLEL / "fsdp.yaml").read_text())
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # set by the plug-in; put back afterwards
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=values)

    def plugin() -> FullyShardedDataParallelPlugin:
        return FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)

    assert (plugin().fsdp_version, plugin().cpu_ram_efficient_loading) == (2, True)
    model = load_vlm(str(blank_model), device="cpu").model
    with pytest.raises(ValueError, match="CLIPTextEmbeddings"):  # so Accelerate itself cannot shard a LLaVA
        plugin().set_auto_wrap_policy(model)
    shard_by_layer(model)
    plugin().set_auto_wrap_policy(model)
    assert {"CLIPEncoderLayer", "LlamaDecoderLayer"} <= model._no_split_modules


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_settings_are_filled_in_from_the_recipe(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    settings = HfTrainerDeepSpeedConfig(yaml.safe_load((PARALLEL / f"zero{stage}.yaml").read_text()))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, bf16=True)
    settings.trainer_config_process(arguments)
    assert settings.get_value("zero_optimization.stage") == stage
    assert settings.get_value("bf16.enabled") is True
    assert settings.get_value("train_micro_batch_size_per_gpu") == 4


def test_deepspeed_that_is_not_installed_is_told(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--parallel zero3 needs DeepSpeed: pip install deepspeed"):
        training_arguments(resolve_recipe(config), replace(config, parallel="zero3"))


def test_an_outline_has_the_shapes_of_a_model_and_no_memory(blank_model: Path) -> None:
    model = load_vlm(str(blank_model), device="cpu").model
    empty = outline(model)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    empty.load_state_dict(model.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(empty.parameters(), model.parameters(), strict=True))


# ---------------------------------------------------------------- trackers


def test_a_tracker_is_told_every_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, float]] = []

    class Tracker(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "notebook", Tracker)
    monkeypatch.setattr("visgain.training.arguments.get_available_reporting_integrations", lambda: ["notebook"])
    run_train(replace(config, report_to=("notebook",)))
    assert [line["active_tokens"] for line in told if "loss" in line] == [
        line["active_tokens"] for line in log(config.out)
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "--report-to tensorbord is no known tracker: did you mean 'tensorboard'?"),
        ("clearml", "--report-to clearml needs that tracker's package, which is not installed"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_told(name: str, message: str, config: TrainConfig) -> None:
    with pytest.raises(ConfigError) as error:
        training_arguments(resolve_recipe(config), replace(config, report_to=(name,)))
    assert str(error.value) == message
