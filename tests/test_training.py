"""Selective training against the vanilla Trainer, and the steps, cuts and restarts that must change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

from visgain.config import ScoreConfig, SelectConfig, TrainConfig
from visgain.data import open_dataset
from visgain.errors import ConfigError, DataError, StorageError
from visgain.scoring.run import run_score
from visgain.selection import run_select
from visgain.storage import read_selection_table, write_selection
from visgain.training.arguments import training_arguments
from visgain.training.collate import IGNORED, Collator, Rows, SelectedRows
from visgain.training.prepare import prepare_model
from visgain.training.recipe import Recipe
from visgain.training.run import build_trainer, run_train
from visgain.training.trainer import SelectiveTrainer
from visgain.vlm.load import load_vlm
from visgain.vlm.template import make_encoder

RECIPE = Recipe(parts=("projector", "language"), learning_rate=1e-3, batch_size=8, micro_batch=4, max_steps=3)


@pytest.fixture(scope="module")
def scores(blank_model: Path, small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores")
    run_score(ScoreConfig(model=str(blank_model), data=small_world / "data.json", out=out))
    return out


def select(scores: Path, out: Path, **options) -> Path:
    run_select(SelectConfig(scores=scores, out=out, **options))
    return out


def train_config(blank_model: Path, small_world: Path, out: Path, **options) -> TrainConfig:
    base = {"max_steps": 3, "batch_size": 8, "micro_batch": 4, "recipe": "embedded-tune"}
    return TrainConfig(model=str(blank_model), data=small_world / "data.json", out=out, **{**base, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def assert_same_weights(one: Path, other: Path, tolerance: float = 0.0) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance), name


# ---------------------------------------------------------------- equal to vanilla


@pytest.mark.parametrize("with_selection", [False, True])
def test_keeping_everything_reproduces_the_vanilla_trainer_step_by_step(
    with_selection: bool, blank_model: Path, small_world: Path, scores: Path, tmp_path: Path
) -> None:
    """Vanilla: transformers' own Trainer and the model's own loss on plain labels."""
    dataset = open_dataset(small_world / "data.json")
    config = train_config(blank_model, small_world, tmp_path / "ours")

    def losses(trainer_class: type[Trainer]) -> tuple[list[float], dict[str, torch.Tensor]]:
        vlm = load_vlm(str(blank_model))
        encoder = make_encoder(vlm)
        rows: Rows = Rows(dataset, encoder, range(len(dataset)))
        if with_selection and trainer_class is SelectiveTrainer:
            everything = select(scores, tmp_path / "everything", by="sample", keep=100)
            rows = SelectedRows(dataset, encoder, read_selection_table(everything), end_of_turn="score")
        recipe = replace(RECIPE, max_steps=4)
        model = prepare_model(vlm, recipe)
        if trainer_class is SelectiveTrainer:
            trainer = build_trainer(model, vlm, rows, recipe, config)
        else:
            arguments = training_arguments(recipe, config)
            collator = Collator(vlm.tokenizer.pad_token_id)
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.args.logging_steps = 1
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.state_dict()

    vanilla_losses, vanilla_weights = losses(Trainer)
    our_losses, our_weights = losses(SelectiveTrainer)
    assert len(vanilla_losses) == 4
    assert our_losses == pytest.approx(vanilla_losses, abs=1e-5)
    for name, value in vanilla_weights.items():
        assert torch.allclose(our_weights[name], value, rtol=0, atol=2e-5), name


def test_only_active_tokens_carry_a_label(blank_model: Path, small_world: Path, scores: Path, tmp_path: Path) -> None:
    selection = read_selection_table(select(scores, tmp_path, keep=60))
    vlm = load_vlm(str(blank_model))
    rows = SelectedRows(open_dataset(small_world / "data.json"), make_encoder(vlm), selection, end_of_turn="score")
    batch = Collator(0)([rows[k] for k in range(len(rows))])
    for k, chosen in enumerate(selection.to_pylist()):
        labels = batch["labels"][k]
        expected = [token for token, keep in zip(chosen["token_id"], chosen["keep"], strict=True) if keep]
        assert labels[labels != IGNORED].tolist() == expected
        assert torch.equal(labels[labels != IGNORED], batch["input_ids"][k][labels != IGNORED])
    assert sum(map(sum, selection.column("keep").to_pylist())) < sum(map(len, selection.column("keep").to_pylist()))


# ---------------------------------------------------------------- reduction


def final_weights(blank_model: Path, small_world: Path, scores: Path, tmp_path: Path, **options) -> Path:
    out = tmp_path / "-".join(str(value) for value in options.values())
    selection = tmp_path / "selection"
    if not selection.exists():
        select(scores, selection, keep=50)
    run_train(train_config(blank_model, small_world, out, selection=selection, **options))
    return out


def test_global_reduction_does_not_depend_on_how_the_batch_is_cut(
    blank_model: Path, small_world: Path, scores: Path, tmp_path: Path
) -> None:
    whole = final_weights(blank_model, small_world, scores, tmp_path, micro_batch=8)
    cut = final_weights(blank_model, small_world, scores, tmp_path, micro_batch=1)
    assert_same_weights(whole, cut, tolerance=2e-5)


def test_micro_batch_reduction_averages_the_micro_batches(
    blank_model: Path, small_world: Path, scores: Path, tmp_path: Path
) -> None:
    options = {"loss_reduction": "micro-batch", "max_steps": 1}
    cut = final_weights(blank_model, small_world, scores, tmp_path, micro_batch=2, **options)
    first = json.loads((cut / "train.json").read_text())["mean_loss"]
    # The same step by hand: the mean over micro-batches of each one's mean.
    config = train_config(blank_model, small_world, tmp_path / "x", selection=tmp_path / "selection", micro_batch=2)
    vlm = load_vlm(str(blank_model))
    table = read_selection_table(tmp_path / "selection")
    rows = SelectedRows(open_dataset(small_world / "data.json"), make_encoder(vlm), table, end_of_turn="score")
    step = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))[:8].tolist()
    means = []
    for start in range(0, 8, 2):
        batch = Collator(0)([rows[row] for row in step[start : start + 2]])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = vlm.model(**batch).logits[:, :-1]
        means.append(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).item())
    assert first == pytest.approx(np.mean(means), abs=1e-5)
    glob = final_weights(blank_model, small_world, scores, tmp_path, micro_batch=2, max_steps=1)
    assert json.loads((glob / "train.json").read_text())["mean_loss"] != pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("loss_reduction", ["global", "micro-batch"])
def test_a_step_without_active_tokens_is_harmless(
    loss_reduction: str, blank_model: Path, small_world: Path, scores: Path, tmp_path: Path
) -> None:
    selection = select(scores, tmp_path / "selection", by="sample", keep=100)
    table = read_selection_table(selection)
    nothing = pa.array([[False] * len(keep) for keep in table.column("keep").to_pylist()], pa.list_(pa.bool_()))
    record = json.loads((selection / "selection.json").read_text())
    write_selection(selection, [table.set_column(4, "keep", nothing)], record)
    done = run_train(
        train_config(
            blank_model, small_world, tmp_path / "out", selection=selection, loss_reduction=loss_reduction, max_steps=2
        )
    )
    assert done.mean_loss == 0.0
    assert done.active_tokens == 0
    assert_same_weights(blank_model, tmp_path / "out")


def test_active_tokens_are_logged(blank_model: Path, small_world: Path, scores: Path, tmp_path: Path) -> None:
    selection = select(scores, tmp_path / "selection", keep=50)
    done = run_train(train_config(blank_model, small_world, tmp_path / "out", selection=selection))
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert log[-1]["active_tokens"] == done.active_tokens > 0
    assert done.rows == len(read_selection_table(selection))


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize("parts", [("projector",), ("language",), ("vision", "projector")])
def test_only_the_named_parts_change(
    parts: tuple[str, ...], blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    run_train(train_config(blank_model, small_world, tmp_path, parts=parts, max_steps=2))
    before, after = weights(blank_model), weights(tmp_path)
    owners = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "language"}
    changed = set()
    for name, value in before.items():
        part = next((part for key, part in owners.items() if key in name), "language")
        if not torch.equal(value, after[name]):
            changed.add(part)
    assert changed == set(parts)


def test_lora_changes_the_language_part_and_saves_a_plain_model(
    blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    run_train(train_config(blank_model, small_world, tmp_path, lora_rank=2, max_steps=2, learning_rate=1e-2))
    before, after = weights(blank_model), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any("language_model.layers.0" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_tower" in name or "embed_tokens" in name or "lm_head" in name for name in changed)
    difference = after["model.language_model.layers.0.mlp.up_proj.weight"]
    difference = difference - before["model.language_model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(difference, atol=1e-5) <= 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_result_is_a_plain_folder_with_its_processor(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    run_train(train_config(blank_model, small_world, tmp_path, max_steps=1))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.chat_template == AutoProcessor.from_pretrained(blank_model).chat_template
    assert model.config.model_type == "llava"


# ---------------------------------------------------------------- resuming and refusing


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_an_interrupted_and_resumed_training_equals_an_uninterrupted_one(
    lora_rank: int | None,
    blank_model: Path,
    small_world: Path,
    scores: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selection = select(scores, tmp_path / "selection", keep=70)
    options = {"selection": selection, "max_steps": 6, "save_steps": 2, "lora_rank": lora_rank}
    whole = run_train(train_config(blank_model, small_world, tmp_path / "whole", **options))

    original = SelectiveTrainer.training_step

    def interrupted(self: SelectiveTrainer, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    config = train_config(blank_model, small_world, tmp_path / "resumed", **options)
    monkeypatch.setattr(SelectiveTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_train(config)
    monkeypatch.undo()
    assert not (tmp_path / "resumed" / "model.safetensors").exists()
    resumed = run_train(config)
    assert (resumed.steps, resumed.active_tokens) == (6, whole.active_tokens)
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed", tolerance=1e-6)


def test_another_configuration_in_the_same_folder_stops(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    run_train(train_config(blank_model, small_world, tmp_path, max_steps=1))
    with pytest.raises(StorageError, match="seed: 0 there, 1 now"):
        run_train(train_config(blank_model, small_world, tmp_path, max_steps=1, seed=1))


def test_a_dataset_that_changed_since_scoring_is_refused(
    blank_model: Path, small_world: Path, scores: Path, tmp_path: Path
) -> None:
    selection = select(scores, tmp_path / "selection")
    rows = json.loads((small_world / "data.json").read_text())
    rows[0]["conversations"][1]["value"] += " changed"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    config = train_config(blank_model, small_world, tmp_path / "out", selection=selection, image_root=small_world)
    with pytest.raises(DataError, match="changed since it was scored"):
        run_train(replace(config, data=tmp_path / "data.json"))


def test_another_tokenisation_than_the_scored_one_is_refused(
    blank_model: Path, small_world: Path, scores: Path, tmp_path: Path
) -> None:
    selection = select(scores, tmp_path / "selection")
    table = read_selection_table(selection)
    drifted = [[*ids[:-1], ids[-1] + 1] for ids in table.column("token_id").to_pylist()]
    table = table.set_column(3, "token_id", pa.array(drifted, pa.list_(pa.int32())))
    vlm = load_vlm(str(blank_model))
    rows = SelectedRows(open_dataset(small_world / "data.json"), make_encoder(vlm), table, end_of_turn="score")
    with pytest.raises(DataError, match="answer tokens differ"):
        rows[0]


def test_rows_that_cannot_be_trained_on_are_told(
    blank_model: Path, small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((small_world / "data.json").read_text())[:8]
    for k in (1, 2, 5, 6):
        rows[k]["conversations"] = []
    (tmp_path / "data.json").write_text(json.dumps(rows))
    config = train_config(blank_model, small_world, tmp_path / "out", image_root=small_world, max_steps=1)
    done = run_train(replace(config, data=tmp_path / "data.json"))
    assert done.rows == 4
    told = capsys.readouterr().err
    assert "4 of 8 rows cannot be trained on and are left out (row 1: " in told
    assert "row 5: " in told
    assert "; and 1 more)" in told
    rows = [{**row, "conversations": []} for row in rows]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"no row of .*data.json can be trained on \(row 0: "):
        run_train(replace(config, data=tmp_path / "data.json", out=tmp_path / "none"))


def test_rows_are_cut_where_they_were_cut_for_the_scores(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    """What is behind the cut has no scores."""
    data = small_world / "data.json"
    run_score(ScoreConfig(model=str(blank_model), data=data, out=tmp_path / "scores", max_length=60))
    selection = select(tmp_path / "scores", tmp_path / "selection", by="sample", keep=100)
    config = train_config(blank_model, small_world, tmp_path / "out", selection=selection, max_steps=None, epochs=1)
    run_train(config)
    recipe = json.loads((tmp_path / "out/run.json").read_text())["identity"]["recipe"]
    assert recipe["max_length"] == 60
    run_score(ScoreConfig(model=str(blank_model), data=data, out=tmp_path / "long", max_length=3000))
    longer = select(tmp_path / "long", tmp_path / "longer-selection", by="sample", keep=100)
    run_train(replace(config, selection=longer, out=tmp_path / "as-ever", max_steps=1))
    recipe = json.loads((tmp_path / "as-ever/run.json").read_text())["identity"]["recipe"]
    assert recipe["max_length"] == 2048, "longer scores make no longer rows"
    with pytest.raises(ConfigError, match="--max-length is 100, and the selection was scored with --max-length 60"):
        run_train(replace(config, max_length=100, out=tmp_path / "longer"))


def test_an_unreadable_row_stops_training_and_says_how_to_leave_it_out(blank_model: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "gone.png", "conversations": turns}] * 8))
    with pytest.raises(DataError, match=r"row \d .*not found.*visgain select"):
        run_train(train_config(blank_model, tmp_path, tmp_path / "out"))
