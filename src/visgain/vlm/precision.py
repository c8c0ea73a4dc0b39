"""The same model in float32 for a while, to look at its numbers without the rounding of 16 bits."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel


def can_widen(model: PreTrainedModel) -> bool:
    """Whether `model` has weights of 16 bits, and there is memory for twice as many bits with room to work in."""
    size = sum(tensor.nbytes for tensor in _narrow(model))
    return 0 < 2 * size < _free_bytes(torch.device(model.device))


@contextmanager
def widened(model: PreTrainedModel) -> Iterator[None]:
    """Let the weights of 16 bits be float32 in this block, with the same values; afterwards they are as they were."""
    tensors = _narrow(model)
    before = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to(dtype)


def _narrow(model: PreTrainedModel) -> list[Tensor]:
    every = itertools.chain(model.parameters(), model.buffers())
    return [tensor for tensor in every if tensor.dtype in (torch.float16, torch.bfloat16)]


def _free_bytes(device: torch.device) -> int:
    """Free memory of `device`; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else 0
    except (OSError, ValueError):
        return 0
