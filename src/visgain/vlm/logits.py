"""Logits where they are needed and nowhere else.

A causal model predicts token t from the hidden state at t - 1. The output head of a large model turns each hidden state
into tens of thousands of logits, and almost all of them would be thrown away: only the states before wanted tokens go
through the head. This is done on the head itself, so that whatever the model does after it (soft-capping, scaling)
still applies, and it needs nothing from the model but the usual forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from visgain.errors import ModelError


def answer_logits(
    model: PreTrainedModel | Callable[..., Any],
    inputs: Mapping[str, Any],
    wanted: Bool[Tensor, "B T"],
    head: nn.Module | None = None,
) -> Float32[Tensor, "N V"]:
    """Float32 logits that predict the tokens at `wanted` (N in all), in row-major order. Position 0 is never predicted.

    The head itself runs in float32 whatever the model's dtype: rounding logits to 16 bits alone moves a gain by
    hundredths of a nat. `head`: the output embeddings, where `model` is a function that does not tell. Differentiable.
    Raises ModelError if the model does not call its output head once on all hidden states.
    """
    predicting = torch.zeros_like(wanted)
    predicting[:, :-1] = wanted[:, 1:]
    with _head_at(output_head(model) if head is None else head, predicting):
        logits = model(**inputs, use_cache=False, return_dict=True).logits
    n_wanted = int(predicting.sum())
    if logits.shape[-2] != n_wanted:
        raise ModelError("this model does not take logits at chosen positions; please report it")
    result: Tensor = logits.reshape(n_wanted, logits.shape[-1]).float()
    return result


def token_nll(logits: Float32[Tensor, "N V"], targets: Int64[Tensor, " N"]) -> Float32[Tensor, " N"]:
    """Negative log-probability of each target, in nats: logsumexp minus the target's logit."""
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[:, None])[:, 0]


def output_head(model: PreTrainedModel | Callable[..., Any]) -> nn.Module:
    """The module that turns hidden states into logits. Raises ModelError if the model has none."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(model).__name__} has no output embeddings; is it a generative model?")
    return head


@contextmanager
def _head_at(head: nn.Module, positions: Bool[Tensor, "B T"]) -> Iterator[None]:
    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][positions], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        with float32_head(head):
            yield
    finally:
        handle.remove()


@contextmanager
def float32_head(head: nn.Module) -> Iterator[None]:
    """Let a linear `head` compute in float32 whatever its weights and its input are. Other heads are left alone."""
    if not isinstance(head, nn.Linear):
        yield
        return
    with replaced_forward(head, lambda states: _linear_float32(states, head.weight, head.bias)):
        yield


def _linear_float32(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.float()
    with torch.autocast(states.device.type, enabled=False):
        if states.is_cuda and states.dtype == weight.dtype != torch.float32 and not torch.is_grad_enabled():
            # A product of 16-bit numbers, summed and returned in float32; there is no such kernel on CPU.
            logits: Tensor = torch.mm(states.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            logits = logits.view(*states.shape[:-1], -1)
            return logits if bias is None else logits + bias
        return nn.functional.linear(states.float(), weight.float(), bias)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` run `forward` in place of its own. Hooks on the module run as ever."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
