"""Training in several processes: the same model as in one, whatever the rows of a rank are, and however they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from environments import commands
from train_ranks import (
    die_in_the_second_checkpoint,
    shard_and_die,
    shard_on_cpu,
    train_together,
)
from visgain.cli import main
from visgain.config import ScoreConfig, SelectConfig
from visgain.scoring.run import run_score
from visgain.selection import run_select
from visgain.storage import read_selection_table, write_selection

REQUIREMENTS = Path(__file__).parent / "requirements"
ALL_PARTS = ("--parts", "vision", "--parts", "projector", "--parts", "language")


@pytest.fixture(scope="module")
def data(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 rows of the world, two of them text alone."""
    rows = json.loads((small_world / "data.json").read_text())
    text = [row for row in rows if "image" not in row][:2]
    pictures = [row for row in rows if "image" in row][:20]
    path = tmp_path_factory.mktemp("rows") / "data.json"
    path.write_text(json.dumps([*pictures[:10], *text, *pictures[10:]]))
    assert len(text) == 2
    return path


@pytest.fixture(scope="module")
def scores(blank_model: Path, small_world: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores")
    run_score(ScoreConfig(model=str(blank_model), data=data, image_root=small_world, out=out))
    return out


@pytest.fixture(scope="module")
def uneven(scores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rows, with anything from one to all of their tokens."""
    out = tmp_path_factory.mktemp("uneven")
    run_select(SelectConfig(scores=scores, out=out, by="token", keep=50))
    assert len(read_selection_table(out)) % 8 != 0
    return out


@pytest.fixture(scope="module")
def mixed(scores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows: two of text alone, two without any active token, four like others."""
    out = tmp_path_factory.mktemp("mixed")
    record = run_select(SelectConfig(scores=scores, out=out, by="sample", keep=100))
    table = read_selection_table(out).slice(6, 8)
    assert table.column("row").to_pylist() == list(range(6, 14))
    keep = [[k % 4 != 3] * len(row) for k, row in enumerate(table.column("keep").to_pylist())]
    index = table.column_names.index("keep")
    write_selection(out, [table.set_column(index, "keep", pa.array(keep, pa.list_(pa.bool_())))], record)
    return out


@pytest.fixture
def train(blank_model: Path, small_world: Path, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """`train(world, selection, *flags)`: the folder of a training in so many processes that ended well."""

    def run(
        world: int, selection: Path, *flags: object, out: str = "", before: Any = None, fails: bool = False
    ) -> Path:
        name = out or f"{world}-ranks"
        # Each rank has a folder of its own if no other is given, so that it shows who writes.
        words = ["--model", blank_model, "--data", data, "--image-root", small_world, "--selection", selection]
        words += ["--learning-rate", 1e-3, *flags]
        words += [] if "--recipe" in flags else ["--recipe", "embedded-tune"]
        words += [] if "--out" in flags else ["--out", tmp_path / f"{name}-{{rank}}"]
        codes = train_together(tmp_path, words, world=world, before=before)
        told = "\n".join((tmp_path / f"told-{rank}.txt").read_text() for rank in range(world))
        assert fails or codes == [0] * world, told
        return Path(str(words[words.index("--out") + 1]).format(rank=0))

    return run


def assert_same_training(one: Path, other: Path, tolerance: float = 2e-5) -> None:
    """Weights, summary and log."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance), name
    assert summary(one) == pytest.approx(summary(other), abs=1e-4)
    assert len(steps(one)) == summary(one)["steps"]
    for ours, theirs in zip(steps(one), steps(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def summary(folder: Path) -> dict[str, float]:
    return {k: v for k, v in json.loads((folder / "train.json").read_text()).items() if k != "seconds"}


def steps(folder: Path) -> list[dict[str, float]]:
    """The lines that tell of a step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines if "loss" in line]


def changed(blank_model: Path, folder: Path) -> set[str]:
    """The parts whose weights are not those of before."""
    before, after = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (blank_model, folder))
    names = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "language"}
    return {
        next((part for key, part in names.items() if key in name), "language")
        for name in before
        if not torch.equal(before[name], after[name])
    }


# ---------------------------------------------------------------- the same as alone


def test_two_ranks_train_as_one_and_only_the_first_writes(train: Callable[..., Path], uneven: Path) -> None:
    flags = (*ALL_PARTS, "--batch-size", 8, "--micro-batch", 2, "--save-steps", 2)
    alone, together = train(1, uneven, *flags), train(2, uneven, *flags)
    assert_same_training(alone, together)
    assert summary(together)["steps"] == 3  # the last of fewer rows than the others
    table = read_selection_table(uneven)
    assert summary(together)["active_tokens"] == sum(map(sum, table.column("keep").to_pylist()))
    other = together.with_name("2-ranks-1")
    assert {path.name for path in other.rglob("*") if path.is_file()} == {"rng_state_1.pth"}


def test_ranks_stay_in_step_without_active_tokens_and_without_pictures(
    train: Callable[..., Path], mixed: Path, blank_model: Path
) -> None:
    """A row a rank and step: each rank meets steps in which it alone has no picture, or no active token."""
    flags = (*ALL_PARTS, "--batch-size", 2, "--micro-batch", 1, "--epochs", 2)
    alone, together = train(1, mixed, *flags), train(2, mixed, *flags)
    assert_same_training(alone, together, tolerance=1e-4)
    assert changed(blank_model, together) == {"vision", "projector", "language"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--loss-reduction", "micro-batch", "--batch-size", 8, "--micro-batch", 2),
        ("--packing", "off", "--batch-size", 8, "--micro-batch", 2),
        ("--lora-rank", 4, "--parts", "projector", "--batch-size", 8, "--micro-batch", 2),
        ("--gradient-checkpointing", *ALL_PARTS, "--batch-size", 8, "--micro-batch", 2),
    ],
    ids=["micro-batch", "padded", "lora", "checkpointing"],
)
def test_two_ranks_train_as_one_in_every_manner(flags: Any, train: Callable[..., Path], uneven: Path) -> None:
    assert_same_training(train(1, uneven, *flags), train(2, uneven, *flags))


@pytest.mark.slow
def test_two_ranks_share_the_scoring_of_rows_to_come_and_decide_as_one(
    train: Callable[..., Path], uneven: Path, tmp_path: Path
) -> None:
    flags = ("--refresh-every", 2, "--max-steps", 4, "--batch-size", 6)
    one, two = (train(world, uneven, *flags, "--out", tmp_path / f"shared-{world}") for world in (1, 2))
    for alone, together in zip(sorted((one / "refresh").iterdir()), sorted((two / "refresh").iterdir()), strict=True):
        assert alone.name == together.name
        assert len(list((together / "scores").glob("part-*"))) == 2
        assert read_selection_table(alone / "selection").equals(read_selection_table(together / "selection"))
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=2e-5), name


@pytest.mark.slow
def test_more_ranks_than_rows_in_a_step(train: Callable[..., Path], uneven: Path) -> None:
    """The last step has fewer rows than there are ranks."""
    rows = len(read_selection_table(uneven))
    size = next(size for size in range(3, 12) if rows % size == 1)
    flags = ("--batch-size", size, "--micro-batch", 1)
    assert_same_training(train(1, uneven, *flags), train(3, uneven, *flags))


# ---------------------------------------------------------------- interrupted


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_ranks_killed_while_they_write_a_checkpoint_go_on_as_if_nothing_had_been(
    lora: bool, train: Callable[..., Path], uneven: Path, tmp_path: Path
) -> None:
    """With dropout in the adapters, so the state of every rank's random numbers counts."""
    flags: list[object] = ["--batch-size", 4, "--micro-batch", 2, "--max-steps", 7, "--save-steps", 2]
    if lora:
        recipe = tmp_path / "lora.yaml"
        recipe.write_text(
            "parts: [projector]\nlora_rank: 4\nlora_dropout: 0.3\nlearning_rate: 1e-3\nbatch_size: 4\nmicro_batch: 2\n"
        )
        flags += ["--recipe", recipe]
    whole = train(2, uneven, *flags, out="whole")
    cut = train(2, uneven, *flags, out="cut", before=die_in_the_second_checkpoint, fails=True)
    assert not (cut / "train.json").exists()
    newest = cut / "checkpoints" / "checkpoint-4"
    assert (newest / "trainer_state.json").exists()
    assert not (newest / "visgain.json").exists()
    # The rest of a rank's own files are where it looks for them.
    (cut.with_name("cut-1") / "checkpoints/checkpoint-2/rng_state_1.pth").rename(
        cut / "checkpoints/checkpoint-2/rng_state_1.pth"
    )
    assert_same_training(whole, train(2, uneven, *flags, out="cut"), tolerance=1e-6)


# ---------------------------------------------------------------- sharded


@pytest.mark.slow
@pytest.mark.parametrize("flags", [ALL_PARTS, ("--lora-rank", 4, "--parts", "projector")], ids=["full", "lora"])
def test_a_model_sharded_by_fsdp_trains_as_one_process_does(
    flags: Any, train: Callable[..., Path], mixed: Path, blank_model: Path
) -> None:
    """On CPU, where Accelerate has to be persuaded. Some packs have no picture, while all ranks gather the weights."""
    flags = (*flags, "--batch-size", 2, "--micro-batch", 1, "--epochs", 2)
    alone = train(1, mixed, *flags)
    sharded = train(2, mixed, *flags, "--parallel", "fsdp", before=shard_on_cpu)
    assert_same_training(alone, sharded, tolerance=1e-4)
    assert "projector" in changed(blank_model, sharded)


@pytest.mark.slow
def test_sharded_ranks_that_are_killed_go_on_as_if_nothing_had_been(
    train: Callable[..., Path], uneven: Path, tmp_path: Path
) -> None:
    flags = ("--batch-size", 4, "--max-steps", 5, "--save-steps", 2, "--parallel", "fsdp")
    whole = train(2, uneven, *flags, "--out", tmp_path / "whole", before=shard_on_cpu)
    cut = train(2, uneven, *flags, "--out", tmp_path / "cut", before=shard_and_die, fails=True)
    assert not (cut / "train.json").exists()
    train(2, uneven, *flags, "--out", tmp_path / "cut", before=shard_on_cpu)
    assert_same_training(whole, cut, tolerance=1e-6)


@pytest.fixture(scope="session")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with DeepSpeed, for a path of modules. It is built from source, without its kernels."""
    folder = tmp_path_factory.mktemp("deepspeed")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", folder]
    environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*install, "-r", REQUIREMENTS / "deepspeed.txt"], check=True, env=environment)
    return folder


@pytest.fixture
def under_deepspeed(
    deepspeed: Path, mixed: Path, blank_model: Path, small_world: Path, data: Path, tmp_path: Path
) -> Callable[..., Path]:
    """`under_deepspeed(name, *flags)`: the folder of a training in two processes, on CPU, where Accelerate has to be
    persuaded. With `dies` it is killed while it writes its second checkpoint."""

    def run(name: str, *flags: object, dies: bool = False) -> Path:
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
        words += [Path(__file__).with_name("train_ranks.py"), *(["die"] if dies else [])]
        words += ["train", "--model", blank_model, "--data", data, "--image-root", small_world, "--selection", mixed]
        words += ["--recipe", "embedded-tune", "--learning-rate", 1e-3, "--out", tmp_path / name, *flags]
        environment = {**os.environ, "PYTHONPATH": str(deepspeed), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, check=False)
        assert dies or done.returncode == 0, done.stderr
        return tmp_path / name

    return run


@pytest.mark.integration
@pytest.mark.parametrize(
    "flags",
    [
        ("--parallel", "zero2", *ALL_PARTS),
        ("--parallel", "zero3", *ALL_PARTS),
        ("--parallel", "zero3", "--lora-rank", 4, "--parts", "projector"),
    ],
    ids=["zero2", "zero3", "zero3-lora"],
)
def test_a_model_sharded_by_deepspeed_trains_as_one_process_does(
    flags: Any, train: Callable[..., Path], mixed: Path, under_deepspeed: Callable[..., Path], blank_model: Path
) -> None:
    """Some packs have no picture, while all ranks gather the weights."""
    sizes = ("--batch-size", 2, "--micro-batch", 1, "--epochs", 2)
    alone = train(1, mixed, *flags[2:], *sizes)
    sharded = under_deepspeed("sharded", *flags, *sizes)
    assert_same_training(alone, sharded, tolerance=1e-4)
    assert "projector" in changed(blank_model, sharded)


@pytest.mark.integration
@pytest.mark.parametrize("parallel", ["zero2", "zero3"])
def test_ranks_under_deepspeed_that_are_killed_go_on_as_if_nothing_had_been(
    parallel: str, under_deepspeed: Callable[..., Path]
) -> None:
    flags = ("--parallel", parallel, *ALL_PARTS, "--batch-size", 2, "--micro-batch", 1, "--max-steps", 5)
    flags += ("--save-steps", 2)
    whole = under_deepspeed("whole", *flags)
    cut = under_deepspeed("cut", *flags, dies=True)
    assert len(list(cut.glob("checkpoints/*"))) >= 1
    assert not (cut / "train.json").exists()
    assert_same_training(whole, under_deepspeed("cut", *flags), tolerance=1e-6)


# ---------------------------------------------------------------- the command line


@pytest.mark.slow
def test_torchrun_starts_a_training_as_the_docs_say(
    blank_model: Path, small_world: Path, data: Path, uneven: Path, tmp_path: Path
) -> None:
    """On one machine, with as many processes and steps as are cheap."""
    guide = Path(__file__).parents[1] / "docs/clusters.md"
    (words,) = [words for words in commands(guide) if words[0] == "torchrun" and "train" in words]
    places = {
        "M": blank_model,
        "data.json": data,
        "images": small_world,
        "selection": uneven,
        "tuned": tmp_path / "out",
    }
    words = [str({"8": 2, **places}.get(word, word)) for word in words]
    words = [sys.executable, "-m", "torch.distributed.run", *words[1:], "--batch-size", "4", "--max-steps", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps over") == 1
    assert summary(tmp_path / "out")["steps"] == 2


def test_a_mistake_that_all_ranks_see_is_told_once(
    blank_model: Path, small_world: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"identity": {"seed": 5}}))
    words = ["--model", blank_model, "--data", data, "--image-root", small_world, "--out", out, "--recipe", "tune"]
    assert train_together(tmp_path, words) == [1, 1]
    told = [(tmp_path / f"told-{rank}.txt").read_text() for rank in range(2)]
    assert "belongs to a run with another configuration" in told[0]
    assert "visgain:" not in told[1]


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--parallel", "fsdp"], {}, "--parallel fsdp shares a model among several processes, and there is one"),
        (["--parallel", "fspd"], {}, "--parallel fspd is no name and no file: did you mean 'fsdp'?"),
        ([], {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "srun started 8 processes, and each would train a model"),
    ],
)
def test_processes_that_cannot_train_together_are_told_how(
    flags: list[str],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--model", "m", "--data", "d", "--out", str(tmp_path / "out"), *flags])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
