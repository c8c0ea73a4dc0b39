"""What a training tells while it runs: a bar on stderr, and everything that it logs in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from visgain.storage import storage_errors


class Pace:
    """How many tokens a second there have been since the last time of asking."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._time = tokens, time.monotonic()

    def __call__(self, tokens: int) -> float:
        """`tokens`: all so far."""
        now = time.monotonic()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._tokens, self._time = tokens, now
        return round(rate, 1)


class QuietProgress(ProgressCallback):  # type: ignore[misc]
    """Trainer's progress bar with the loss in it, instead of log lines among the results."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


class JsonlLog(TrainerCallback):  # type: ignore[misc]
    """Appends everything Trainer logs to `path`, one JSON object a line.

    A training that resumes repeats the steps after its checkpoint; what was logged of them before goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        with storage_errors(self.path):
            before = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in before if _stays(line, state.global_step)]
            short = self.path.with_name(f"{self.path.name}.tmp")
            short.write_text("".join(kept), encoding="utf-8")
            short.replace(self.path)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            line = json.dumps({"step": state.global_step, **logs})
            with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _stays(line: str, step: int) -> bool:
    """Whether a line that was logged before tells of a step up to `step`, and not of the end."""
    try:
        logged = json.loads(line)
    except ValueError:
        return False  # cut off by a sudden end
    return "loss" in logged and int(logged["step"]) <= step
