"""Scores that follow the model: what a round scores is what `score` would with the weights of that step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from visgain.config import ScoreConfig, SelectConfig, TrainConfig
from visgain.errors import ConfigError, DataError, StorageError
from visgain.scoring.engine import Engine
from visgain.scoring.run import run_score
from visgain.selection import run_select
from visgain.storage import read_scores, read_selection_table, write_part, write_selection
from visgain.training import refresh
from visgain.training.refresh import RULES, Decided, Refresh, Rounds
from visgain.training.run import run_train
from visgain.training.trainer import SelectiveTrainer


@pytest.fixture(scope="module")
def selection(blank_model: Path, small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    run_score(ScoreConfig(model=str(blank_model), data=small_world / "data.json", out=folder / "scores"))
    run_select(SelectConfig(scores=folder / "scores", out=folder / "selection", keep=50))
    return folder / "selection"


def train_config(blank_model: Path, small_world: Path, selection: Path, out: Path, **options) -> TrainConfig:
    base = {"batch_size": 4, "recipe": "embedded-tune", "refresh_every": 2, "max_steps": 6, "learning_rate": 3e-3}
    data = small_world / "data.json"
    return TrainConfig(model=str(blank_model), data=data, out=out, selection=selection, **{**base, **options})


def rounds_of(out: Path) -> list[Path]:
    return sorted((out / "refresh").iterdir())


# ---------------------------------------------------------------- which rows when


def rounds(choose, *, every: int = 2, n_kept: int = 10, **options) -> Rounds:
    return Rounds(20, 3, every=every, n_kept=n_kept, choose=choose, estimate=lambda row: 1.0, seed=0, **options)


def test_an_epoch_asks_about_every_row_once_in_rounds_and_takes_what_is_chosen_in_its_order() -> None:
    asked: list[tuple[int, list[int]]] = []

    def half(step: int, rows: list[int]) -> list[Decided]:
        asked.append((step, list(rows)))
        return [Decided(row, {}) for row in rows if row % 2]

    steps = rounds(half)
    taken = [[row.place for row in step] for step in steps]
    order = [row for _, some in asked for row in some]
    assert sorted(order) == list(range(20))
    assert [len(some) for _, some in asked] == [12, 8]  # 2 steps of 3 rows are half of 12
    assert [row for step in taken for row in step] == [row for row in order if row % 2]
    assert [len(step) for step in taken] == [3, 3, 3, 1]
    assert len(steps) == 4


def test_a_round_is_asked_for_when_its_first_row_is_needed() -> None:
    asked: list[int] = []

    def most(step: int, rows: list[int]) -> list[Decided]:
        asked.append(step)
        return [Decided(row, {}) for row in rows[:7]]

    list(rounds(most))
    assert asked == [0, 2]  # the 7 rows of the first round last for two steps and a part of the third


def test_an_epoch_takes_as_many_rows_as_the_selection_has() -> None:
    steps = rounds(lambda step, rows: [Decided(row, {}) for row in rows], n_kept=10)
    assert sum(len(step) for step in steps) == 10


def test_the_second_epoch_counts_its_steps_on_and_has_another_order() -> None:
    asked: list[tuple[int, list[int]]] = []

    def all_of_them(step: int, rows: list[int]) -> list[Decided]:
        asked.append((step, list(rows)))
        return [Decided(row, {}) for row in rows]

    steps = rounds(all_of_them, n_kept=20)
    for epoch in range(2):
        steps.sampler.set_epoch(epoch)
        list(steps)
    assert [step for step, _ in asked] == [0, 2, 4, 6, 7, 9, 11, 13]
    assert asked[0][1] != asked[4][1]


# ---------------------------------------------------------------- the whole


def test_every_round_has_the_scores_of_the_model_as_it_is_then(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots: dict[int, Path] = {}
    decide = Refresh.__call__

    def watched(self: Refresh, step: int, *args) -> list[Decided]:
        snapshots[step] = tmp_path / f"model-{step}"
        self.vlm.model.save_pretrained(snapshots[step])
        self.vlm.processor.save_pretrained(snapshots[step])
        return decide(self, step, *args)

    monkeypatch.setattr(Refresh, "__call__", watched)
    done = run_train(train_config(blank_model, small_world, selection, tmp_path / "out"))
    assert len(snapshots) >= 2
    later = max(snapshots)
    assert_differ(snapshots[0], snapshots[later])
    run_score(ScoreConfig(model=str(snapshots[later]), data=small_world / "data.json", out=tmp_path / "scores"))
    expected = {row["row"]: row for row in read_scores(tmp_path / "scores").to_pylist()}
    rows = read_scores(tmp_path / f"out/refresh/step-{later:08d}/scores").to_pylist()
    for row in rows:
        assert row["token_id"] == expected[row["row"]]["token_id"]
        np.testing.assert_allclose(row["nll_seen"], expected[row["row"]]["nll_seen"], atol=1e-5)
        np.testing.assert_allclose(row["nll_blind"], expected[row["row"]]["nll_blind"], atol=1e-5)
    assert done.refreshed_rows == sum(len(read_scores(folder / "scores")) for folder in rounds_of(tmp_path / "out"))
    assert 0 < done.refresh_seconds < done.seconds


def assert_differ(one: Path, other: Path) -> None:
    first, second = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (one, other))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_every_round_selects_by_the_rule_of_the_selection_and_its_tokens_alone_carry_loss(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run_train(train_config(blank_model, small_world, selection, out, max_steps=None, epochs=1))
    said = json.loads((selection / "selection.json").read_text())
    active = 0
    for folder in rounds_of(out):
        record = json.loads((folder / "selection/selection.json").read_text())
        for key in ("rule", "keep_percent", "weights", "end_of_turn"):
            assert record[key] == said[key]
        gains = sorted(g for g in read_scores(folder / "scores").column("gain").to_pylist() if g is not None)
        assert record["tau"] == gains[len(gains) // 2]
        active += sum(map(sum, read_selection_table(folder / "selection").column("keep").to_pylist()))
    # Each round rounds its share up: the few rows beyond those of the selection are left out at the end.
    assert done.rows == len(read_selection_table(selection))
    assert 0.7 * active < done.active_tokens <= active


def test_an_interrupted_and_resumed_training_decides_nothing_twice_and_ends_alike(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_config(blank_model, small_world, selection, tmp_path / "whole", save_steps=2)
    run_train(whole)
    cut = train_config(blank_model, small_world, selection, tmp_path / "cut", save_steps=2)
    step = SelectiveTrainer.training_step

    def dies(self: SelectiveTrainer, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SelectiveTrainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run_train(cut)
    before = {folder.name: (folder / "round.json").read_bytes() for folder in rounds_of(cut.out)}
    run_train(cut)
    after = {folder.name: (folder / "round.json").read_bytes() for folder in rounds_of(cut.out)}
    assert before.items() <= after.items()
    one, other = (AutoModelForImageTextToText.from_pretrained(c.out).state_dict() for c in (whole, cut))
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_round_that_three_processes_left_unfinished_is_scored_anew_by_one(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path
) -> None:
    whole = train_config(blank_model, small_world, selection, tmp_path / "whole")
    run_train(whole)
    first = rounds_of(whole.out)[0]
    cut = train_config(blank_model, small_world, selection, tmp_path / "cut")
    # The second of three parts, with scores that nobody would give, and no round.json.
    left = cut.out / first.relative_to(whole.out) / "scores"
    left.mkdir(parents=True)
    wrong = read_scores(first / "scores").slice(0, 3)
    gain = wrong.schema.get_field_index("gain")
    wrong = wrong.set_column(gain, wrong.schema.field(gain), pa.array([1e6] * 3))
    write_part(left, 1, 3, wrong)
    (left / "run.json").write_text((first / "scores/run.json").read_text())
    run_train(cut)
    assert read_scores(left).equals(read_scores(first / "scores"))
    one, other = (AutoModelForImageTextToText.from_pretrained(c.out).state_dict() for c in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_scored_with_what_they_have_learned(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path
) -> None:
    config = train_config(blank_model, small_world, selection, tmp_path / "out", lora_rank=4, learning_rate=0.1)
    run_train(config)
    first, *_, last = rounds_of(config.out)
    static = {row["row"]: row["gain"] for row in read_scores(selection.parent / "scores").to_pylist()}

    def moved(folder: Path) -> float:
        gains = [(row["gain"], static[row["row"]]) for row in read_scores(folder / "scores").to_pylist()]
        return max(abs(new - old) for new, old in gains if new is not None)

    assert moved(first) < 1e-5 < 1e-3 < moved(last)


def test_rows_that_were_not_scored_are_never_trained_on(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    data = small_world / "data.json"
    run_score(ScoreConfig(model=str(blank_model), data=data, out=tmp_path / "scores", limit=20))
    run_select(SelectConfig(scores=tmp_path / "scores", out=tmp_path / "selection", keep=50))
    config = train_config(blank_model, small_world, tmp_path / "selection", tmp_path / "out", max_steps=None, epochs=1)
    run_train(config)
    rows = [row for folder in rounds_of(config.out) for row in read_scores(folder / "scores").column("row").to_pylist()]
    assert sorted(rows) == list(range(20))


def test_rounds_without_a_picture_keep_their_text_whole_and_the_training_goes_on(
    blank_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "A word."}]
    picture = {"image": "cup.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, turns[1]]}
    Image.new("RGB", (72, 72), "red").save(tmp_path / "cup.png")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([picture, *[{"conversations": turns}] * 11]))
    run_score(ScoreConfig(model=str(blank_model), data=data, out=tmp_path / "scores"))
    run_select(SelectConfig(scores=tmp_path / "scores", out=tmp_path / "selection", weights="clamp"))
    ways: list[str] = []
    monkeypatch.setattr(refresh, "Engine", lambda **options: ways.append(options["way"]) or Engine(**options))
    config = TrainConfig(
        model=str(blank_model),
        data=data,
        out=tmp_path / "out",
        selection=tmp_path / "selection",
        recipe="embedded-tune",
        batch_size=2,
        refresh_every=1,
        seed=1,  # its first round has no picture
    )
    assert run_train(config).steps == 6
    has_picture = []
    for folder in rounds_of(config.out):
        scores, kept = read_scores(folder / "scores"), read_selection_table(folder / "selection")
        assert kept.column("row").to_pylist() == scores.column("row").to_pylist()
        assert all(all(keep) for row, keep in zip(*map(kept.column, ("row", "keep")), strict=True) if row.as_py())
        has_picture.append(0 in scores.column("row").to_pylist())
    assert has_picture[0] is False
    # What a round of text could not try is tried by the first with a picture.
    assert ways[has_picture.index(True)] != "single"


# ---------------------------------------------------------------- what cannot be


def test_without_a_selection_there_is_no_rule_to_follow(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    config = TrainConfig(model=str(blank_model), data=small_world / "data.json", out=tmp_path / "out", refresh_every=2)
    with pytest.raises(ConfigError, match="needs --selection"):
        run_train(config)


def test_a_random_selection_has_nothing_to_score_for(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path
) -> None:
    run_select(SelectConfig(scores=selection.parent / "scores", out=tmp_path / "selection", by="random"))
    with pytest.raises(ConfigError, match="by random"):
        run_train(train_config(blank_model, small_world, tmp_path / "selection", tmp_path / "out"))


def test_a_model_that_no_rank_has_whole_cannot_score(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path
) -> None:
    record = json.loads((selection / "selection.json").read_text())
    assert record["rule"] in RULES
    config = train_config(blank_model, small_world, selection, tmp_path / "out", parallel="fsdp")
    with pytest.raises(ConfigError, match="--parallel"):
        run_train(config)


def test_a_selection_that_does_not_say_what_it_was_chosen_from_is_made_again(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(selection, tmp_path / "selection"))
    (old / "candidates.parquet").unlink()
    with pytest.raises(ConfigError, match=r"it has no candidates\.parquet; run `visgain select` again"):
        run_train(train_config(blank_model, small_world, old, tmp_path / "out"))


def test_a_training_does_not_go_on_with_other_rows_to_choose_from(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(selection, tmp_path / "selection"))
    config = train_config(blank_model, small_world, other, tmp_path / "out", max_steps=1)
    run_train(config)
    record = json.loads((selection / "selection.json").read_text())
    kept = read_selection_table(selection)
    write_selection(other, [kept], record, candidates=[kept.column("row").to_numpy()])
    with pytest.raises(StorageError, match="candidates"):
        run_train(config)


def test_a_model_that_can_no_longer_score_is_told(
    blank_model: Path, small_world: Path, selection: Path, tmp_path: Path
) -> None:
    """Before its next step could show that the training diverged."""
    rates = {"learning_rate": 1e30, "refresh_every": 1}
    config = train_config(blank_model, small_world, selection, tmp_path / "out", **rates)
    with pytest.raises(DataError, match=r"among the rows to come: .*row \d+: the model gave a non-finite"):
        run_train(config)
