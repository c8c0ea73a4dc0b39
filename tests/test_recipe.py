"""Recipes: what was published, what the built optimiser has of it, and one clear message for a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from visgain.config import TrainConfig
from visgain.data import open_dataset
from visgain.errors import ConfigError
from visgain.training.collate import Rows
from visgain.training.prepare import prepare_model
from visgain.training.recipe import load_recipe, recipe_names, resolve_recipe
from visgain.training.run import build_trainer, run_train
from visgain.vlm.load import load_vlm
from visgain.vlm.template import make_encoder


def train_config(blank_model: Path, small_world: Path, out: Path, **options) -> TrainConfig:
    base = {"max_steps": 3, "batch_size": 8, "micro_batch": 4, "recipe": "embedded-tune"}
    return TrainConfig(model=str(blank_model), data=small_world / "data.json", out=out, **{**base, **options})


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads(name: str) -> None:
    assert load_recipe(name).learning_rate > 0


def test_the_published_stages_are_what_was_published() -> None:
    tune, align = load_recipe("tune"), load_recipe("align")
    assert (tune.parts, tune.learning_rate, tune.batch_size) == (("projector", "language"), 2e-5, 128)
    assert (align.parts, align.learning_rate, align.batch_size) == (("projector",), 1e-3, 256)
    for recipe in (tune, align):
        assert (recipe.schedule, recipe.warmup_ratio, recipe.epochs, recipe.weight_decay) == ("cosine", 0.03, 1, 0)
        assert recipe.max_grad_norm == 1.0


def test_the_optimiser_has_the_values_of_the_recipe(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    config = train_config(blank_model, small_world, tmp_path, recipe="align", batch_size=8, micro_batch=2, max_steps=50)
    recipe = resolve_recipe(config)
    vlm = load_vlm(str(blank_model))
    rows = Rows(open_dataset(small_world / "data.json"), make_encoder(vlm), range(60))
    trainer = build_trainer(prepare_model(vlm, recipe), vlm, rows, recipe, config)
    trainer.create_optimizer_and_scheduler(num_training_steps=50)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    projector = {id(p) for p in vlm.model.model.multi_modal_projector.parameters()}
    assert trained == projector
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3}
    assert trainer.args.gradient_accumulation_steps == 4
    assert trainer.args.get_warmup_steps(50) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "did you mean 'learning_rate'"),
        ("parts: [projector]", "missing"),
        ("parts: [eyes]\nlearning_rate: 1\nbatch_size: 2\nmicro_batch: 1", "unknown part 'eyes'"),
        ("parts: [vision]\nlearning_rate: 1\nbatch_size: 3\nmicro_batch: 2", "not a multiple"),
        ("parts: [vision]\nlearning_rate: fast\nbatch_size: 2\nmicro_batch: 1", "learning_rate is 'fast'"),
        ("parts: [vision]\nlearning_rate: 1\nbatch_size: 2\nmicro_batch: 0", "micro_batch is 0"),
        ("parts: [vision]\nlearning_rate: 1\nbatch_size: two\nmicro_batch: 1", "batch_size is 'two'"),
        ("parts: [vision]\nlearning_rate: 1\nbatch_size: 2\nmicro_batch: 1\nmax_steps: 2.5", "max_steps is 2.5"),
        ("- a list", "mapping"),
        ("a: [", "cannot read recipe"),
    ],
)
def test_a_wrong_recipe_is_one_clear_message(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_learning_rate_written_without_a_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("parts: [vision]\nlearning_rate: 2e-5\nbatch_size: 2\nmicro_batch: 1")
    assert load_recipe(str(tmp_path / "mine.yaml")).learning_rate == 2e-5


def test_an_unknown_schedule_is_one_clear_message(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "parts: [vision]\nlearning_rate: 1\nbatch_size: 2\nmicro_batch: 1\nschedule: cosin"
    )
    with pytest.raises(ConfigError, match="'cosin'"):
        run_train(
            TrainConfig(
                model=str(blank_model),
                data=small_world / "data.json",
                out=tmp_path / "out",
                recipe=str(tmp_path / "mine.yaml"),
            )
        )


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'align'"):
        load_recipe("aling")


def test_flags_win_over_the_recipe() -> None:
    config = TrainConfig(model="m", data=Path("d"), out=Path("o"), learning_rate=5.0, parts=("vision",), batch_size=4)
    recipe = resolve_recipe(config)
    assert (recipe.learning_rate, recipe.parts, recipe.batch_size, recipe.micro_batch) == (5.0, ("vision",), 4, 4)
