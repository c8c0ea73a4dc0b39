"""Encoded samples side by side, as a model takes them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from visgain.errors import ModelError
from visgain.types import Encoded
from visgain.vlm.encode import PER_TOKEN_INPUTS
from visgain.vlm.families import NUMBERED_INPUTS, PACKED_INPUTS


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

    def shape(name: str, value: Tensor) -> tuple[int, ...]:
        if name in _packed(encoded.model_inputs):
            return tuple(value.shape[1:-1])
        return tuple(value.shape[2 if name in PER_TOKEN_INPUTS else 1 :])

    inputs = {name: value for name, value in encoded.model_inputs.items() if isinstance(value, Tensor)}
    if not inputs.keys() - set(PER_TOKEN_INPUTS):
        return ()  # no picture
    return tuple((name, shape(name, value)) for name, value in sorted(inputs.items()))


def is_hidden(encoded: Encoded, image_token_id: int) -> Bool[np.ndarray, " T"]:
    """Which tokens no token may attend to: those of the pictures, where the sample is masked."""
    return np.asarray((encoded.input_ids == image_token_id) & encoded.masked)


def pad_batch(samples: Sequence[Encoded], pad_id: int, *, side: str = "right") -> Batch:
    """Pad `samples` to the longest. Per-token inputs are padded with 0, the others concatenated.

    Right padding leaves every real token's attention and position as if it were alone. Raises ModelError if the samples
    have pictures that the model takes in different shapes. Text-only samples go with any, unless the model sees by
    cross-attention: there a picture belongs to a row by its number.
    """
    if len({signature(sample) for sample in samples} - {()}) > 1:
        raise ModelError("the pictures of these rows have different shapes for this model; use --micro-batch 1")
    if 0 < sum("cross_attention_mask" in sample.model_inputs for sample in samples) < len(samples):
        raise ModelError("this model cannot take rows with pictures and rows without in one batch; use --micro-batch 1")
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
    for row, (sample, span) in enumerate(zip(samples, spans, strict=True)):
        for name in PER_TOKEN_INPUTS:
            if (value := sample.model_inputs.get(name)) is not None:
                padded = inputs.setdefault(name, value.new_zeros((len(samples), length, *value.shape[2:])))
                padded[row, span] = value[0]
    inputs |= concatenated([sample.model_inputs for sample in samples])
    return Batch(inputs=inputs, is_answer=is_answer)


def concatenated(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs that are not a value a token, of several samples one after the other."""
    result = {}
    for name in dict.fromkeys(name for inputs in samples for name in inputs if name not in PER_TOKEN_INPUTS):
        values = [inputs[name] for inputs in samples if isinstance(inputs.get(name), Tensor)]
        if name in NUMBERED_INPUTS:
            sizes = [inputs[NUMBERED_INPUTS[name]].shape[:2].numel() for inputs in samples if name in inputs]
            starts = itertools.accumulate(sizes[:-1], initial=0)
            values = [torch.where(value < 0, value, value + start) for value, start in zip(values, starts, strict=True)]
        packed = any(name in _packed(inputs) for inputs in samples)
        result[name] = torch.cat(values, dim=-1 if packed else 0)
    return result


def _packed(inputs: Mapping[str, Any]) -> set[str]:
    """Names of the inputs that hold all pictures in one row."""
    return {row for sizes, row in PACKED_INPUTS.items() if sizes in inputs}
