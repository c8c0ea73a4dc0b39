"""Which rows an optimiser step takes, and which of them each rank computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

from visgain.scoring.claims import Rank

ALONE = Rank(number=0, world=1)


class Steps(Sampler[list[Any]]):
    """The rows of one rank, step by step: a batch sampler for a data loader whose batches are whole steps.

    An epoch is a permutation of all rows, the one that the vanilla Trainer draws from the same seed; each
    `batch_size` of it are a step, the last may be smaller. Every rank has an equal number of steps. Within a step the
    rows are dealt in bunches of `bunch` such that all ranks have about as many tokens to compute, by `estimate`, which
    need not be exact but must be the same on all ranks. Nothing that is computed depends on it but the time.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        *,
        seed: int,
        rank: Rank = ALONE,
        bunch: int = 1,
        estimate: Callable[[Any], float] = lambda row: 1.0,
    ) -> None:
        self.sampler = SeedableRandomSampler(range(n_rows), data_seed=seed)
        """Accelerate's data loaders tell it the epoch, and look for it under this name."""
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.rank = rank
        self.bunch = bunch
        self.estimate = estimate

    def __len__(self) -> int:
        return math.ceil(self.n_rows / self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        return map(self._share, self.steps())

    def steps(self) -> Iterator[Sequence[Any]]:
        """The rows of each step of an epoch, on all ranks together."""
        order = list(self.sampler)
        for start in range(0, self.n_rows, self.batch_size):
            yield order[start : start + self.batch_size]

    def _share(self, rows: Sequence[Any]) -> list[Any]:
        """Those of a step's rows that this rank computes, in the order of the step."""
        if self.rank.world == 1:
            return list(rows)
        bunches = [rows[start : start + self.bunch] for start in range(0, len(rows), self.bunch)]
        sizes = [sum(self.estimate(row) for row in bunch) for bunch in bunches]
        mine = dealt(sizes, self.rank.world)[self.rank.number]
        return [row for number in mine for row in bunches[number]]


def dealt(sizes: Sequence[float], world: int) -> list[list[int]]:
    """Numbers of the things of these sizes for each of `world` ranks, ascending.

    The largest goes first, to whoever has least so far.
    """
    hands: list[list[int]] = [[] for _ in range(world)]
    loads = [0.0] * world
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        rank = min(range(world), key=lambda rank: (loads[rank], len(hands[rank]), rank))
        hands[rank].append(number)
        loads[rank] += sizes[number]
    return [sorted(hand) for hand in hands]
