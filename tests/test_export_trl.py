"""TRL's own SFTTrainer on an exported selection: the real package, in an environment of its own, as the guide says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from environments import Environment, blocks, environment, replaced
from visgain.config import ExportConfig, ScoreConfig, SelectConfig, WorldConfig
from visgain.data import open_dataset
from visgain.export.run import run_export
from visgain.export.shims.masks import IGNORED
from visgain.scoring.run import run_score
from visgain.selection import run_select
from visgain.storage import read_selection_table
from visgain.types import Sample
from visgain.vlm.encode import Encoder
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.template import make_encoder
from visgain.world.dataset import write_world

pytestmark = pytest.mark.integration

GUIDE = Path(__file__).parents[1] / "docs/trainers/trl.md"
SOFT = "clamp:low=0.001,high=0.1,window=1"

RECORD = """\
import json
from trl import SFTTrainer

steps, training_step = [], SFTTrainer.training_step

def recorded(self, model, inputs, *args, **kwargs):
    names = ("input_ids", "attention_mask", "labels", "visgain_weight")
    steps.append({name: inputs[name].tolist() for name in names if name in inputs})
    return training_step(self, model, inputs, *args, **kwargs)

SFTTrainer.training_step = recorded
"""

TELL = """
losses = [log[name] for log in trainer.state.log_history for name in ("loss", "eval_loss") if name in log]
json.dump({"batches": steps, "losses": losses}, open("seen.json", "w"))
"""

SETTINGS = (
    'SFTConfig(output_dir="trained", max_length=2048',
    'SFTConfig(output_dir="trained", max_length=2048, use_cpu=True, bf16=False, report_to="none", logging_steps=1, '
    'per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1, save_strategy="no"',
)


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return environment("trl", tmp_path_factory.mktemp("home"))


@dataclass(frozen=True)
class Made:
    """A folder as the guide has it: model/ and export/; and what its rows are."""

    folder: Path
    data: Path
    vlm: VLM
    encoder: Encoder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, blank_model: Path) -> Made:
    folder = tmp_path_factory.mktemp("guide")
    (folder / "model").symlink_to(blank_model)
    data = write_world(WorldConfig(out=folder / "world", split="train", rows=32, seed=3))
    model = str(folder / "model")
    run_score(ScoreConfig(model=model, data=data, out=folder / "scores", template="chat", device="cpu"))
    vlm = load_vlm(model, device="cpu")
    return Made(folder=folder, data=data, vlm=vlm, encoder=make_encoder(vlm, "chat"))


def export(made: Made, *, weights: str = "hard") -> list[dict[str, Any]]:
    """Select and export anew, as the guide says. Returns the selection's rows."""
    selection = made.folder / f"selection-{weights.partition(':')[0]}"
    run_select(SelectConfig(scores=made.folder / "scores", out=selection, keep=60, weights=weights))
    run_export(ExportConfig(selection=selection, data=made.data, to="trl", out=made.folder / "export"))
    return read_selection_table(selection).to_pylist()


def guide() -> str:
    return blocks(GUIDE, "python")[0]


def soft_guide() -> str:
    """The guide's code, with its trainer for soft weights."""
    plain, mixin = blocks(GUIDE, "python")
    before, trainer, after = plain.partition("trainer = SFTTrainer(")
    assert trainer
    after = replaced(after, ("SelectiveCollator(collator, masks)", "collator"))
    return f"{before}{mixin}trainer = WeightedTrainer({after}"


def run(trl: Environment, made: Made, program: str) -> subprocess.CompletedProcess[str]:
    (made.folder / "seen.json").unlink(missing_ok=True)
    return trl.run(["python", "-c", program], cwd=made.folder)


def seen(trl: Environment, made: Made, program: str) -> tuple[list[dict[str, Any]], list[float]]:
    """The batches that the model was trained on, and the loss of each optimiser step and evaluation."""
    done = run(trl, made, RECORD + replaced(program, SETTINGS) + TELL)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((made.folder / "seen.json").read_text())
    return told["batches"], told["losses"]


Row = tuple[tuple[int, ...], tuple[float, ...]]
"""Ids of a row, and the weight of each as a label."""


def expected(made: Made, rows: Sequence[dict[str, Any]]) -> list[Row]:
    """What our own encoder and the selection say of every kept row."""
    dataset, found = open_dataset(made.data), []
    for row in rows:
        sample = dataset[row["row"]]
        assert isinstance(sample, Sample)
        encoded = made.encoder.encode(sample, [image.open() for image in sample.images])
        weights = np.zeros(len(encoded.input_ids), np.float32)
        weights[encoded.is_answer] = row["weight"] if "weight" in row else np.array(row["keep"], np.float32)
        found.append((tuple(encoded.input_ids.tolist()), tuple(weights.tolist())))
    return found


def collated(batches: Sequence[dict[str, Any]]) -> list[Row]:
    """The same from what reached the model; labels must be the ids or -100."""
    found = []
    for batch in batches:
        weights = batch.get("visgain_weight", [[1.0] * len(row) for row in batch["labels"]])
        for ids, there, labels, weight in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], weights, strict=True
        ):
            real = [k for k, value in enumerate(there) if value]
            assert all(labels[k] in (IGNORED, ids[k]) for k in real)
            assert all(label == IGNORED for k, label in enumerate(labels) if k not in real)
            found.append(
                (
                    tuple(ids[k] for k in real),
                    tuple(0.0 if labels[k] == IGNORED else weight[k] for k in real),
                )
            )
    return found


def naive_loss(made: Made, rows: Sequence[Row]) -> float:
    """sum(weight * nll) / sum(weight) over the rows, one by one with all logits; pictures by their rows' ids."""
    dataset = open_dataset(made.data)
    samples = [sample for row in range(len(dataset)) if isinstance(sample := dataset[row], Sample)]
    encoded = {
        tuple(one.input_ids.tolist()): one
        for one in (made.encoder.encode(sample, [image.open() for image in sample.images]) for sample in samples)
    }
    total = weight_sum = 0.0
    for ids, weights in rows:
        inputs = {"input_ids": torch.tensor([ids]), **encoded[ids].model_inputs}
        with torch.no_grad():
            logits = made.vlm.model(**inputs).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total += float((nll * torch.tensor(weights[1:])).sum())
        weight_sum += sum(weights[1:])
    return total / weight_sum


def test_exactly_the_selected_tokens_carry_loss(trl: Environment, made: Made) -> None:
    rows = export(made)
    assert {len(row["keep"]) == sum(row["keep"]) for row in rows} == {True, False}
    batches, losses = seen(trl, made, guide())
    assert sorted(collated(batches)) == sorted(expected(made, rows))
    assert losses[0] == pytest.approx(naive_loss(made, collated(batches[:2])), rel=1e-4)


def test_soft_weights_weigh_the_loss(trl: Environment, made: Made) -> None:
    rows = export(made, weights=SOFT)
    batches, losses = seen(trl, made, soft_guide())
    found = collated(batches)
    assert sorted(found) == sorted(expected(made, rows))
    assert len({weight for _, weights in found for weight in weights}) > 9
    assert losses[0] == pytest.approx(naive_loss(made, collated(batches[:2])), rel=1e-4)


def test_soft_weights_stop_where_nobody_says_what_to_do_with_them(trl: Environment, made: Made) -> None:
    export(made, weights=SOFT)
    done = run(trl, made, replaced(guide(), SETTINGS))
    assert done.returncode != 0
    assert "this selection has soft weights: say weights=True" in done.stderr


@pytest.mark.parametrize("setting", ["label_smoothing_factor=0.1", "loss_type='dft'"])
def test_soft_weights_stop_where_the_loss_would_not_see_them(trl: Environment, made: Made, setting: str) -> None:
    export(made, weights=SOFT)
    done = run(trl, made, replaced(soft_guide(), ("max_length=2048)", f"max_length=2048, {setting})"), SETTINGS))
    assert done.returncode != 0
    assert f"WeightedSFT cannot weigh SFTTrainer's loss with {setting}: leave it out" in done.stderr


def test_other_data_is_mixed_in_and_evaluated_with_a_word(trl: Environment, made: Made) -> None:
    rows = export(made, weights=SOFT)
    loaded = 'train_dataset=load_dataset("parquet", data_files="export/train.parquet", split="train")'
    others = """\
from datasets import Dataset, concatenate_datasets

selected = load_dataset("parquet", data_files="export/train.parquet", split="train")
for row in (other := selected.select(range(4)).to_list()):
    for message in row["messages"]:
        del message["visgain_row"]
other = Dataset.from_list(other).cast_column("images", selected.features["images"])
"""
    program = replaced(
        soft_guide(),
        ("collator, masks, weights=True)", f"collator, masks, weights=True, others=True)\n{others}"),
        (loaded, "train_dataset=concatenate_datasets([selected, other.cast(selected.features)]), eval_dataset=other"),
        ("max_length=2048)", "max_length=2048, eval_on_start=True)"),
    )
    batches, losses = seen(trl, made, program)
    full = expected(made, [{**row, "weight": [1.0] * len(row["keep"])} for row in rows[:4]])
    assert sorted(collated(batches)) == sorted([*expected(made, rows), *full])
    assert losses[0] == pytest.approx(naive_loss(made, full), rel=1e-4)
    assert losses[1] == pytest.approx(naive_loss(made, collated(batches[:2])), rel=1e-4)


def test_a_template_that_drifted_stops_with_row_place_and_ids(trl: Environment, made: Made) -> None:
    export(made)
    drifted = (
        "written = processor.chat_template\n"
        'processor.chat_template = written.replace(" ASSISTANT:{% generation %} ", " ASSISTANT:{% generation %}")\n'
    )
    program = replaced(
        guide(),
        SETTINGS,
        ("collator = DataCollator", drifted + "collator = DataCollator"),
    )
    done = run(trl, made, program)
    assert done.returncode != 0
    assert "supervised label 0 is" in done.stderr
    assert "was scored. Tokenizer, chat template or the trainer's choice of supervised tokens differ" in done.stderr


def test_labels_on_the_prompt_stop(trl: Environment, made: Made) -> None:
    export(made)
    program = replaced(guide(), SETTINGS, (", assistant_only_loss=True", ""))
    done = run(trl, made, program)
    assert done.returncode != 0
    assert "supervised label 0 is" in done.stderr


def test_datasets_opens_ratings_as_nanovlm_would(trl: Environment, made: Made, tmp_path: Path) -> None:
    selection = tmp_path / "selection"
    run_select(SelectConfig(scores=made.folder / "scores", out=selection, keep=100, by="sample"))
    config = ExportConfig(
        selection=selection, scores=made.folder / "scores", data=made.data, to="finevision", out=tmp_path / "export"
    )
    run_export(config)
    program = (
        "import json; from datasets import load_dataset\n"
        "rows = load_dataset('export/data', split='train')\n"
        "json.dump([[len(row['images'][0].getbands()) if row['images'] else 0, len(row['texts']), "
        "row['visual_dependency_ratings']] for row in rows], open('seen.json', 'w'))\n"
    )
    done = trl.run(["python", "-c", program], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "seen.json").read_text())
    assert len(rows) == 32
    assert {bands for bands, _, _ in rows} == {0, 3}
    for bands, n_turns, ratings in rows:
        assert len(ratings) == n_turns
        assert all((rating in range(1, 6)) if bands else rating is None for rating in ratings)
