"""`visgain score --backend ray`: the same work wherever a Ray cluster has room, while it grows and shrinks.

A worker is one long Ray task that works in the folder as any other process does: it claims one part after the other
until all are on disk. So Ray finds the places and notices deaths, the folder says what is left, and a part has one
writer whoever else helps. When a worker dies its claim goes too, the others do its part, and a new worker starts
wherever there is room: nothing waits for a machine that is gone.

The first worker makes the plan and checks the model alone, so a mistake is told once. Then there is a worker for each
place, and one more waits, so that a machine that joins is used, and a cluster that scales itself has a reason to grow.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from visgain.config import ScoreConfig
from visgain.data.parts import base_of, whole
from visgain.errors import ConfigError, VisgainError
from visgain.scoring.claims import Rank
from visgain.scoring.plan import read_plan
from visgain.scoring.run import Progress, score_rest
from visgain.storage import finished_parts, read_json
from visgain.vlm.load import model_name

DEATHS = 5
"""Give up after so many deaths for each worker with no part finished in between: something in a part kills them."""

Resources = Mapping[str, float]
"""How much there is of what Ray counts, by Ray's names: CPU, GPU."""


def score_on_ray(config: ScoreConfig) -> None:
    """Score what is left into `config.out`, a folder that all machines of the cluster see under the same path.

    Raises VisgainError for any user's mistake, whether it shows here or in a worker.
    """
    with _cluster() as ray, Workers(ray, config) as workers, _Watch(config.out) as watch:
        while not workers.finished(seconds=1):
            workers.keep(watch.parts_left())


def work(config: ScoreConfig, rank: Rank) -> None:
    """What a worker does: its share, until every part is on disk."""
    try:
        score_rest(config, rank)
    except VisgainError as error:
        raise type(error)(f"on {platform.node()}: {error}") from error


class Workers:
    """The workers of a run: a Ray task for each place, as long as there are parts for them to do."""

    def __init__(self, ray: ModuleType, config: ScoreConfig) -> None:
        self._ray = ray
        self._needs = worker_needs(config.device, self._machines())
        self._config = from_anywhere(config, self._needs)
        # A death is told to us, who know whether the run gets on, and not made good by Ray for ever.
        task = ray.remote(num_cpus=self._needs["CPU"], num_gpus=self._needs.get("GPU", 0), max_retries=0, max_calls=1)
        self._start = task(work).remote
        self._tasks: set[Any] = set()
        self._parts_left: int | None = None
        self._n_deaths = 0  # since a part was finished

    def __enter__(self) -> Workers:
        self.keep(None)
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=True)

    def keep(self, parts_left: int | None) -> None:
        """Start the workers that are missing: one before there is a plan, else one a place and one, or one a part."""
        if parts_left != self._parts_left:
            self._parts_left, self._n_deaths = parts_left, 0
        places = n_places(self._machines(), self._needs) + 1
        for number in range(len(self._tasks), max(1, min(places, parts_left or 1))):
            self._tasks.add(self._start(self._config, Rank(number=number, world=places)))

    def finished(self, seconds: float) -> bool:
        """Whether a worker has found every part on disk, after waiting so long for one to end."""
        done, _ = self._ray.wait(list(self._tasks), timeout=seconds)
        for task in done:
            self._tasks.remove(task)
            try:
                self._ray.get(task)
            except self._ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, VisgainError) else error) from None
            except self._ray.exceptions.RayError as error:
                self._bury(error)
            else:
                return True
        return False

    def _bury(self, error: Exception) -> None:
        self._n_deaths += 1
        tqdm.write(f"visgain: a worker died, others do its part: {_first_line(error)}", file=sys.stderr)
        if self._n_deaths >= DEATHS * (1 + len(self._tasks)):
            raise VisgainError(
                f"{self._n_deaths} workers died while no part was finished, the last one of this: {_first_line(error)}"
            ) from error

    def _machines(self) -> list[Resources]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]


class _Watch:
    """What the folder shows of the run's progress."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._n_parts = 0
        self._progress: Progress | None = None

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.look()
            self._progress.__exit__()

    def parts_left(self) -> int | None:
        """How many parts are not on disk; None as long as there is no plan."""
        if self._progress is None:
            if not (self._out / "run.json").exists():
                return None
            self._n_parts = read_json(self._out / "run.json", "scores")["n_parts"]
            self._progress = Progress(self._out, read_plan(self._out, self._n_parts), shown=True)
        self._progress.look()
        return self._n_parts - len(finished_parts(self._out, self._n_parts))


# ---------------------------------------------------------------- the cluster


@contextmanager
def _cluster() -> Iterator[ModuleType]:
    """Ray, connected to the cluster at RAY_ADDRESS, else to the one that runs on this machine, else to one of ours."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--backend ray needs Ray: pip install 'visgain[ray]'") from error
    if ray.is_initialized():  # by the program that called us
        yield ray
        return
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    # Ray tells of every death in pages, on stdout; we do in a line.
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise ConfigError(f"cannot join or start a Ray cluster: {_first_line(error)}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raises ConfigError if nobody listens there, where Ray would try for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(f"no Ray cluster at RAY_ADDRESS={address}: {error.strerror or error}") from error


def worker_needs(device: str, machines: Sequence[Resources]) -> Resources:
    """What one worker takes: a GPU, or without any in the cluster as many cores as a process here would compute on."""
    if device.startswith("cuda") or (device == "auto" and any(machine.get("GPU", 0) >= 1 for machine in machines)):
        return {"CPU": 1, "GPU": 1}
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    return {"CPU": min([torch.get_num_threads(), *cores])}


def n_places(machines: Sequence[Resources], needs: Resources) -> int:
    """How many workers fit on `machines` if nothing else runs there."""
    return sum(min(int(machine.get(name, 0) // need) for name, need in needs.items()) for machine in machines)


def from_anywhere(config: ScoreConfig, needs: Resources) -> ScoreConfig:
    """`config` as it reads on another machine, in a process that has been given `needs`."""
    on_gpu = "GPU" in needs
    workers = config.workers if config.workers is not None or on_gpu else min(1, int(needs["CPU"]) - 1)
    return replace(
        config,
        backend="local",
        model=model_name(config.model),
        data=whole(config.data) if base_of(config.data).exists() else config.data,  # else a name on the hub
        out=config.out.absolute(),
        image_root=config.image_root and config.image_root.absolute(),
        projector=config.projector and config.projector.absolute(),
        # Of all GPUs a worker sees the one that Ray gave it.
        device="cuda" if config.device.startswith("cuda") else config.device if on_gpu else "cpu",
        workers=workers,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
