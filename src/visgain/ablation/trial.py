"""One arm from its scores to its metrics: select, train, evaluate. The demo does it thrice, `ablate` arm by seed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visgain.ablation.arms import Arm
from visgain.config import SelectConfig, TrainConfig
from visgain.selection import run_select
from visgain.training.run import run_train


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What an arm goes through, apart from what the arm itself says."""

    scores: Callable[[str | None], Path]  # counterfactual (None: the study's) -> folder of the training rows' scores
    train: Callable[[], TrainConfig]  # its `selection` and `out` are the folders of this arm
    evaluate: Callable[[str], Mapping[str, Any]]  # model -> metrics
    model: str  # that all arms start from
    seed: int


def run_arm(arm: Arm, stages: Stages, seconds: dict[str, float]) -> dict[str, Any]:
    """Select, train and evaluate; every stage resumes. Adds the time of each to `seconds`.

    Returns name, metrics, and of the training: rows, active_tokens (each time that one carried loss), steps,
    train_seconds; zeros for an arm that is not trained.
    """
    if arm.by is None:
        with timed(seconds, "evaluate"):
            metrics = stages.evaluate(stages.model)
        return _result(arm, metrics, rows=0, active_tokens=0, steps=0, train_seconds=0.0)
    with timed(seconds, "score"):
        scores = stages.scores(arm.counterfactual)
        train = replace(stages.train(), **arm.train)
    if train.selection is None:
        raise ValueError("an arm needs a folder for its selection")
    with timed(seconds, "select"):
        # What keeps everything is a selection too, so that all arms see the same readable rows.
        run_select(
            SelectConfig(
                scores=scores,
                out=train.selection,
                by=arm.by,
                keep=arm.keep,
                weights=arm.weights,
                seed=stages.seed,
            )
        )
    print(f"training {arm.name}", file=sys.stderr)
    with timed(seconds, "train"):
        trained = run_train(train)
    with timed(seconds, "evaluate"):
        metrics = stages.evaluate(str(train.out))
    return _result(
        arm,
        metrics,
        rows=trained.rows,
        active_tokens=trained.active_tokens,
        steps=trained.steps,
        train_seconds=trained.seconds,
    )


def _result(arm: Arm, metrics: Mapping[str, Any], **counts: float) -> dict[str, Any]:
    return {"name": arm.name, "metrics": dict(metrics), **counts}


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[stage]`."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
