"""What a training tells while it runs: a bar on stderr, and everything that it logs in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from visgain.storage import storage_errors


class QuietProgress(ProgressCallback):  # type: ignore[misc]
    """Trainer's progress bar with the loss in it, instead of log lines among the results."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


class JsonlLog(TrainerCallback):  # type: ignore[misc]
    """Appends everything Trainer logs to `path`, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            line = json.dumps({"step": state.global_step, **logs})
            with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
