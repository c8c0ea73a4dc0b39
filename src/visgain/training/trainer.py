"""Hugging Face's Trainer with our loss."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from visgain.training.checkpoint import CheckpointedTrainer
from visgain.training.collate import IGNORED
from visgain.training.loss import active_nll, reduce_loss
from visgain.vlm.logits import output_head


class SelectiveTrainer(CheckpointedTrainer):
    """Trainer whose loss is the cross-entropy of the active tokens (labels other than -100) alone."""

    def __init__(self, *, loss_reduction: str = "global", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Tells Trainer whether to count the labels of the whole optimiser step for us (global), or to average the
        # losses of its micro-batches itself.
        self.model_accepts_loss_kwargs = loss_reduction == "global"

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

    def _unwrapped(self, model: nn.Module) -> PreTrainedModel:
        unwrapped = self.accelerator.unwrap_model(model)
        return unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
