"""Hugging Face's Trainer with our loss, and checkpoints that hold everything that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from visgain.errors import StorageError
from visgain.storage import read_json, write_json
from visgain.training.collate import IGNORED
from visgain.training.loss import active_nll, reduce_loss
from visgain.vlm.logits import output_head

BESIDE_ADAPTER = "trained.safetensors"
"""In a checkpoint of adapters: every parameter that is trained."""

PROGRESS = "visgain.json"
"""In a checkpoint: the number of active tokens so far."""


class SelectiveTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is the cross-entropy of the active tokens (labels other than -100) alone."""

    def __init__(self, *, loss_reduction: str = "global", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Tells Trainer whether to count the labels of the whole optimiser step for us (global), or to average the
        # losses of its micro-batches itself.
        self.model_accepts_loss_kwargs = loss_reduction == "global"
        self.active_tokens = 0  # that carried loss on this device since the start of the run

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float32[Tensor, ""] | tuple[Float32[Tensor, ""], dict[str, Tensor]]:
        """Loss of one micro-batch, scaled for accumulation as Trainer expects."""
        labels = inputs["labels"]
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        active = labels != IGNORED
        self.active_tokens += int(active.sum())
        nll = active_nll(model, model_inputs, active, output_head(self._unwrapped(model)))
        loss = reduce_loss(nll, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over devices, while the count is that of all of them together.
            loss = loss * self.accelerator.num_processes
        return (loss, {"nll": nll}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "active_tokens": self.active_tokens}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        write_json(folder / PROGRESS, {"active_tokens": self.active_tokens})
        if not isinstance(self.model, PreTrainedModel):
            # An adapter's checkpoint leaves out whatever else is trained beside it, such as the projector.
            trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, folder / BESIDE_ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint's weights through from_pretrained, and all of them.

        Trainer's own way matches the file's names with the module's, which differ in models whose file format is older
        than their code (LLaVA): it would warn, load nothing, and go on from the initial weights.
        """
        model = self.model if model is None else model
        self.active_tokens = read_json(Path(resume_from_checkpoint) / PROGRESS, "checkpoint")["active_tokens"]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif isinstance(model, PreTrainedModel):
            model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype).state_dict())
        else:
            trained = load_file(Path(resume_from_checkpoint) / BESIDE_ADAPTER)
            if model.load_state_dict(trained, strict=False).unexpected_keys:
                raise StorageError(f"{resume_from_checkpoint} is a checkpoint of another model; use another --out")

    def _unwrapped(self, model: nn.Module) -> PreTrainedModel:
        unwrapped = self.accelerator.unwrap_model(model)
        return unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
