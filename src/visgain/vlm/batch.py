"""Encoded samples side by side, as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from visgain.errors import ModelError
from visgain.types import Encoded
from visgain.vlm.encode import PER_TOKEN_INPUTS


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`inputs` go to the model's forward; B samples padded to T tokens on the right (on the left for prompts)."""

    inputs: dict[str, Any]
    is_answer: Bool[Tensor, "B T"]

    def to(self, device: torch.device) -> Batch:
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return Batch(inputs=inputs, is_answer=self.is_answer.to(device))


def signature(encoded: Encoded) -> tuple[Any, ...]:
    """Samples can share a batch only if their signatures are equal: same inputs, same shape of a picture."""
    return tuple(
        (name, tuple(value.shape[2 if name in PER_TOKEN_INPUTS else 1 :]))
        for name, value in sorted(encoded.model_inputs.items())
        if isinstance(value, Tensor)
    )


def pad_batch(samples: Sequence[Encoded], pad_id: int, *, side: str = "right") -> Batch:
    """Pad `samples` to the longest. Per-token inputs are padded with 0, the others concatenated.

    Right padding leaves every real token's attention and position as if it were alone. Raises ModelError if the samples
    have pictures that the model takes in different shapes (text-only samples go with any).
    """
    if len({signature(sample) for sample in samples if sample.model_inputs}) > 1:
        raise ModelError("the pictures of these rows have different shapes for this model; use --micro-batch 1")
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(samples), length), dtype=torch.int64)
    is_answer = torch.zeros((len(samples), length), dtype=torch.bool)
    spans = []
    for row, sample in enumerate(samples):
        size = len(sample.input_ids)
        span = slice(0, size) if side == "right" else slice(length - size, length)
        spans.append(span)
        input_ids[row, span] = torch.from_numpy(sample.input_ids)
        attention_mask[row, span] = 1
        is_answer[row, span] = torch.from_numpy(sample.is_answer)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    for name in dict.fromkeys(name for sample in samples for name in sample.model_inputs):
        values = [sample.model_inputs.get(name) for sample in samples]
        known = [value for value in values if isinstance(value, Tensor)]
        if name in PER_TOKEN_INPUTS:
            padded = known[0].new_zeros((len(samples), length, *known[0].shape[2:]))
            for row, (value, span) in enumerate(zip(values, spans, strict=True)):
                if value is not None:
                    padded[row, span] = value[0]
            inputs[name] = padded
        else:
            inputs[name] = torch.cat(known)
    return Batch(inputs=inputs, is_answer=is_answer)
