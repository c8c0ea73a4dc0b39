"""Logits where they are needed and nowhere else.

A causal model predicts token t from the hidden state at t - 1. The output head of a large model turns each hidden state
into tens of thousands of logits, and almost all of them would be thrown away: only the states before wanted tokens go
through the head. This is done on the head itself, so that whatever the model does after it (soft-capping, scaling)
still applies, and it needs nothing from the model but the usual forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from visgain.errors import ModelError


def answer_logits(
    model: PreTrainedModel | nn.Module,
    inputs: Mapping[str, Any],
    wanted: Bool[Tensor, "B T"],
    head: nn.Module | None = None,
) -> Float32[Tensor, "N V"]:
    """Float32 logits that predict the tokens at `wanted` (N in all), in row-major order. Position 0 is never predicted.

    The head itself runs in float32 whatever the model's dtype: rounding logits to 16 bits alone moves a gain by
    hundredths of a nat. `head`: the output embeddings, where `model` is a wrapper that does not tell. Differentiable.
    Raises ModelError if the model does not call its output head once on all hidden states.
    """
    predicting = torch.zeros_like(wanted)
    predicting[:, :-1] = wanted[:, 1:]
    with _head_at(output_head(model) if head is None else head, predicting):
        logits = model(**inputs, use_cache=False, return_dict=True).logits
    n_wanted = int(predicting.sum())
    if logits.shape[-2] != n_wanted:
        raise ModelError(f"{type(model).__name__} does not take logits at chosen positions; please report this model")
    result: Tensor = logits.reshape(n_wanted, logits.shape[-1]).float()
    return result


def token_nll(logits: Float32[Tensor, "N V"], targets: Int64[Tensor, " N"]) -> Float32[Tensor, " N"]:
    """Negative log-probability of each target, in nats: logsumexp minus the target's logit."""
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[:, None])[:, 0]


def output_head(model: PreTrainedModel | nn.Module) -> nn.Module:
    """The module that turns hidden states into logits. Raises ModelError if the model has none."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(model).__name__} has no output embeddings; is it a generative model?")
    return head


@contextmanager
def _head_at(head: nn.Module, positions: Bool[Tensor, "B T"]) -> Iterator[None]:
    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][positions], *args[1:])

    def in_float32(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output.dtype == torch.float32 or not isinstance(module, nn.Linear):
            return output
        bias = None if module.bias is None else module.bias.float()
        with torch.autocast(output.device.type, enabled=False):
            return nn.functional.linear(args[0].float(), module.weight.float(), bias)

    handles = [head.register_forward_pre_hook(select), head.register_forward_hook(in_float32)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
