"""The loss of selective training: cross-entropy on active tokens, reduced in one of two ways.

`global` divides the summed loss by the number of active tokens of the whole optimiser step, accumulation and devices
included, so that how a batch is cut up changes nothing. `micro-batch` averages within each micro-batch and then over
those, as LLaVA's original code does: a token in a micro-batch with few active tokens weighs more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Float32
from torch import Tensor, nn
from transformers import PreTrainedModel

from visgain.vlm.logits import answer_logits, token_nll


def active_nll(
    model: PreTrainedModel | nn.Module, inputs: Mapping[str, Any], active: Bool[Tensor, "B T"], head: nn.Module
) -> Float32[Tensor, " N"]:
    """NLL in nats of each active token (N in all). With no active token: empty, but still part of the graph."""
    targets = inputs["input_ids"][active]
    return token_nll(answer_logits(model, inputs, active, head=head), targets)


def reduce_loss(nll: Float32[Tensor, " N"], n_active: Tensor | int | None) -> Float32[Tensor, ""]:
    """Sum of `nll` divided by `n_active`, or by N when that is None.

    Without any active token the result is 0 with zero gradients, not nan: such a step is harmless.
    """
    divisor = nll.numel() if n_active is None else n_active
    return nll.sum() / max(int(divisor), 1)
