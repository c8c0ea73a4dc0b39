"""The Hugging Face Trainer on an exported selection: the guide's own code, the tokens that carry loss, the loss."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from environments import blocks, replaced
from visgain.config import ExportConfig, ScoreConfig, SelectConfig, TrainConfig, WorldConfig
from visgain.data import open_dataset
from visgain.export.run import run_export
from visgain.export.shims.hf import ROW, WEIGHT, SelectedRows, SelectiveCollator, WeightedLoss, WeightedSFT
from visgain.export.shims.masks import IGNORED, MaskError, Masks
from visgain.scoring.run import run_score
from visgain.selection import run_select
from visgain.storage import read_selection_table
from visgain.training.run import run_train
from visgain.types import Sample
from visgain.vlm.load import load_vlm
from visgain.vlm.template import make_encoder
from visgain.world.dataset import write_world

GUIDE = Path(__file__).parents[1] / "docs/trainers/hf.md"
SOFT = "clamp:low=0.001,high=0.1,window=1"
masks_of_answers = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers 5.17 marks the answers of rows with pictures at wrong places",
)
SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "max_steps": 3,
    "learning_rate": 2e-4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, blank_model: Path) -> Path:
    """A folder as the guide has it: model/, data.json and its pictures, scores/."""
    folder = tmp_path_factory.mktemp("guide")
    write_world(WorldConfig(out=folder, split="train", rows=20, seed=3))
    (folder / "model").symlink_to(blank_model)
    config = ScoreConfig(
        model=str(folder / "model"), data=folder / "data.json", out=folder / "scores", template="chat", device="cpu"
    )
    run_score(config)
    return folder


@pytest.fixture
def export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Selects and exports as the guide says, and goes to the folder. Returns the selection's rows."""

    def export(weights: str = "hard") -> list[dict[str, Any]]:
        selection = folder / f"selection-{weights[:4]}"
        run_select(SelectConfig(scores=folder / "scores", out=selection, keep=60, weights=weights))
        run_export(ExportConfig(selection=selection, data=folder / "data.json", to="hf", out=folder / "export"))
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        return read_selection_table(selection).to_pylist()

    return export


def run_guide(*changes: tuple[str, str]) -> tuple[Any, list[dict[str, Any]], list[float]]:
    """Run the guide's code. Returns its trainer, the batches that reached the model, and the loss of each step."""
    settings = ", ".join(f"{name}={value!r}" for name, value in SETTINGS.items())
    [guide] = blocks(GUIDE, "python")
    guide = replaced(guide, ('output_dir="trained", ', f'output_dir="trained", {settings}, '), *changes)
    before, run, _ = guide.partition("trainer.train()")
    assert run
    names: dict[str, Any] = {}
    exec(before, names)
    trainer, batches = names["trainer"], []
    step = trainer.training_step

    def recorded(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(dict(inputs))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = recorded
    trainer.train()
    return trainer, batches, [log["loss"] for log in trainer.state.log_history if "loss" in log]


Row = tuple[tuple[int, ...], tuple[float, ...]]
"""Ids of a row, and the weight of each as a label."""


def expected(folder: Path, rows: list[dict[str, Any]]) -> list[Row]:
    """What our own encoder and the selection say of every kept row."""
    dataset, encoder = open_dataset(folder / "data.json"), make_encoder(load_vlm(str(folder / "model")), "chat")
    found = []
    for row in rows:
        sample = dataset[row["row"]]
        assert isinstance(sample, Sample)
        encoded = encoder.encode(sample, [image.open() for image in sample.images])
        weights = np.zeros(len(encoded.input_ids), np.float32)
        weights[encoded.is_answer] = row.get("weight", row["keep"])
        found.append((tuple(encoded.input_ids.tolist()), tuple(weights.tolist())))
    return found


def collated(batches: list[dict[str, Any]]) -> list[Row]:
    """The same from the batches; labels must be the ids or -100."""
    found = []
    for batch in batches:
        ids, labels, there = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        active = labels != IGNORED
        assert not (active & ~there).any()
        assert torch.equal(labels[active], ids[active])
        weights = batch.get(WEIGHT, torch.ones(ids.shape)) * active
        found += [(tuple(i[t].tolist()), tuple(w[t].tolist())) for i, w, t in zip(ids, weights, there, strict=True)]
    return found


# ---------------------------------------------------------------- the guide


@masks_of_answers
def test_exactly_the_selected_tokens_carry_loss(folder: Path, export: Callable[..., Any]) -> None:
    rows = export()
    assert len(rows) > 8
    trainer, batches, _ = run_guide()
    assert sorted(collated(batches[: -(-len(rows) // 4)])) == sorted(expected(folder, rows))
    assert not any(ROW in batch for batch in batches)
    assert trainer.state.global_step == 3


@masks_of_answers
@pytest.mark.parametrize("weights", ["hard", SOFT])
def test_the_loss_is_ours_step_by_step(
    folder: Path, export: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """A step of all kept rows, three times over, in both trainers: the order of rows does not matter."""
    rows = export(weights)
    monkeypatch.setitem(SETTINGS, "gradient_accumulation_steps", -(-len(rows) // 4))
    schedule = {"warmup_steps": 0, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0}
    for name, value in schedule.items():
        monkeypatch.setitem(SETTINGS, name, value)
    wrapped = "SelectiveCollator(collator, masks"
    soft = () if weights == "hard" else ((wrapped, f"{wrapped}, True"),)
    trainer, _, theirs = run_guide(*soft)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"parts: [vision, projector, language]\nlearning_rate: {SETTINGS['learning_rate']}\nmax_steps: 3\n"
        f"batch_size: {len(rows)}\nmicro_batch: {len(rows)}\nschedule: constant\nwarmup_ratio: 0.0\n"
    )
    config = TrainConfig(
        model=str(folder / "model"),
        data=folder / "data.json",
        selection=folder / f"selection-{weights[:4]}",
        out=tmp_path / "ours",
        recipe=str(recipe),
        template="chat",
        device="cpu",
    )
    run_train(config)
    log = [json.loads(line) for line in (tmp_path / "ours" / "log.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in log if "loss" in line]
    assert len(ours) == 3
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert ours[0] > ours[2]
    here, there = load_vlm(str(tmp_path / "ours")).model.state_dict(), trainer.model.state_dict()
    assert all(torch.allclose(here[name], there[name], atol=2e-4) for name in here)


@masks_of_answers
def test_a_template_that_drifted_stops_with_the_row(export: Callable[..., Any]) -> None:
    export()
    drift = 'processor.chat_template = processor.chat_template.replace("{{ eos_token }}", "")\n'
    with pytest.raises(ValueError, match=r"row \d+: supervised label \d+ is \d+ \('.*'\), and 2 \('</s>'\) was scored"):
        run_guide(("\n\ndef collator(batch)", f"\n{drift}\n\ndef collator(batch)"))


def test_rows_without_their_number_are_told_what_to_set(export: Callable[..., Any]) -> None:
    export()
    with pytest.raises(ValueError, match=r"no 'visgain_row'.* with remove_unused_columns=False"):
        run_guide((", remove_unused_columns=False", ""))


def test_soft_weights_need_a_word(export: Callable[..., Any]) -> None:
    export(SOFT)
    with pytest.raises(ValueError, match="this selection has soft weights: say weights=True"):
        run_guide()


@masks_of_answers
def test_soft_weights_may_count_alike(folder: Path, export: Callable[..., Any]) -> None:
    rows = export(SOFT)
    _, batches, _ = run_guide(("SelectiveCollator(collator, masks", "SelectiveCollator(collator, masks, False"))
    alike = [{**row, "weight": [float(keep) for keep in row["keep"]]} for row in rows]
    assert sorted(collated(batches[: -(-len(rows) // 4)])) == sorted(expected(folder, alike))


@masks_of_answers
def test_other_data_is_evaluated_and_mixed_in_with_a_word(
    folder: Path, export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = export(SOFT)
    monkeypatch.setitem(SETTINGS, "gradient_accumulation_steps", -(-(len(rows) + 4) // 4))
    monkeypatch.setitem(SETTINGS, "max_steps", 1)
    trainer, batches, _ = run_guide(
        ("SelectiveCollator(collator, masks", "SelectiveCollator(collator, masks, True, others=True"),
        ("train_dataset=SelectedRows(rows, masks)", "train_dataset=[*SelectedRows(rows, masks), *rows[:4]]"),
    )
    other = [{"row": row, "keep": 1.0} for row in range(4)]
    assert sorted(collated(batches)) == sorted(expected(folder, [*rows, *other]))
    data = json.loads((folder / "data.json").read_text())[:4]
    plain = transformers.Trainer(
        model=trainer.model, args=trainer.args, data_collator=trainer.data_collator.collator, eval_dataset=data
    )
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)


@masks_of_answers
def test_evaluation_on_other_data_stops_without_that_word(
    folder: Path, export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    monkeypatch.setitem(SETTINGS, "max_steps", 1)
    trainer, _, _ = run_guide()
    with pytest.raises(ValueError, match=r"no 'visgain_row'.*an eval_dataset.*others=True"):
        trainer.evaluate(json.loads((folder / "data.json").read_text())[:4])


# ---------------------------------------------------------------- the pieces


def test_a_dataset_that_is_too_short_is_told(folder: Path, export: Callable[..., Any]) -> None:
    export()
    with pytest.raises(MaskError, match="this dataset has 2 rows"):
        SelectedRows([{}, {}], Masks(folder / "export" / "masks.safetensors"))


def test_a_number_in_the_messages_is_found_and_taken_out(folder: Path, export: Callable[..., Any]) -> None:
    rows = export()
    seen: list[dict[str, Any]] = []

    def collator(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.extend(batch)
        return {"labels": torch.tensor([rows[1]["token_id"]])}

    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    message = {"role": "user", "content": content, ROW: rows[1]["row"], "tool_calls": None}
    batch = SelectiveCollator(collator, Masks(folder / "export" / "masks.safetensors"))([{"messages": [message]}])
    assert (batch["labels"][0] != IGNORED).tolist() == rows[1]["keep"]
    assert seen == [{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]}]


def test_a_number_is_found_behind_a_message_that_somebody_added(folder: Path, export: Callable[..., Any]) -> None:
    """`datasets.map` gives a system message in front the field as None."""
    rows = export()
    added = {"role": "system", "content": "Be brief.", ROW: None}
    messages = [added, {"role": "user", "content": "What?", ROW: rows[1]["row"]}]
    labels = torch.tensor([rows[1]["token_id"]])
    collator = SelectiveCollator(lambda _: {"labels": labels}, Masks(folder / "export" / "masks.safetensors"))
    assert (collator([{"messages": messages}])["labels"][0] != IGNORED).tolist() == rows[1]["keep"]


@pytest.mark.parametrize("row", [{ROW: None, "text": ""}, {"messages": [{"role": "user", "content": "", ROW: None}]}])
def test_a_row_whose_number_is_none_is_told_what_to_do(
    folder: Path, export: Callable[..., Any], row: dict[str, Any]
) -> None:
    export()
    collator = SelectiveCollator(lambda _: {}, Masks(folder / "export" / "masks.safetensors"))
    with pytest.raises(MaskError, match=r"no 'visgain_row', only '(text|messages)': .*SelectedRows.*others=True"):
        collator([row])


def test_a_row_of_other_data_keeps_its_labels_and_is_told_once(
    folder: Path, export: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = export(SOFT)
    ours = torch.tensor(rows[0]["token_id"])
    other = torch.full_like(ours, IGNORED)
    other[0] = 7
    masks = Masks(folder / "export" / "masks.safetensors")
    collator = SelectiveCollator(lambda _: {"labels": torch.stack([ours, other])}, masks, weights=True, others=True)
    with caplog.at_level(logging.WARNING, logger="visgain"):
        for _ in range(2):
            batch = collator([{ROW: rows[0]["row"]}, {"text": "What?"}])
    assert torch.equal(batch["labels"][1], other)
    assert batch[WEIGHT].tolist() == [pytest.approx(rows[0]["weight"]), (other == 7).float().tolist()]
    [told] = caplog.messages
    assert "a row has no 'visgain_row', only 'text', and keeps all of its labels" in told


@pytest.mark.parametrize("shape", [(1, 8), (8,), (3, 8)])
def test_a_collator_that_packs_or_drops_rows_is_told(
    folder: Path, export: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    rows = export()
    labels = torch.full(shape, IGNORED)
    collator = SelectiveCollator(lambda _: {"labels": labels}, Masks(folder / "export" / "masks.safetensors"))
    with pytest.raises(MaskError, match=r"labels of shape \[.*8\] from 2 rows.* neither packs nor drops rows"):
        collator([{ROW: rows[0]["row"]}, {ROW: rows[1]["row"]}])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_weights_count_in_training_and_in_evaluation(
    folder: Path, export: Callable[..., Any], tmp_path: Path, smoothing: float
) -> None:
    """Both losses are the weighted mean over all rows as one batch, each token smoothed over the vocabulary."""
    export(SOFT)
    masks = Masks(folder / "export" / "masks.safetensors")

    def collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        answers = [masks.of(row["number"]).token_id.long() for row in rows]
        labels = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED)
        labels = torch.nn.functional.pad(labels, (2, 0), value=IGNORED)
        return {"input_ids": labels.clamp(min=0), "labels": labels}

    class MyTrainer(WeightedLoss, transformers.Trainer):
        pass

    data = SelectedRows([{"number": number} for number in range(20)], masks)
    wrapped = SelectiveCollator(collator, masks, weights=True)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            initializer_range=1.0,  # tokens differ in their loss
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=int(masks.columns["token_id"].max()) + 1,
        )
    )
    settings = {**SETTINGS, "gradient_accumulation_steps": -(-len(data) // 4)}
    settings |= {"max_steps": 1, "per_device_eval_batch_size": len(data), "remove_unused_columns": False}
    trainer = MyTrainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=smoothing, **settings),
        train_dataset=data,
        eval_dataset=data,
        data_collator=wrapped,
    )
    batch = wrapped([data[k] for k in range(len(data))])
    with torch.no_grad():
        log_probs = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, batch["labels"][:, 1:, None].clamp(min=0))[..., 0]
    each = -(1 - smoothing) * chosen - smoothing * log_probs.mean(-1)
    weight = batch[WEIGHT][:, 1:]
    loss = float((each * weight).sum() / weight.sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


SFT = {"label_smoothing_factor": 0.0, "loss_type": "nll", "compute_loss_func": None}


def weighted_sft(head: bool = True, **settings: Any) -> Any:
    """A trainer that makes its loss of a head's log-probabilities, as TRL's; `head`: whether there are any."""

    class Trainer:
        args = SimpleNamespace(**{**SFT, **settings})
        compute_loss_func = args.compute_loss_func

        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
            return model(inputs["labels"]).loss()

    class Head(torch.nn.Module):
        def forward(self, labels: torch.Tensor) -> Any:
            outputs = SimpleNamespace(log_probs=torch.full(labels[:, 1:].shape, -1.0) if head else None)
            outputs.loss = lambda: -outputs.log_probs.sum() if head else torch.zeros(())
            return outputs

    class Weighted(WeightedSFT, Trainer):
        pass

    trainer, model = Weighted(), Head()
    return lambda inputs: trainer.compute_loss(model, inputs)


WEIGHED = {"labels": torch.tensor([[IGNORED, 4, 5]]), WEIGHT: torch.tensor([[0.0, 0.5, 1.5]])}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"label_smoothing_factor": 0.1}, "loss with label_smoothing_factor=0.1: leave it out, or let all"),
        ({"loss_type": "dft"}, "loss with loss_type='dft': leave it out, or let all"),
        ({"compute_loss_func": print}, "loss with compute_loss_func: leave it out, or let all"),
        ({"head": False}, "no head whose log-probabilities could be weighed: let all"),
    ],
)
def test_weights_that_trl_would_not_see_stop(settings: dict[str, Any], told: str) -> None:
    """A batch without weights passes: nothing of it could be lost."""
    compute_loss = weighted_sft(**settings)
    with pytest.raises(MaskError, match=told):
        compute_loss(WEIGHED)
    assert WEIGHT in WEIGHED
    compute_loss({"labels": WEIGHED["labels"]})
    assert weighted_sft()(WEIGHED) == 2.0


def test_a_step_without_any_label_is_a_loss_of_zero() -> None:
    class Trainer:
        class args:  # noqa: N801
            average_tokens_across_devices = True
            label_smoothing_factor = 0.0
            world_size = 1
            device = "cpu"

        class accelerator:  # noqa: N801
            num_processes = 1

        def get_batch_samples(self, batches: Any) -> Any:
            return batches, None

    class Weighted(WeightedLoss, Trainer):
        pass

    class Model(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return SimpleNamespace(logits=logits)

    logits = torch.randn(1, 4, 7, requires_grad=True)
    empty = {"labels": torch.full((1, 4), IGNORED)}
    trainer = Weighted()
    _, count = trainer.get_batch_samples([empty])
    for total in (count, None):
        loss = trainer.compute_loss(Model(), empty, num_items_in_batch=total)
        loss.backward()
        assert loss.item() == 0
        assert not logits.grad.any()


@pytest.mark.slow
@masks_of_answers
def test_two_processes_train_as_one(folder: Path, export: Callable[..., Any]) -> None:
    """A step of all kept rows, with weights: its loss, the weights after it and an evaluation in batches of two do not
    depend on who computed what.
    """
    rows = export(SOFT)
    kept = len(rows) - len(rows) % 2
    settings = {**SETTINGS, "per_device_train_batch_size": 1, "seed": 0, "lr_scheduler_type": "constant"}
    del settings["gradient_accumulation_steps"]
    [guide] = blocks(GUIDE, "python")
    told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    tell = """
evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"]
if trainer.is_world_process_zero():
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    grown = sum(float(p.double().abs().sum()) for p in trainer.model.parameters())
    Path("told.json").write_text(json.dumps([[*losses, evaluated], grown]))
"""
    found = []
    for ranks in (1, 2):
        program = replaced(
            guide,
            (
                'output_dir="trained", ',
                f'output_dir="trained", {told}, gradient_accumulation_steps={kept // ranks}, '
                f"per_device_eval_batch_size={2 // ranks}, ",
            ),
            ("SelectiveCollator(collator, masks", "SelectiveCollator(collator, masks, True"),
            (
                "train_dataset=SelectedRows(rows, masks)",
                f"train_dataset=Subset(SelectedRows(rows, masks), range({kept}))",
            ),
        )
        (folder / "train.py").write_text(f"from torch.utils.data import Subset\n{program}{tell}")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "train.py"]
        done = subprocess.run([sys.executable, *launch], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((folder / "told.json").read_text()))
    (alone, weights), (together, their_weights) = found
    assert len(alone) == 3 + 1
    assert together == pytest.approx(alone, rel=1e-4)
    assert their_weights == pytest.approx(weights, rel=1e-6)
