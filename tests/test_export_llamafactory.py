"""LLaMA-Factory tokenises and trains on a selection: the real package, in an environment of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import foreign_run
from environments import Environment, batches, blocks, commands, environment

pytestmark = pytest.mark.integration

GUIDE = Path(__file__).parents[1] / "docs" / "trainers" / "llama-factory.md"
# It imports torchaudio wherever it reads pictures, and uses it for sound alone.
STUBS = {"torchaudio": "raise_if_used = None\n"}
CPU = {"use_cpu": True, "report_to": "none", "save_strategy": "no"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's commands of visgain were run here, and its train.yaml is here."""
    folder = tmp_path_factory.mktemp("llama-factory")
    foreign_run.write_folder(folder)
    foreign_run.run_ours(GUIDE, folder)
    [text] = blocks(GUIDE, "yaml")
    (folder / "train.yaml").write_text(yaml.safe_dump({**yaml.safe_load(text), **CPU}))
    return folder


@pytest.fixture(scope="module")
def llama_factory(folder: Path) -> Environment:
    return environment("llama-factory", folder, STUBS)


def tokenise(llama_factory: Environment, *options: str) -> str:
    """Run our program with other options. Returns what it says last."""
    command = ["python", "export/visgain_labels.py", "train.yaml", *options]
    done = llama_factory.run(command)
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


def test_the_guide_trains_on_exactly_the_selected_tokens(llama_factory: Environment, folder: Path) -> None:
    theirs = [command for command in commands(GUIDE) if command[0] != "visgain"]
    assert len(theirs) == 2
    for command in theirs:
        done = llama_factory.run(command, spy=folder / "batches.jsonl")
        assert done.returncode == 0, done.stderr[-3000:]
    pairs = foreign_run.check_labels(folder, batches(folder / "batches.jsonl"))
    assert 0 < sum(sum(row["keep"]) for _, row in pairs) < sum(len(row["keep"]) for _, row in pairs)
    assert (folder / "trained" / "model.safetensors").is_file()


def test_every_selected_token_arrives_or_is_counted(llama_factory: Environment, folder: Path) -> None:
    rows = foreign_run.kept_rows(folder)
    active = sum(sum(row["keep"]) for row in rows)
    said = tokenise(llama_factory, "tokenized_path=whole", "preprocessing_num_workers=2", "val_size=0.3")
    assert said == f"whole: {active} of {active} selected tokens carry loss, in {len(rows)} of {len(rows)} rows"
    packed = tokenise(llama_factory, "tokenized_path=packed", "packing=true", "cutoff_len=300")
    assert packed == f"packed: {active} of {active} selected tokens carry loss"
    cut = tokenise(llama_factory, "tokenized_path=cut", "max_samples=3")
    first = sum(sum(row["keep"]) for row in [row for row in rows if "<image>" in row["question"]][:3])
    assert cut.startswith(f"cut: {first} of {active} selected tokens carry loss, in 3 of {len(rows)} rows; ")
    assert "is there already" in tokenise(llama_factory, "tokenized_path=whole")


def test_another_template_stops_before_anything_is_written(llama_factory: Environment, folder: Path) -> None:
    options = ["template=yi_vl", "tokenized_path=drift", "preprocessing_num_workers=2"]
    said = tokenise(llama_factory, *options)
    assert re.match(r"visgain: row \d+: supervised label ", said)
    assert "is 14 ('\\n'), and 2 ('</s>') was scored" in said
    assert not (folder / "drift").exists()


def test_training_on_last_turns_alone_is_refused(llama_factory: Environment, folder: Path) -> None:
    said = tokenise(llama_factory, "mask_history=true", "tokenized_path=last")
    assert said.startswith("visgain: mask_history has LLaMA-Factory train on the last turn of each row alone")
    assert not (folder / "last").exists()


def test_llama_factory_alone_refuses_the_dataset(llama_factory: Environment, folder: Path) -> None:
    done = llama_factory.run(["llamafactory-cli", "train", "train.yaml", "tokenized_path=forgotten", "output_dir=none"])
    assert done.returncode != 0
    assert "tokenise this dataset with visgain_labels.py before training" in done.stderr
    assert not (folder / "forgotten").exists()
