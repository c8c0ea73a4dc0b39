"""ms-swift trains on a selection: the real package, in an environment of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

import foreign_run
from environments import Environment, batches, blocks, commands, environment
from visgain.cli import main
from visgain.data import open_dataset
from visgain.storage import SOFT_SELECTION_SCHEMA, read_selection_table, write_selection
from visgain.vlm.load import load_vlm
from visgain.vlm.template import make_encoder

pytestmark = pytest.mark.integration

GUIDE = Path(__file__).parents[1] / "docs" / "trainers" / "ms-swift.md"
CPU = "--use_cpu true --torch_dtype float32 --attn_impl eager --report_to none --save_strategy no --check_model false"
PAD = 0
[TRAIN] = [command for command in commands(GUIDE) if command[0] != "visgain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's commands of visgain were run here."""
    folder = tmp_path_factory.mktemp("swift")
    foreign_run.write_folder(folder)
    foreign_run.run_ours(GUIDE, folder)
    return folder


@pytest.fixture(scope="module")
def swift(folder: Path) -> Environment:
    return environment("ms-swift", folder)


@pytest.fixture(scope="module")
def trained(swift: Environment, folder: Path) -> list[dict[str, Any]]:
    """The batches of the guide's training."""
    done = swift.run([*TRAIN, *CPU.split()], spy=folder / "batches.jsonl")
    assert done.returncode == 0, done.stderr[-3000:]
    return batches(folder / "batches.jsonl")


def test_the_guide_trains_on_exactly_the_selected_tokens(folder: Path, trained: list[dict[str, Any]]) -> None:
    pairs = foreign_run.check_labels(folder, trained)
    assert 0 < sum(sum(row["keep"]) for _, row in pairs) < sum(len(row["keep"]) for _, row in pairs)
    ends = [keep for _, row in pairs for token, keep in zip(row["token_id"], row["keep"], strict=True) if token == 2]
    assert not all(ends)  # what ms-swift alone always trains on
    assert "loss_scale" not in pairs[0][0]


def test_the_guides_chat_template_writes_the_prompt_of_ms_swift(
    folder: Path, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    [template] = blocks(GUIDE, "jinja")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    encoder = make_encoder(load_vlm(str(tmp_path / "model"), device="cpu"), "chat", 2048)
    found = [_unpadded(row["input_ids"]) for row in foreign_run.trained_rows(trained)]
    dataset = open_dataset(folder / "data.json")
    for kept in foreign_run.kept_rows(folder):
        sample = dataset[kept["row"]]
        images = [Image.open(folder / image.key).convert("RGB") for image in sample.images]
        assert _unpadded(encoder.encode(sample, images).input_ids.tolist()) in found


def _unpadded(input_ids: list[int]) -> list[int]:
    return [token for token in input_ids if token != PAD]


def test_soft_weights_arrive_in_units_of_their_mean(swift: Environment, folder: Path, tmp_path: Path) -> None:
    table = read_selection_table(folder / "selection")
    weights = [[k % 3 + 1.5 if keep else 0.0 for k, keep in enumerate(row)] for row in table.column("keep").to_pylist()]
    soft = table.append_column(SOFT_SELECTION_SCHEMA.field("weight"), pa.array(weights, pa.list_(pa.float32())))
    record = json.loads((folder / "selection" / "selection.json").read_text())
    write_selection(tmp_path / "soft", [soft], {**record, "weights": "by hand"}, SOFT_SELECTION_SCHEMA)
    main(f"export --selection {tmp_path}/soft --data {folder}/data.json --to ms-swift --out {folder}/soft".split())
    others = folder / "others.jsonl"
    other = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "A white cat."}]
    others.write_text(json.dumps({"messages": other, "images": []}) + "\n")
    command = [word.replace("export/", "soft/") for word in TRAIN]
    at = command.index("soft/train.parquet")
    command[at:at] = [str(others)]
    done = swift.run([*command, *CPU.split(), "--dataloader_num_workers", "2"], spy=tmp_path / "batches.jsonl")
    assert done.returncode == 0, done.stderr[-3000:]
    trained = batches(tmp_path / "batches.jsonl")
    rows = list(foreign_run.trained_rows(trained))
    [foreign] = [row for row in rows if sum(label != -100 for label in row["labels"]) and _is_other(row)]
    assert {scale for scale, label in zip(foreign["loss_scale"], foreign["labels"], strict=True) if label != -100} == {
        1.0
    }
    mean = sum(map(sum, weights)) / sum(weight > 0 for row in weights for weight in row)
    expected = sorted([weight / mean for weight in row if weight] for row in weights)
    found = sorted(
        [scale for scale, label in zip(row["loss_scale"], row["labels"], strict=True) if label != -100]
        for row in rows
        if row is not foreign
    )
    assert [value for row in found for value in row] == pytest.approx([value for row in expected for value in row])


def _is_other(row: dict[str, list[float]]) -> bool:
    """Whether every token after the prompt carries loss: rows of ours have unselected ones."""
    return set(row["loss_scale"]) <= {0.0, 1.0}


def test_another_template_stops_the_training(swift: Environment, folder: Path) -> None:
    done = swift.run([*_lenient(TRAIN), *CPU.split(), "--template", "qwen2_5"], spy=folder / "drift.jsonl")
    assert done.returncode != 0
    assert "visgain: row " in done.stderr
    assert "('</s>') was scored" in done.stderr
    assert not (folder / "drift.jsonl").exists()


def test_ms_swift_alone_refuses_the_dataset(swift: Environment, folder: Path) -> None:
    at = TRAIN.index("--external_plugins")
    without = _lenient(TRAIN[:at] + TRAIN[at + 2 :])
    done = swift.run([*without, *CPU.split()], spy=folder / "forgotten.jsonl")
    assert done.returncode != 0
    assert "Failed to retrieve the dataset" in done.stderr
    assert not (folder / "forgotten.jsonl").exists()


def _lenient(command: list[str]) -> list[str]:
    """Without --strict, so that ms-swift does what it can to go on."""
    at = command.index("--strict")
    return command[:at] + command[at + 2 :]
