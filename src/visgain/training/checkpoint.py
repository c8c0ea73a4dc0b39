"""Checkpoints to resume from: everything that the rest of the training depends on, of all ranks, or none at all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import float32, nn
from torch.serialization import STORAGE, register_package
from transformers import PreTrainedModel, Trainer

from visgain.errors import StorageError
from visgain.storage import read_json, storage_errors, write_json

BESIDE_ADAPTER = "trained.safetensors"
"""In a checkpoint of adapters: every parameter that is trained."""

PROGRESS = "visgain.json"
"""In a checkpoint: active tokens and seconds so far. Written when every rank has written its files, so a checkpoint
without it is not complete."""


def _stays_on_cpu(storage: STORAGE, location: str) -> STORAGE | None:
    return storage if location.startswith("cpu:") else None


# Accelerate calls the device of a rank on a CPU "cpu:0", which torch 2.11 does not know when it loads an optimiser.
register_package(100, lambda storage: None, _stays_on_cpu)


def last_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint in the folder of a training."""
    complete = [path.parent for path in out.glob(f"checkpoints/checkpoint-*/{PROGRESS}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2])) if complete else None


class CheckpointedTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose checkpoints hold everything that is trained, are complete or not there, and load again."""

    active_tokens = 0
    """Tokens that carried loss since the start of the run, on all ranks together."""

    _seconds = 0.0
    _since: float | None = None

    @property
    def seconds(self) -> float:
        """How long the training has taken, up to the checkpoint that it went on from and since."""
        return self._seconds + (0 if self._since is None else time.monotonic() - self._since)

    def resume(self, checkpoint: Path | None) -> Any:
        """Train from `checkpoint`, or from the beginning, to the end."""
        if checkpoint is not None:
            progress = read_json(checkpoint / PROGRESS, "checkpoint")
            self.active_tokens, self._seconds = progress["active_tokens"], progress.get("seconds", 0.0)
        self._since = time.monotonic()
        return self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # After a checkpoint of the last step nothing is left, which Trainer sees only when it has done one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with storage_errors(folder):
            super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_json(folder / PROGRESS, {"active_tokens": self.active_tokens, "seconds": round(self.seconds, 4)})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.should_save and not sharded and not isinstance(self.model, PreTrainedModel):
            # An adapter's checkpoint leaves out whatever else is trained beside it, such as the projector.
            trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, Path(output_dir or self.args.output_dir) / BESIDE_ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint's weights through from_pretrained, and all of them.

        Trainer's own way matches the file's names with the module's, which differ in models whose file format is older
        than their code (LLaVA): it would warn, load nothing, and go on from the initial weights.
        """
        model = self.model if model is None else model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif isinstance(model, PreTrainedModel):
            # In float32, which holds every value of the 16-bit types: parts of a model may have different ones.
            model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint, dtype=float32).state_dict())
        else:
            trained = load_file(Path(resume_from_checkpoint) / BESIDE_ADAPTER)
            if model.load_state_dict(trained, strict=False).unexpected_keys:
                raise StorageError(f"{resume_from_checkpoint} is a checkpoint of another model; use another --out")
