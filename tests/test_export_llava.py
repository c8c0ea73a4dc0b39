"""Exports to LLaVA, its relatives and nanoVLM: the launcher, run on stand-ins for these trainers (forks/)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from environments import commands
from tiny_llava import clip_llava, qwen2_like, siglip_llava, vicuna_like
from visgain.config import ExportConfig
from visgain.data import open_dataset
from visgain.errors import ConfigError
from visgain.export import EXPORTERS
from visgain.export.run import ExportSummary, run_export
from visgain.storage import SELECTION_SCHEMA, SOFT_SELECTION_SCHEMA, write_selection
from visgain.types import Sample
from visgain.vlm.encode import Encoder
from visgain.vlm.load import VLM
from visgain.vlm.template import make_encoder

FORKS = Path(__file__).parent / "forks"
GUIDES = Path(__file__).parents[1] / "docs" / "trainers"
IGNORED = -100

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)

TALKS = [
    ["What is this?", "A red cup."],
    ["How many people?", "2 people, 1 dog.", "Where?", "In front of a house, on 3 tables.", "Sure?", "Yes."],
    ["Describe the picture.", "The white cat is sitting on a table, a dog there."],
    ["Was ist das? 犬", "Ünïcode 🙂 and  two  spaces, é", "さて", "犬です。"],
    ["Is it red?", "Yes"],
]


@dataclass(frozen=True)
class Fork:
    """A trainer, what stands for it, and the model and template that it is scored with."""

    name: str  # of the exporter
    folder: str
    script: str
    tokenizer: str = "vicuna"
    template: str = "llava-1.5"


TRAINERS = [
    Fork("llava", "llava", "llava/train/train_mem.py"),
    Fork("llava", "llava", "llava/train/train.py"),  # the dataset's module is the script itself
    Fork("sharegpt4v", "sharegpt4v", "share4v/train/train_mem.py", template="sharegpt4v"),
    Fork("llava-next", "llava_next", "llava/train/train_mem.py"),
    Fork("llava-next", "llava_next", "llava/train/train.py", "qwen", "chat"),
    Fork("tinyllava", "tinyllava", "tinyllava/train/train.py"),
    Fork("tinyllava", "tinyllava_1", "tinyllava/train/train.py", "qwen", "chat"),
    Fork("prismatic", "prismatic", "scripts/pretrain.py"),
    Fork("open-qwen2vl", "open_qwen2vl", "scripts/pretrain.py", "qwen", "open-qwen2vl"),
]
LLAVA, NEXT, NEXT_QWEN = TRAINERS[1], TRAINERS[3], TRAINERS[4]
SLOW = [pytest.mark.slow]
NANOVLM = Fork("nanovlm", "nanovlm", "train.py", "qwen", "chat")


@cache
def model(tokenizer: str) -> VLM:
    if tokenizer == "vicuna":
        return clip_llava(vicuna_like("legacy"), side=28)
    vlm = siglip_llava(qwen2_like(None), side=28)
    vlm.processor.chat_template = CHATML
    return vlm


@cache
def encoder(tokenizer: str, template: str, max_length: int | None = None) -> Encoder:
    return make_encoder(model(tokenizer), template, max_length=max_length)


def make_rows(folder: Path, talks: Sequence[Sequence[str]] = TALKS, n: int = 12) -> Path:
    """A dataset: every fifth row without a picture, ids that are not unique."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(n):
        said = talks[number % len(talks)]
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
        picture = {}
        if number % 5 != 4:
            name = f"pictures/{number}.png"
            (folder / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (9, 6), (number, 0, 0)).save(folder / name)
            picture = {"image": name}
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append({"id": f"{number // 2:05d}", **picture, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def select(
    folder: Path, data: Path, fork: Fork, *, max_length: int | None = None, soft: bool = False
) -> tuple[ExportConfig, dict[int, list[int]]]:
    """A selection of most rows with masks drawn at random, and the kept tokens of each of its rows in order."""
    drawn = np.random.default_rng(0)
    dataset, encode = open_dataset(data, data.parent), encoder(fork.tokenizer, fork.template, max_length).encode
    chosen, kept = [], {}
    for row in range(len(dataset)):
        sample = dataset[row]
        assert isinstance(sample, Sample)
        if row % 4 == 3:
            continue
        token_id = encode(sample, [image.open() for image in sample.images]).token_id
        keep = drawn.random(len(token_id)) < 0.6
        keep[drawn.integers(len(keep))] = True
        kept[len(chosen)] = token_id[keep].tolist()
        values = {"row": row, "id": sample.id, "fingerprint": sample.fingerprint}
        weight = {"weight": keep.astype(np.float32) * 2} if soft else {}
        chosen.append({**values, "token_id": token_id, "keep": keep, **weight})
    schema = SOFT_SELECTION_SCHEMA if soft else SELECTION_SCHEMA
    identity = {"template": fork.template, "max_length": max_length or 2048, "model": "tiny"}
    table = pa.Table.from_pylist(chosen, schema=schema)
    write_selection(folder / "selection", [table], {"identity": identity, "rule": "random"}, schema)
    config = ExportConfig(selection=folder / "selection", data=data, to=fork.name, out=folder / "out")
    return config, kept


def save_tokenizer(fork: Fork, path: Path) -> Path:
    model(fork.tokenizer).processor.tokenizer.backend_tokenizer.save(str(path))
    return path


@dataclass(frozen=True)
class Case:
    """An export and what is needed to train on it."""

    fork: Fork
    config: ExportConfig
    kept: Mapping[int, list[int]]  # index of the kept row -> ids that are to carry loss
    done: ExportSummary
    tokenizer: Path

    @property
    def out(self) -> Path:
        return self.config.out

    def run(self, *before: str, arguments: Sequence[str] = (), **said: Any) -> subprocess.CompletedProcess[str]:
        """The stand-in's script through the launcher. `said`: other values for its arguments."""
        fork = FORKS / self.fork.folder
        data = {"data_path": self.out / "data.json", "train_dataset_path": self.out / "data"}
        values = {**data, "image_folder": self.config.data.parent, "tokenizer": self.tokenizer} | said
        options = [f"--{name}={value}" for name, value in ({"output": self.out.parent / "said.jsonl"} | values).items()]
        launcher = str(self.out / "visgain_launch.py")
        environment = {**os.environ, "PYTHONPATH": f"{FORKS}{os.pathsep}{fork}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *before, launcher, *arguments, str(fork / self.fork.script), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    def said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out.parent / "said.jsonl").read_text().splitlines()]


def make_case(folder: Path, fork: Fork, data: Path | None = None, **options: Any) -> Case:
    config, kept = select(folder, data or make_rows(folder / "data"), fork, **options)
    return Case(fork, config, kept, run_export(config), save_tokenizer(fork, folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("llava"), LLAVA)


def carrying(labels: Sequence[int]) -> list[int]:
    """The labels that carry loss."""
    return [label for label in labels if label != IGNORED]


# ---------------------------------------------------------------- what carries loss


def like_another(fork: Fork) -> Any:
    """Trainers that do with a row what another one does take their turn with the slow tests."""
    quick = fork in (LLAVA, NEXT_QWEN, *TRAINERS[6:])
    return pytest.param(fork, id=f"{fork.folder}-{Path(fork.script).stem}-{fork.template}", marks=[] if quick else SLOW)


@pytest.mark.parametrize("fork", [like_another(fork) for fork in TRAINERS])
def test_exactly_the_selected_tokens_carry_loss(fork: Fork, tmp_path: Path) -> None:
    case = make_case(tmp_path, fork)
    done = case.run()
    assert done.returncode == 0, done.stderr
    items = case.said()
    assert {item["index"]: carrying(item["labels"]) for item in items} == case.kept
    assert all(
        label in (IGNORED, t) for item in items for label, t in zip(item["labels"], item["input_ids"], strict=True)
    )
    assert sum(map(len, case.kept.values())) == case.done.active_tokens


def test_without_the_launcher_more_tokens_carry_loss(llava: Case) -> None:
    """The test above sees something: the stand-in by itself trains on all answers."""
    script = FORKS / "llava" / "llava/train/train.py"
    said = llava.out.parent / "vanilla.jsonl"
    options = [f"--data_path={llava.out / 'data.json'}", f"--image_folder={llava.config.data.parent}"]
    options += [f"--tokenizer={llava.tokenizer}", f"--output={said}", "--workers=0"]
    environment = {**os.environ, "PYTHONPATH": f"{FORKS}{os.pathsep}{FORKS / 'llava'}"}
    subprocess.run([sys.executable, str(script), *options], env=environment, check=True, timeout=120)
    items = [json.loads(line) for line in said.read_text().splitlines()]
    assert sum(label != IGNORED for item in items for label in item["labels"]) == llava.done.tokens


@pytest.mark.parametrize("stream", [0, 1], ids=["tables", "streams"])
def test_nanovlms_shifted_labels_carry_loss_before_the_selected_tokens(stream: int, tmp_path: Path) -> None:
    case = make_case(tmp_path, NANOVLM)
    done = case.run(stream_dataset=stream)
    assert done.returncode == 0, done.stderr
    ids = [t for item in case.said() for t in item["input_ids"]]
    labels = [label for item in case.said() for label in item["labels"]]
    assert sorted(label for label in labels if label != IGNORED) == sorted(
        t for kept in case.kept.values() for t in kept
    )
    assert all(label in (IGNORED, following) for label, following in zip(labels, ids[1:], strict=False))


def test_labels_behind_the_end_of_the_scores_carry_no_loss_where_these_may_be_cut(tmp_path: Path) -> None:
    """LLaVA's dataset hands out whole rows, and cuts them when pictures have become tokens; scores are cut already."""
    long = "The white cat is sitting on a table in front of a house. " * 8
    data = make_rows(tmp_path / "data", [["What is this?", "A red cup.", "Tell more.", long]], n=4)
    case = make_case(tmp_path, LLAVA, data, max_length=160)
    done = case.run("-W", "ignore", workers=0)
    assert done.returncode == 0, done.stderr
    assert {item["index"]: carrying(item["labels"]) for item in case.said()} == case.kept
    assert done.stderr.count("as if the scores were cut at --max-length 160") == 1


def test_a_row_that_the_trainer_cuts_keeps_the_mask_of_what_is_left(tmp_path: Path) -> None:
    case = make_case(tmp_path, TRAINERS[7])
    done = case.run(model_max_length=64, workers=0)
    assert done.returncode == 0, done.stderr
    found = {item["index"]: carrying(item["labels"]) for item in case.said()}
    assert found != case.kept
    assert all(kept[: len(found[index])] == found[index] for index, kept in case.kept.items())


# ---------------------------------------------------------------- what stops


def swap_two_words(case: Case, to: Path) -> Path:
    """The tokenizer with the ids of two words of the answers exchanged."""
    content = json.loads(case.tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    said = {token for kept in case.kept.values() for token in kept}
    first, second = sorted(word for word, token in vocabulary.items() if token in said and word[1:].isalpha())[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    to.write_text(json.dumps(content))
    return to


def test_another_tokenizer_stops_the_training_from_a_loader_process(llava: Case, tmp_path: Path) -> None:
    done = llava.run(tokenizer=swap_two_words(llava, tmp_path / "other.json"))
    assert done.returncode == 1
    assert "DataLoader worker process" in done.stderr
    assert re.search(
        r"MaskError: row \d+: supervised label \d+ is \d+ \('\w+'\), and \d+ \('\w+'\) was scored", done.stderr
    )
    assert "(model tiny, template llava-1.5, max_length 2048)" in done.stderr


def altered(llava: Case, folder: Path, change: Any) -> Path:
    """data.json with one thing changed."""
    rows = json.loads((llava.out / "data.json").read_text())
    change(rows)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "reads 8 rows and the selection keeps 9"),
        (lambda rows: rows.reverse(), "row 0 is not row 0 of the export"),
        (lambda rows: rows[2].update(image="pictures/0.png"), "row 2 is not row 2 of the export (row 2 of the dataset"),
        (lambda rows: rows[5]["conversations"][0].update(value="<image>\nAnd?"), "row 5 is not row 5"),
    ],
    ids=["a row less", "another order", "another picture", "another question"],
)
def test_another_data_file_stops_the_training_before_it_begins(
    llava: Case, change: Any, message: str, tmp_path: Path
) -> None:
    done = llava.run(data_path=altered(llava, tmp_path, change), workers=0)
    assert done.returncode == 1
    assert message in done.stderr
    assert str(llava.out / "data.json") in done.stderr


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Half of the rows end in an empty answer: the trainer's counting of rounds does not add up."""
    folder = tmp_path_factory.mktemp("unlabelled")
    data = make_rows(folder / "data", [["What is this?", "A red cup.", "Hm?", ""], ["Is it red?", "Yes"]], n=8)
    return make_case(folder, LLAVA, data)


def test_the_export_says_how_many_rows_will_arrive_without_labels(unlabelled: Case) -> None:
    assert any(note.startswith("4 rows have an empty question or last answer") for note in unlabelled.done.notes)


def test_a_row_that_arrives_without_labels_stops_the_training(unlabelled: Case) -> None:
    done = unlabelled.run()
    assert done.returncode == 1
    assert re.search(r"row [0246]: the trainer gives no label to any of its \d+ answer tokens", done.stderr)
    assert "'tokenization mismatch'" in done.stderr
    assert "--allow-mismatch" in done.stderr


def test_rows_without_labels_are_trained_past_if_that_is_asked_for(unlabelled: Case) -> None:
    done = unlabelled.run(arguments=["--allow-mismatch"], workers=0)
    assert done.returncode == 0, done.stderr
    found = {item["index"]: carrying(item["labels"]) for item in unlabelled.said()}
    assert [index for index in found if not found[index]] != []
    assert {index: labels for index, labels in found.items() if labels} == {
        index: kept for index, kept in unlabelled.kept.items() if found[index]
    }
    assert "2 such rows so far" in done.stderr


def test_check_counts_what_would_stop_the_training_and_trains_nothing(unlabelled: Case) -> None:
    (unlabelled.out.parent / "said.jsonl").unlink(missing_ok=True)
    done = unlabelled.run(arguments=["--check"])
    assert done.returncode == 1
    assert "visgain: 6 rows read, 4 of them would stop the training; no label: 4" in done.stdout
    assert not (unlabelled.out.parent / "said.jsonl").exists()
    allowed = unlabelled.run(arguments=["--check", "--allow-mismatch"])
    assert allowed.returncode == 0
    assert "0 of them would stop the training; no label: 4" in allowed.stdout


@pytest.mark.slow
def test_check_finds_drift_and_pictures_that_are_gone(llava: Case, tmp_path: Path) -> None:
    other = swap_two_words(llava, tmp_path / "other.json")
    done = llava.run(arguments=["--check"], tokenizer=other, image_folder=tmp_path)
    assert done.returncode == 1
    assert re.search(r"drift: \d", done.stdout)
    assert "unreadable: the trainer's row" in done.stdout
    assert "FileNotFoundError" in done.stdout


@pytest.mark.parametrize("gone", [0, 8], ids=["a row", "the last row"])
def test_llava_nexts_neighbour_is_not_trained_on_in_place_of_a_row_that_cannot_be_read(
    gone: int, tmp_path: Path
) -> None:
    case = make_case(tmp_path, NEXT)
    record = json.loads((case.out / "data.json").read_text())[gone]
    (case.config.data.parent / record["image"]).unlink()
    done = case.run()
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr
    if gone == 0:
        assert "row 0 cannot be read, and row 1 is not trained on in its place" in done.stdout


def test_a_dataset_that_is_not_known_is_not_trained_on(llava: Case, tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text(
        "from torch.utils.data import DataLoader, Dataset\n"
        "class Other(Dataset):\n    def __len__(self): return 1\n    def __getitem__(self, i): return i\n"
        "print(list(DataLoader(Other())))\n"
    )
    command = [sys.executable, str(llava.out / "visgain_launch.py"), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "data of __main__.Other is about to be loaded, and no dataset that is known here" in done.stderr


DERIVED = """
import torch
from {module} import AutoTokenizer, LazySupervisedDataset, read_arguments
from support import train

{classes}

if __name__ == "__main__":
    arguments = read_arguments()
    train(Derived(arguments.data_path, AutoTokenizer(arguments.tokenizer), arguments), arguments)
"""
OWN_LABELS = """
class Derived(LazySupervisedDataset):
    def __getitem__(self, i):
        ids = torch.arange(2, 40 + len(self.list_data_dict[i]["conversations"][1]["value"]))
        return {"input_ids": ids, "labels": ids.clone()}
"""
ASKS_ITS_PARENT = """
class Derived(LazySupervisedDataset):
    def __getitem__(self, i):
        item = super().__getitem__(i)
        return {**item, "flipped": i % 2 == 0}
"""
OF_ANOTHER_PARENT = """
class Flipping:
    def __getitem__(self, i):
        return {**super().__getitem__(i), "flipped": True}

class Middle(LazySupervisedDataset):
    pass

class Derived(Flipping, Middle):
    pass
"""


def derived(case: Case, folder: Path, classes: str) -> Case:
    """The same with a dataset class that is derived from the trainer's."""
    module = case.fork.script.removesuffix(".py").replace("/", ".")
    (folder / "derived.py").write_text(DERIVED.format(module=module, classes=classes))
    return replace(case, fork=replace(case.fork, script=str(folder / "derived.py")))


def test_a_derived_dataset_with_labels_of_its_own_is_not_trained_on(llava: Case, tmp_path: Path) -> None:
    done = derived(llava, tmp_path, OWN_LABELS).run(workers=0)
    assert done.returncode == 1
    assert re.search(r"MaskError: row \d+: supervised label 0 is 2 ", done.stderr)


@pytest.mark.parametrize("classes", [ASKS_ITS_PARENT, OF_ANOTHER_PARENT], ids=["its parent", "another parent"])
def test_a_derived_dataset_that_asks_its_parent_is_held_to_the_masks_once(
    llava: Case, classes: str, tmp_path: Path
) -> None:
    done = derived(llava, tmp_path, classes).run()
    assert done.returncode == 0, done.stderr
    assert {item["index"]: carrying(item["labels"]) for item in llava.said()} == llava.kept


@pytest.mark.slow
def test_a_derived_dataset_of_llava_nexts_is_held_to_the_masks(tmp_path: Path) -> None:
    case = make_case(tmp_path, NEXT_QWEN)
    done = derived(case, tmp_path, ASKS_ITS_PARENT).run(start_method="spawn")
    assert done.returncode == 0, done.stderr
    assert {item["index"]: carrying(item["labels"]) for item in case.said()} == case.kept


def test_a_class_derived_from_nanovlms_that_makes_labels_of_its_own_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, NANOVLM)
    (tmp_path / "derived.py").write_text(
        "from data.datasets import VQADataset\n"
        "class Same(VQADataset):\n    pass\n"
        "class Other(Same):\n    def _get_labels(self, input_ids, mask): return input_ids\n"
        "Other([], None, None, 4)\n"
    )
    done = replace(case, fork=replace(NANOVLM, script=str(tmp_path / "derived.py"))).run()
    assert done.returncode == 1
    assert "Other changes _get_labels of nanoVLM's VQADataset" in done.stderr


@pytest.mark.slow
def test_open_qwen2vls_dataset_of_one_file_a_row_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, TRAINERS[8])
    done = case.run(start_method="large-finetune")
    assert done.returncode == 1
    assert "use the stage finetune" in done.stderr


def test_check_says_that_it_cannot_read_nanovlms_stream(tmp_path: Path) -> None:
    done = make_case(tmp_path, NANOVLM).run(arguments=["--check"], stream_dataset=1)
    assert done.returncode == 1
    assert "--check asks for rows by their place; set stream_dataset to False in models/config.py" in done.stderr


def test_an_error_in_nanovlms_reading_thread_ends_the_training(tmp_path: Path) -> None:
    case = make_case(tmp_path, NANOVLM)
    done = case.run(tokenizer=swap_two_words(case, tmp_path / "other.json"))
    assert done.returncode == 1
    assert "was scored" in done.stderr


# ---------------------------------------------------------------- how it is started


@pytest.mark.slow
def test_loader_processes_that_are_spawned_are_held_to_the_masks_too(llava: Case) -> None:
    done = llava.run(start_method="spawn")
    assert done.returncode == 0, done.stderr
    assert {item["index"]: carrying(item["labels"]) for item in llava.said()} == llava.kept


def test_deepspeeds_rank_before_the_script_reaches_the_script(llava: Case) -> None:
    done = llava.run(arguments=["--local_rank=0"], workers=0)
    assert done.returncode == 0, done.stderr
    assert {item["index"]: carrying(item["labels"]) for item in llava.said()} == llava.kept


@pytest.mark.slow
def test_every_process_of_torchrun_is_held_to_the_masks(llava: Case) -> None:
    done = llava.run("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29771", workers=0)
    assert done.returncode == 0, done.stderr
    assert {item["index"]: carrying(item["labels"]) for item in llava.said()} == llava.kept


EMPTY_BATCH = """
import torch
from torch import nn
head = nn.Linear(4, 7)
rows = torch.randn(5, 4)
loss = nn.CrossEntropyLoss()
none = loss(head(rows), torch.full((5,), -100))
none.backward()
print(none.item(), head.weight.grad.abs().max().item())
some = torch.tensor([-100, 3, -100, 6, -100])
chosen = torch.log_softmax(head(rows), -1)[[1, 3], [3, 6]]
print(torch.equal(loss(head(rows), some), -chosen.mean()))
"""


def test_a_batch_without_any_active_token_is_harmless_and_others_are_as_before(llava: Case, tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(EMPTY_BATCH)
    command = [sys.executable, str(llava.out / "visgain_launch.py"), str(tmp_path / "loss.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.0", "0.0", "True"]
    assert "1 batches had no token that carries loss" in done.stderr


STEPS = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from llava.train.train import AutoTokenizer, LazySupervisedDataset, read_arguments

arguments = read_arguments()
dataset = LazySupervisedDataset(arguments.data_path, AutoTokenizer(arguments.tokenizer), arguments)
small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**small, vocab_size=700))

def collate(items):
    [item] = items
    return {"input_ids": item["input_ids"][None].clamp(min=0), "labels": item["labels"][None]}

said = TrainingArguments(arguments.output + "-trained", per_device_train_batch_size=1, num_train_epochs=1, use_cpu=True,
                         logging_steps=1, report_to="none", save_strategy="no", remove_unused_columns=False,
                         logging_nan_inf_filter=False)
trainer = Trainer(model=model, args=said, train_dataset=dataset, data_collator=collate)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("losses", len(losses), sum(loss == 0 for loss in losses), torch.isfinite(torch.tensor(losses)).all().item(),
      all(torch.isfinite(weight).all() for weight in model.parameters()))
"""


@pytest.mark.slow
def test_a_step_without_any_active_token_is_harmless_where_trainer_divides_by_its_labels(
    unlabelled: Case, tmp_path: Path
) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    case = replace(unlabelled, fork=replace(LLAVA, script=str(tmp_path / "steps.py")))
    done = case.run(arguments=["--allow-mismatch"])
    assert done.returncode == 0, done.stderr
    assert "losses 6 4 True True" in done.stdout
    assert "4 batches had no token that carries loss" in done.stderr


# ---------------------------------------------------------------- files


def test_data_json_has_the_kept_rows_as_the_dataset_has_them(llava: Case) -> None:
    rows = json.loads(llava.config.data.read_text())
    chosen = [row for number, row in enumerate(rows) if number % 4 != 3]
    assert json.loads((llava.out / "data.json").read_text()) == chosen


def test_the_note_is_a_command_for_the_trainer(llava: Case) -> None:
    [note] = llava.done.notes
    assert note.startswith("in place of `python llava/train/train_mem.py`: python ")
    assert f"--data_path {(llava.out / 'data.json').absolute()}" in note


def test_plain_llava_json_has_no_masks_and_says_so(llava: Case, tmp_path: Path) -> None:
    done = run_export(replace(llava.config, to="llava-json", out=tmp_path / "out"))
    there, here = (json.loads((out / "data.json").read_text()) for out in (llava.out, tmp_path / "out"))
    assert here == there
    assert not (tmp_path / "out/masks.safetensors").exists()
    left = llava.done.tokens - llava.done.active_tokens
    assert done.notes[0].startswith(f"{left} answer tokens that are not selected carry loss all the same")


def test_pictures_of_tables_become_files(tmp_path: Path) -> None:
    source = make_rows(tmp_path / "source")
    rows = [json.loads(json.dumps(row)) for row in json.loads(source.read_text())]
    for row in rows:
        row["image"] = {"bytes": (source.parent / row["image"]).read_bytes()} if "image" in row else None
    table = tmp_path / "table/data.parquet"
    table.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), table)
    case = make_case(tmp_path, LLAVA, table)
    done = case.run(workers=0)
    assert done.returncode == 0, done.stderr
    assert {item["index"]: carrying(item["labels"]) for item in case.said()} == case.kept


@pytest.mark.parametrize("fork", [LLAVA, NANOVLM], ids=lambda fork: fork.name)
def test_soft_weights_are_refused(fork: Fork, tmp_path: Path) -> None:
    config, _ = select(tmp_path, make_rows(tmp_path / "data"), fork, soft=True)
    with pytest.raises(ConfigError, match="select with --weights hard"):
        run_export(config)


@pytest.mark.parametrize("fork", [LLAVA, NANOVLM], ids=lambda fork: fork.name)
def test_scores_without_ends_of_turns_are_refused(fork: Fork, tmp_path: Path) -> None:
    config, _ = select(tmp_path, make_rows(tmp_path / "data"), fork)
    record = json.loads((config.selection / "selection.json").read_text())
    record["identity"]["end_of_turn"] = "ignore"
    (config.selection / "selection.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="supervises the end of each turn, which these scores leave out"):
        run_export(config)


def with_two_pictures(folder: Path, text: str) -> Path:
    data = make_rows(folder)
    rows = json.loads(data.read_text())
    rows[1]["image"] = ["pictures/1.png", "pictures/2.png"]
    rows[1]["conversations"][0]["value"] = text
    data.write_text(json.dumps(rows))
    return data


def test_rows_of_several_pictures_are_refused_where_the_trainer_opens_one(tmp_path: Path) -> None:
    data = with_two_pictures(tmp_path / "data", "<image><image>\nWhat changed?")
    config, _ = select(tmp_path, data, LLAVA)
    with pytest.raises(ConfigError, match="row 1 has 2 pictures, and this trainer opens one a row"):
        run_export(config)
    run_export(replace(config, to="llava-next"))
    assert json.loads((config.out / "data.json").read_text())[1]["image"] == ["pictures/1.png", "pictures/2.png"]


def test_marks_of_which_llava_next_would_drop_one_are_refused(tmp_path: Path) -> None:
    data = with_two_pictures(tmp_path / "data", "From <image> to <image>?")
    config, _ = select(tmp_path, data, LLAVA)
    with pytest.raises(ConfigError, match="makes one <image> of several"):
        run_export(replace(config, to="llava-next"))


def test_nanovlms_table_says_which_row_each_is_and_how_pictures_are_opened(tmp_path: Path) -> None:
    case = make_case(tmp_path, NANOVLM)
    table = pq.read_table(case.out / "data/train-00000-of-00001.parquet")
    assert table.column("visgain_row").to_pylist() == [row for row in range(12) if row % 4 != 3]
    first = table.slice(1, 1).to_pylist()[0]
    assert first["texts"][0] == {"user": "How many people?", "assistant": "2 people, 1 dog."}
    assert [pair["user"] for pair in first["texts"]] == ["How many people?", "Where?", "Sure?"]
    assert Path(first["images"][0]["path"]).is_file()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["images"] == {"feature": {"_type": "Image"}, "_type": "List"}
    assert set(features) == set(table.column_names)


def test_rows_with_more_pictures_than_nanovlm_takes_are_counted_and_left_out_by_it(tmp_path: Path) -> None:
    data = make_rows(tmp_path / "data")
    rows = json.loads(data.read_text())
    for row, n in ((1, 4), (2, 5)):
        rows[row]["image"] = [f"pictures/{k}.png" for k in (0, 1, 2, 3, 5)[:n]]
        rows[row]["conversations"][0]["value"] = "<image>" * n + "\nWhat changed?"
    data.write_text(json.dumps(rows))
    case = make_case(tmp_path, NANOVLM, data)
    assert case.done.notes[1].startswith("1 rows have more than 4 pictures, and nanoVLM leaves them out")
    done = case.run()
    assert done.returncode == 0, done.stderr
    found = [label for item in case.said() for label in carrying(item["labels"])]
    assert sorted(found) == sorted(token for index, kept in case.kept.items() for token in kept if index != 2)


# ---------------------------------------------------------------- guides


def test_a_guides_table_says_which_exporter_is_whose() -> None:
    text = (GUIDES / "llava.md").read_text()
    names = {name for name in EXPORTERS.names() if f"| `{name}` |" in text}
    assert names == {fork.name for fork in TRAINERS} | {"llava-json"}
    for fork in TRAINERS:
        assert f"| `{fork.name}` | `{EXPORTERS.get(fork.name).script}` |" in text


STARTED = [
    ("llava.md", 0, LLAVA),
    pytest.param("llava.md", 1, TRAINERS[2], marks=SLOW),
    pytest.param("llava.md", 2, TRAINERS[5], marks=SLOW),
    ("llava.md", 3, TRAINERS[7]),
    pytest.param("llava.md", 4, LLAVA, marks=SLOW),
    ("nanovlm.md", 0, NANOVLM),
]


@pytest.mark.parametrize(("guide", "number", "fork"), STARTED)
def test_the_guides_commands_train_on_exactly_the_selected_tokens(
    guide: str, number: int, fork: Fork, tmp_path: Path
) -> None:
    """As they stand there, but for where the data lies, and with python in place of what starts several processes."""
    data = make_rows(tmp_path)
    config, kept = select(tmp_path, data, fork)
    [export] = [command for command in commands(GUIDES / guide) if command[:2] == ["visgain", "export"]]
    assert export[export.index("--to") + 1] == ("nanovlm" if fork is NANOVLM else "llava")
    run_export(replace(config, out=tmp_path / "export"))
    theirs = [command for command in commands(GUIDES / guide) if command[0] != "visgain"]
    launcher = next(place for place, word in enumerate(theirs[number]) if word.endswith("visgain_launch.py"))
    command = [sys.executable, *(word.replace("/data", str(tmp_path), 1) for word in theirs[number][launcher:])]
    command = [word.replace('","/data"', f'","{tmp_path}"') for word in command]
    ours = [f"--tokenizer={save_tokenizer(fork, tmp_path / 'tokenizer.json')}", f"--output={tmp_path / 'said.jsonl'}"]
    folder = FORKS / fork.folder
    environment = {**os.environ, "PYTHONPATH": f"{FORKS}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *ours], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if "--check" in command:
        assert f"{len(kept)} rows read, 0 of them would stop the training" in done.stdout
    else:
        items = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
        found = sorted(token for item in items for token in carrying(item["labels"]))
        assert found == sorted(token for tokens in kept.values() for token in tokens)
