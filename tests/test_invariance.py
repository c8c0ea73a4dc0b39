"""What must change nothing in a training: how a step is cut, packed, ordered, padded or written down."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from naive import SIZES, About
from naive import encoded as zoo_encoded
from visgain.config import TrainConfig
from visgain.errors import ConfigError
from visgain.training.collate import Outline, Rows, TrainingRow
from visgain.training.packing import PACKED, PADDED
from visgain.training.prepare import prepare_model
from visgain.training.recipe import Recipe
from visgain.training.run import build_trainer
from visgain.training.steps import Steps
from visgain.training.trainer import SelectiveTrainer, Tally, trains_more_than_language
from visgain.vlm.load import VLM
from zoo import ZOO

STEP = 8
RECIPE = Recipe(
    parts=("vision", "projector", "language"), learning_rate=1e-3, batch_size=STEP, micro_batch=4, max_steps=2
)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return ZOO["llava"].build()


class Made(Rows):
    """Rows that are encoded already."""

    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        self.made = rows

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> TrainingRow:
        return self.made[index]

    def outline(self, index: int) -> Outline:
        encoded = self.made[index].encoded
        return Outline(int(encoded.n_image_tokens > 0), len(encoded.input_ids) - encoded.n_image_tokens)


@pytest.fixture(scope="module")
def rows() -> Made:
    """Every fourth without a picture, of different lengths; masks that leave some rows nothing."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(2 * STEP):
        n_pictures = int(number % 4 > 0)
        talk = ("<image>\n" * n_pictures + "What is this?", "A red cup on a table. " * int(rng.integers(1, 9)))
        [encoded] = zoo_encoded("llava", About(seeds=(number,) * n_pictures, size=SIZES[0], talks=(talk,)))
        weight = rng.random(len(encoded.turn)) < (0.2, 0.6, 1, 0)[number // 2 % 4]
        made.append(TrainingRow(encoded=encoded, weight=weight.astype(np.float32)))
    return Made(made)


def weighed(rows: Made, by: Callable[[int], Any]) -> Made:
    """`rows` with their weights multiplied by what `by` gives for their number of tokens."""
    made = [replace(row, weight=(row.weight * by(len(row.weight))).astype(np.float32)) for row in rows.made]
    return Made(made)


def make_trainer(vlm: VLM, rows: Rows, tmp_path: Path, **options: Any) -> SelectiveTrainer:
    recipe = replace(RECIPE, **options)
    config = TrainConfig(model="m", data=Path("d"), out=tmp_path, device="cpu")
    mine = replace(vlm, model=copy.deepcopy(vlm.model))
    trainer = build_trainer(prepare_model(mine, recipe), mine, rows, recipe, config)
    trainer.args.logging_steps = 1
    trainer.args.save_strategy = "no"
    return trainer


def trained(vlm: VLM, rows: Rows, tmp_path: Path, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of the steps, and the weights after them."""
    trainer = make_trainer(vlm, rows, tmp_path, **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model.state_dict()


def assert_same(found: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for name, value in expected[1].items():
        assert torch.allclose(found[1][name], value, rtol=0, atol=2e-5), name


def differ(one: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]) -> bool:
    return abs(one[0][0] - other[0][0]) > 1e-3


# ---------------------------------------------------------------- how a step is cut

CUTS = (
    {"packing": "off", "micro_batch": 8},
    {"packing": "off", "micro_batch": 1},
    {"packing": "on", "pack_tokens": 1},
    {"packing": "on", "pack_tokens": 200},
    {"packing": "on", "pack_tokens": 1 << 20},
)


def test_padded_batches_and_packs_of_any_size_train_the_same_model(vlm: VLM, rows: Rows, tmp_path: Path) -> None:
    first, *others = (trained(vlm, rows, tmp_path, **how) for how in CUTS)
    assert len(first[0]) == 2
    for other in others:
        assert_same(other, first)


def test_micro_batches_mean_the_same_whatever_goes_through_the_model_together(
    vlm: VLM, rows: Rows, tmp_path: Path
) -> None:
    options = {"loss_reduction": "micro-batch", "micro_batch": 2}
    padded = trained(vlm, rows, tmp_path, packing="off", **options)
    for pack_tokens in (1, 200, 1 << 20):
        assert_same(trained(vlm, rows, tmp_path, packing="on", pack_tokens=pack_tokens, **options), padded)
    assert differ(padded, trained(vlm, rows, tmp_path, **{**options, "micro_batch": 4}))
    assert differ(padded, trained(vlm, rows, tmp_path, micro_batch=2))


def test_the_order_of_rows_within_a_step_does_not_matter(
    vlm: VLM, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(vlm, rows, tmp_path)
    share = Steps._share
    monkeypatch.setattr(Steps, "_share", lambda self, step: share(self, step)[::-1])
    assert_same(trained(vlm, rows, tmp_path), expected)


def test_activations_that_are_computed_again_change_nothing(vlm: VLM, rows: Rows, tmp_path: Path) -> None:
    assert_same(trained(vlm, rows, tmp_path, gradient_checkpointing=True), trained(vlm, rows, tmp_path))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("loss_reduction", ["global", "micro-batch"])
def test_equal_weights_are_the_mask_alone_and_unequal_ones_are_not(
    loss_reduction: str, vlm: VLM, rows: Made, tmp_path: Path
) -> None:
    options = {"loss_reduction": loss_reduction}
    expected = trained(vlm, rows, tmp_path, **options)
    assert_same(trained(vlm, weighed(rows, lambda n: 3.0), tmp_path, **options), expected)
    uneven = weighed(rows, lambda n: np.random.default_rng(n).uniform(0.2, 5, n))
    assert differ(trained(vlm, uneven, tmp_path, **options), expected)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("packing", ["on", "off"])
def test_vision_has_gradients_of_zero_in_a_step_without_pictures_and_the_silent_row_no_loss(
    packing: str, vlm: VLM, rows: Made, tmp_path: Path
) -> None:
    trainer = make_trainer(vlm, rows, tmp_path, packing=packing, max_steps=1)
    share = [replace(rows[k], weight=np.ones_like(rows[k].weight)) for k in (0, 4)]
    assert not any(row.encoded.n_image_tokens for row in share)
    trainer.create_optimizer()
    trainer.way = trainer._choose_way()
    assert trainer.way is (PACKED if packing == "on" else PADDED)

    def step(pictures_matter: bool) -> tuple[float, dict[str, Tensor | None]]:
        trainer.pictures_matter = pictures_matter
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, {"rows": share})
        return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}

    with_silent, without = step(True), step(False)
    assert with_silent[0] == pytest.approx(without[0], abs=1e-6)
    vision = [name for name in without[1] if without[1][name] is None]
    assert any("multi_modal_projector" in name for name in vision)
    for name in vision:
        grad = with_silent[1][name]
        assert grad is None or not grad.any()
    assert all(with_silent[1][name] is not None for name in vision if "multi_modal_projector" in name)
    for name, grad in without[1].items():
        assert grad is None or (with_silent[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_only_vision_and_projector_need_pictures(vlm: VLM) -> None:
    for parts, expected in ((("language",), False), (("projector", "language"), True), (("vision",), True)):
        model = prepare_model(replace(vlm, model=copy.deepcopy(vlm.model)), replace(RECIPE, parts=parts))
        assert trains_more_than_language(model) is expected


def test_where_weights_are_sharded_every_pass_has_a_picture_and_ranks_as_many_passes(
    vlm: VLM, rows: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(vlm, rows, tmp_path, packing="on", pack_tokens=1)
    trainer.way, trainer.pictures_matter = PACKED, True
    trainer.create_optimizer()
    monkeypatch.setattr(SelectiveTrainer, "_is_sharded", True)
    share = [rows[row] for row in range(6)]
    assert sum(not row.encoded.n_image_tokens for row in share) > 0
    seen: list[list[TrainingRow]] = []
    kept: list[bool] = []

    def note(self: SelectiveTrainer, model: Any, some: list[TrainingRow], *, is_last: bool) -> Tensor:
        seen.append(some)
        kept.append(is_last)
        return torch.zeros(())

    monkeypatch.setattr(SelectiveTrainer, "_forward_backward", note)
    other = Tally(weight=5.0, active_tokens=5, micro_batches=1, passes=9)
    monkeypatch.setattr(SelectiveTrainer, "_tallied", lambda self, mine: [mine, other])
    trainer.training_step(trainer.model, {"rows": share})
    assert len(seen) == 9
    assert kept == [False] * 8 + [True]
    assert all(any(row.encoded.n_image_tokens for row in some) for some in seen)
    total = sum(float(row.weight.sum()) for row in share)
    assert sum(float(row.weight.sum()) for some in seen for row in some) == pytest.approx(total / (total + 5), rel=1e-5)
    assert trainer.active_tokens == sum(int(row.active.sum()) for row in share) + 5

    # A rank that has no row of a short step waits with a silent one.
    seen.clear()
    trainer.training_step(trainer.model, {"rows": []})
    assert len(seen) == 9
    assert not any(row.weight.any() for some in seen for row in some)


# ---------------------------------------------------------------- what cannot be packed


def test_a_model_that_cannot_be_packed_is_trained_in_padded_batches_and_that_is_said_once(
    vlm: VLM, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = trained(vlm, rows, tmp_path, packing="off")
    assert "padded" not in capsys.readouterr().err
    monkeypatch.setattr("visgain.vlm.pack.row_positions", lambda _, row: torch.zeros(1, len(row.input_ids)).long())
    assert_same(trained(vlm, rows, tmp_path), expected)
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "padded" in line]
    assert len(told) == 1
    assert told[0].startswith("visgain: trains on padded batches of 4 rows (packed: off by ")
    with pytest.raises(ConfigError, match=r"--packing on, but this model cannot be trained in packs \(packed: off by"):
        trained(vlm, rows, tmp_path, packing="on")
