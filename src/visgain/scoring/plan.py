"""Which rows make a part, and which samples make a batch. Pure arithmetic: no model, no files."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def plan_parts(n_rows: int, part_rows: int) -> list[range]:
    """Rows of each part. Part k of n holds rows k, k + n, k + 2n, ...

    Datasets are often ordered by source; strided parts are a fair sample of it, so the time left is a fair estimate and
    parts cost alike.
    """
    n_parts = max(1, -(-n_rows // part_rows))
    return [range(first, n_rows, n_parts) for first in range(n_parts)]


def plan_batches(lengths: Sequence[int], groups: Sequence[Hashable], batch_tokens: int) -> list[list[int]]:
    """Indices of the samples of each batch: equal group, similar length, at most `batch_tokens` padded tokens.

    Longest first, so that a batch too large for the memory fails at once and not after an hour. A sample longer than
    `batch_tokens` gets a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (_group_order(groups, i), -lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        batch = batches[-1] if batches else []
        fits = batch and groups[batch[0]] == groups[i] and lengths[batch[0]] * (len(batch) + 1) <= batch_tokens
        if fits:
            batch.append(i)
        else:
            batches.append([i])
    return sorted(batches, key=lambda batch: -lengths[batch[0]])


def _group_order(groups: Sequence[Hashable], i: int) -> int:
    """Position of the first sample of i's group: a stable order of groups that need not be comparable."""
    return groups.index(groups[i])
