"""`visgain score --backend ray`: the same work, wherever a Ray cluster has room, while it grows and shrinks.

A worker is one long Ray task that works in the folder as any other process does: it claims one part after the other
until all are on disk. So Ray finds the places and notices deaths, the folder says what is left, and a part has one
writer whoever else helps. With a worker its locks go, and what it had claimed is done by the others; a new worker
follows wherever there is room, so that no work waits for a machine that is gone.

The first worker makes the plan and checks the model alone: a mistake is told once. Then there is a worker for each
place, and one more waits, so that a machine that joins is used, and a cluster that scales itself has a reason to grow.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from visgain.config import ScoreConfig
from visgain.errors import ConfigError, VisgainError
from visgain.scoring.claims import Rank
from visgain.scoring.plan import read_plan
from visgain.scoring.run import Progress, score_rest
from visgain.storage import finished_parts, read_json
from visgain.vlm.load import model_name

DEATHS = 5
"""Give up after so many deaths for each worker without a finished part in between: one row must be killing them."""

Resources = Mapping[str, float]
"""What Ray counts, by Ray's names: CPU, GPU."""


def score_on_ray(config: ScoreConfig) -> None:
    """Score what is left into `config.out`, which every machine of the cluster must see under the same path.

    Raises VisgainError for any user's mistake, a worker's included.
    """
    with _cluster() as ray, _Workers(ray, config) as workers, _Watch(config.out) as watch:
        while not workers.finished(seconds=1):
            left = watch.parts_left()
            workers.keep(1 if left is None else left)


class _Workers:
    """The workers of this run: so many Ray tasks as there is room for and work left."""

    def __init__(self, ray: ModuleType, config: ScoreConfig) -> None:
        self._ray = ray
        self._needs = worker_needs(config.device, self._machines())
        self._config = from_anywhere(config, self._needs)
        task = ray.remote(num_cpus=self._needs["CPU"], num_gpus=self._needs.get("GPU", 0), max_retries=0, max_calls=1)
        self._start = task(score_rest).remote
        self._tasks: set[Any] = set()
        self._n_started = self._n_died = 0
        self._left: int | None = None

    def __enter__(self) -> _Workers:
        self.keep(1)
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=True)

    def _machines(self) -> list[Resources]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def keep(self, parts_left: int) -> None:
        """Start workers until there is one for each place and one more, but none without a part to do."""
        if parts_left != self._left:
            self._left, self._n_died = parts_left, 0
        places = n_places(self._machines(), self._needs) + 1
        for _ in range(max(1, min(places, parts_left)) - len(self._tasks)):
            rank = Rank(number=self._n_started % places, world=places)
            self._tasks.add(self._start(self._config, rank))
            self._n_started += 1

    def finished(self, seconds: float) -> bool:
        """Whether a worker found every part on disk, waiting so long for news of them."""
        done, _ = self._ray.wait(list(self._tasks), timeout=seconds)
        for task in done:
            self._tasks.remove(task)
            try:
                self._ray.get(task)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, VisgainError):
                    raise type(error.cause)(f"{error.cause} (a worker on {error.ip})") from None
                raise
            except self._ray.exceptions.RayError as error:
                self._mourn(error)
            else:
                return True
        return False

    def _mourn(self, error: Exception) -> None:
        self._n_died += 1
        if self._n_died >= DEATHS * (1 + len(self._tasks)):
            raise VisgainError(
                f"{self._n_died} workers died and no part was finished; the last one: {_first_line(error)}"
            ) from error


class _Watch:
    """The progress of the run in a folder, as the folder shows it."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._progress: Progress | None = None
        self._n_parts = 0

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.look()
            self._progress.__exit__()

    def parts_left(self) -> int | None:
        """How many parts are to be done; None as long as there is no plan."""
        if self._progress is None:
            if not (self._out / "run.json").exists():
                return None
            self._n_parts = read_json(self._out / "run.json", "scores")["n_parts"]
            self._progress = Progress(self._out, read_plan(self._out, self._n_parts), shown=True)
        self._progress.look()
        return self._n_parts - len(finished_parts(self._out, self._n_parts))


@contextmanager
def _cluster() -> Iterator[ModuleType]:
    """Ray, connected to the cluster in RAY_ADDRESS, else to one that runs on this machine, else to one of our own."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--backend ray needs Ray: pip install 'visgain[ray]'") from error
    if ray.is_initialized():  # by who called us
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(f"cannot join or start a Ray cluster: {_first_line(error)}; see RAY_ADDRESS") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def worker_needs(device: str, machines: Sequence[Resources]) -> Resources:
    """What one worker takes: a GPU, or without any in the cluster as many cores as a process here computes on."""
    if device.startswith("cuda") or (device == "auto" and any(machine.get("GPU", 0) >= 1 for machine in machines)):
        return {"CPU": 1, "GPU": 1}
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    return {"CPU": min([torch.get_num_threads(), *cores])}


def n_places(machines: Sequence[Resources], needs: Resources) -> int:
    """How many workers fit on `machines`, if nothing else runs there."""
    return sum(min(int(machine.get(name, 0) // need) for name, need in needs.items()) for machine in machines)


def from_anywhere(config: ScoreConfig, needs: Resources) -> ScoreConfig:
    """`config` as it means the same to a process elsewhere that has been given `needs`."""
    workers = config.workers
    if workers is None and "GPU" not in needs:
        workers = min(1, int(needs["CPU"]) - 1)
    return replace(
        config,
        backend="local",
        model=model_name(config.model),
        data=config.data.absolute(),
        out=config.out.absolute(),
        image_root=config.image_root and config.image_root.absolute(),
        device="cuda" if config.device.startswith("cuda") else config.device if "GPU" in needs else "cpu",
        workers=workers,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
