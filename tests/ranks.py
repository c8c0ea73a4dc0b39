"""Processes that score into one folder, started quickly: from a process that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visgain.cli import main
from visgain.scoring import run
from visgain.scoring.claims import claim
from visgain.scoring.engine import Engine

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["ranks"])


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A process of `visgain score`. It notes each part that it writes in a file that all runners of a test share."""

    process: Any
    notes: Path
    errors: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def exit_code(self, seconds: float = 120) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it hangs"
        return int(self.process.exitcode)

    def message(self) -> str:
        return self.errors.read_text()

    def parts(self) -> list[int]:
        """The parts that this process wrote, in order."""
        return [part for pid, part in noted(self.notes) if pid == self.pid]


def noted(notes: Path) -> list[tuple[int, int]]:
    """(process, part) of every part that was written."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [(int(pid), int(part)) for pid, part in map(str.split, lines)]


def times_written(notes: Path) -> Counter[int]:
    return Counter(part for _, part in noted(notes))


@contextmanager
def runners(folder: Path, *, pause: float = 0.0) -> Iterator[Any]:
    """`start(arguments, environment)` starts a Runner; those that still run at the end are killed.

    `pause`: seconds that each pack takes longer.
    """
    started: list[Runner] = []

    def start(arguments: list[str], environment: Mapping[str, str] | None = None) -> Runner:
        errors = folder / f"errors-{len(started)}.txt"
        target = (arguments, dict(environment or {}), folder / "notes.txt", errors, pause)
        process = _server.Process(target=_score, args=target)
        process.start()
        started.append(Runner(process=process, notes=folder / "notes.txt", errors=errors))
        return started[-1]

    try:
        yield start
    finally:
        for runner in started:
            runner.kill()


def _score(arguments: list[str], environment: dict[str, str], notes: Path, errors: Path, pause: float) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    write_part, score = run.write_part, Engine.score

    def noting(out: Path, index: int, count: int, table: Any) -> None:
        write_part(out, index, count, table)
        with notes.open("a") as file:
            file.write(f"{os.getpid()} {index}\n")

    def pausing(self: Engine, units: Any) -> Any:
        time.sleep(pause)
        return score(self, units)

    run.write_part, Engine.score = noting, pausing
    main(arguments)


def holder(folder: Path, part: int) -> Any:
    """A process that has claimed `part` and does nothing."""
    ours, theirs = _server.Pipe()
    process = _server.Process(target=_hold, args=(folder, part, theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    assert ours.recv()
    return process


def _hold(folder: Path, part: int, pipe: Any) -> None:
    lock = claim(folder, part)
    pipe.send(lock is not None)
    time.sleep(600)
