"""What arms are tried on: the embedded world or the user's data, one seed at a time, behind one face."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from visgain.ablation.metrics import HELD_OUT, WORLD, Metric, numbers
from visgain.ablation.on_data import PLACE, Division, check_tested, divide, held_out_metrics, without_rows, write_tested
from visgain.ablation.on_world import World
from visgain.config import AblateConfig, EvalConfig, ScoreConfig, TrainConfig
from visgain.data import Dataset, open_dataset, reading
from visgain.evaluation.run import run_eval
from visgain.scoring.claims import alone
from visgain.scoring.run import run_score
from visgain.storage import read_json, scan_scores
from visgain.training.recipe import Recipe, resolve_recipe

WORLD_STEPS = 150
WORLD_TEST_ROWS = 1000


@runtime_checkable
class Bench(Protocol):
    """One seed: its data, its scores, how it is trained on and tested. What costs is made when first asked for."""

    def check(self) -> None:
        """Raise ConfigError or DataError for what would make every cell fail."""
        ...

    def scores(self, counterfactual: str | None) -> Path:
        """The scores of the training rows with this counterfactual (None: the study's)."""
        ...

    def train(self, cell: Path) -> TrainConfig:
        """How an arm is trained whose files are in `cell`, as vanilla would be."""
        ...

    def evaluate(self, model: str, cell: Path, name: str) -> Mapping[str, float]:
        """What the metrics are of; progress calls the model `name`."""
        ...


def recipe_of(config: AblateConfig) -> Recipe:
    """The recipe of every arm, with the options laid over it. Raises ConfigError."""
    return resolve_recipe(_train_config(config, config.out, config.out, 0, None))


def open_bench(config: AblateConfig, seed: int) -> Bench:
    return WorldBench(config, seed) if config.data is None else DataBench(config, seed)


def bench_metrics(config: AblateConfig) -> Sequence[Metric]:
    return WORLD if config.data is None else HELD_OUT


def bench_identity(config: AblateConfig) -> dict[str, Any]:
    """Everything that every cell's numbers depend on, beside model, recipe and steps. Raises DataError."""
    if config.data is None:
        return {"world": {"rows": config.rows, "test_rows": config.test_rows or WORLD_TEST_ROWS}}
    tested = None if config.eval_data is None else _open(config, config.eval_data).fingerprint
    return {
        "data_fingerprint": _open(config, config.data).fingerprint,
        "eval_data_fingerprint": tested,
        "test_rows": config.test_rows,
        **reading(config.columns, config.format),
    }


def _open(config: AblateConfig, path: Path) -> Dataset:
    return open_dataset(path, config.image_root, columns=config.columns, format=config.format)


class WorldBench:
    """The embedded world, drawn anew for every seed."""

    def __init__(self, config: AblateConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.folder = config.out / f"seed-{seed}"

    @cached_property
    def world(self) -> World:
        world = World(
            folder=self.folder / "world",
            seed=self.seed,
            rows=self.config.rows,
            test_rows=self.config.test_rows or WORLD_TEST_ROWS,
        )
        with alone(self.folder, "data"):
            world.draw()
        return world

    def check(self) -> None:
        """Nothing that is not known from the options."""

    def scores(self, counterfactual: str | None) -> Path:
        named = counterfactual or self.config.counterfactual
        out = self.folder / scores_name(named)
        return scored(
            ScoreConfig(
                model=self.config.model,
                data=self.world.train,
                out=out,
                counterfactual=named,
                seed=self.seed,
                **_model_options(self.config),
            )
        )

    def train(self, cell: Path) -> TrainConfig:
        steps = None if self.config.equal == "epochs" else self.config.steps or WORLD_STEPS
        return _train_config(self.config, self.world.train, cell, self.seed, steps)

    def evaluate(self, model: str, cell: Path, name: str) -> Mapping[str, float]:
        return numbers(self.world.evaluate(model, name, self.config.device)) | asked_benchmarks(
            self.config, model, cell
        )


class DataBench:
    """The user's data. The whole of it is scored once for all seeds; each seed holds out rows of its own."""

    def __init__(self, config: AblateConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.folder = config.out / f"seed-{seed}"

    @cached_property
    def data(self) -> Path:
        if self.config.data is None:
            raise ValueError("no data")
        return self.config.data

    def check(self) -> None:
        """Whether there are rows to test on."""
        if self.config.eval_data is None:
            _ = self._division  # found now, and kept
        else:
            check_tested(_open(self.config, self.config.eval_data))

    def scores(self, counterfactual: str | None) -> Path:
        named = counterfactual or self.config.counterfactual
        whole = self._scored(self.config.model, self.data, self.config.out / scores_name(named), named)
        if self.config.eval_data is not None:
            return whole
        with alone(self.folder, scores_name(named)):
            return without_rows(whole, self._division.withheld, self.folder / scores_name(named))

    def train(self, cell: Path) -> TrainConfig:
        steps = None if self.config.equal == "epochs" else self.config.steps or self._steps_of_all
        options = _train_config(self.config, self.data, cell, self.seed, steps)
        return replace(
            options, image_root=self.config.image_root, columns=self.config.columns, format=self.config.format
        )

    def evaluate(self, model: str, cell: Path, name: str) -> Mapping[str, float]:
        start = self._tested_by(self.config.model, self.folder / "tested")
        scores = start if model == self.config.model else self._tested_by(model, cell / "tested")
        return held_out_metrics(scores, start) | asked_benchmarks(self.config, model, cell)

    def _tested_by(self, model: str, out: Path) -> Path:
        """The scores by `model` of what is tested."""
        named = self.config.counterfactual
        if self.config.eval_data is not None:
            return self._scored(model, self.config.eval_data, out, named)
        return scored(
            ScoreConfig(model=model, out=out, counterfactual=named, **_model_options(self.config), **self._tested)
        )

    def _scored(self, model: str, data: Path, out: Path, counterfactual: str) -> Path:
        return scored(
            ScoreConfig(
                model=model,
                data=data,
                out=out,
                image_root=self.config.image_root,
                columns=self.config.columns,
                format=self.config.format,
                counterfactual=counterfactual,
                **_model_options(self.config),
            )
        )

    @cached_property
    def _dataset(self) -> Dataset:
        return _open(self.config, self.data)

    @cached_property
    def _division(self) -> Division:
        return divide(self._dataset, self.config.test_rows, self.seed)

    @cached_property
    def _tested(self) -> dict[str, Any]:
        """Where the rows that were held out are."""
        folder = self.folder / "held-out"
        with alone(self.folder, "data"):
            if not (folder / PLACE).is_file():
                write_tested(self._dataset, self._division.tested.tolist(), folder)
        root = read_json(folder / PLACE, "held-out rows")["image_root"]
        return {"data": folder / "data.jsonl", "image_root": folder if root is None else Path(root)}

    @cached_property
    def _steps_of_all(self) -> int:
        """How many steps the recipe takes for every row that vanilla trains on."""
        readable = scan_scores(self.scores(None), ["skip_reason"], description="counting rows")
        return steps_of(recipe_of(self.config), sum(table.column("skip_reason").null_count for table in readable))


def steps_of(recipe: Recipe, n_rows: int) -> int:
    """Optimiser steps of `recipe` over `n_rows`."""
    return recipe.max_steps or math.ceil(recipe.epochs * math.ceil(n_rows / recipe.batch_size))


def scores_name(counterfactual: str) -> str:
    """The folder of scores with this counterfactual: blur:sigma=0.2 -> scores-blur-sigma-0.2."""
    return "scores-" + re.sub(r"[^A-Za-z0-9.]+", "-", counterfactual)


def scored(config: ScoreConfig) -> Path:
    """The folder of finished scores. Does not load the model for a run that is finished."""
    if not (config.out / "skipped.jsonl").is_file():  # a run's last file
        run_score(config)
    return config.out


def _train_config(config: AblateConfig, data: Path, cell: Path, seed: int, steps: int | None) -> TrainConfig:
    return TrainConfig(
        model=config.model,
        data=data,
        out=cell / "model",
        selection=cell / "selection",
        recipe=recipe_name(config),
        max_steps=steps,
        seed=seed,
        template=config.template,
        max_length=config.max_length,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def recipe_name(config: AblateConfig) -> str:
    return config.recipe or ("tune" if config.data else "embedded-tune")


def _model_options(config: AblateConfig) -> dict[str, Any]:
    """Options that scoring and benchmarks share, as the recipe trains."""
    recipe = recipe_of(config)
    return {
        "template": recipe.template,
        "max_length": recipe.max_length,
        "device": config.device,
        "trust_remote_code": config.trust_remote_code,
    }


def asked_benchmarks(config: AblateConfig, model: str, cell: Path) -> dict[str, float]:
    """benchmark.metric -> value, of every benchmark that is asked for."""
    if config.benchmark_data is None:
        return {}
    results = run_eval(
        EvalConfig(
            benchmarks=config.benchmarks,
            data=config.benchmark_data,
            out=cell / "evals",
            model=model,
            **_model_options(config),
        )
    )
    return {
        f"{result.benchmark}.{name}": float(estimate.value)
        for result in results
        for name, estimate in result.metrics.items()
        if estimate.value is not None
    }
