"""How many threads to compute with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from visgain.vlm.load import VLM

SMALL_MODEL = 10_000_000
"""Parameters. On two cores the embedded model (1.7M) scored 92 rows/s with one thread and 27 with two."""


def n_threads(vlm: VLM) -> int:
    """Threads to compute with: those of a small model on a CPU wait more than they work."""
    small = vlm.device.type == "cpu" and vlm.model.num_parameters() < SMALL_MODEL
    return 1 if small else torch.get_num_threads()


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Use that many threads of torch until the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
