"""Which rows a step takes and who computes them: the vanilla Trainer's steps, dealt fairly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.data_loader import DataLoaderShard, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from visgain.scoring.claims import Rank
from visgain.training.steps import Steps, dealt


def vanilla_steps(n_rows: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """What transformers' Trainer draws: torch's permutation, from the seed and the epoch."""
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return [order[start : start + batch_size] for start in range(0, n_rows, batch_size)]


def ranks(world: int, *args: int, **options) -> list[list[list[int]]]:
    """The steps of each rank."""
    return [list(Steps(*args, rank=Rank(number=number, world=world), **options)) for number in range(world)]


@settings(deadline=None)
@given(
    n_rows=st.integers(1, 60),
    batch_size=st.integers(1, 16),
    world=st.integers(1, 5),
    seed=st.integers(0, 9),
    bunch=st.integers(1, 4),
)
def test_ranks_together_take_the_steps_of_the_vanilla_trainer(
    n_rows: int, batch_size: int, world: int, seed: int, bunch: int
) -> None:
    expected = vanilla_steps(n_rows, batch_size, seed, 0)
    shares = ranks(world, n_rows, batch_size, seed=seed, bunch=bunch, estimate=lambda row: 1.0 + row % 7)
    assert {len(steps) for steps in shares} == {len(expected)}
    for number, step in enumerate(expected):
        mine = [share[number] for share in shares]
        assert sorted(row for rows in mine for row in rows) == sorted(step)
        bunches = {tuple(step[start : start + bunch]) for start in range(0, len(step), bunch)}
        for rows in mine:
            # Micro-batches stay whole and begin where a rank counts them to begin.
            assert {tuple(rows[start : start + bunch]) for start in range(0, len(rows), bunch)} <= bunches


@given(sizes=st.lists(st.floats(1, 1000), max_size=30), world=st.integers(1, 8))
def test_no_rank_has_more_than_another_by_more_than_one_thing(sizes: list[float], world: int) -> None:
    hands = dealt(sizes, world)
    assert sorted(number for hand in hands for number in hand) == list(range(len(sizes)))
    loads = [sum(sizes[number] for number in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    if len(sizes) >= world:
        assert all(hands)


def test_ranks_have_nearly_as_much_to_do_where_rows_differ_much() -> None:
    sizes = np.random.default_rng(0).lognormal(6, 1, 128).tolist()
    steps = ranks(8, 128, 128, seed=0, estimate=sizes.__getitem__)
    loads = [sum(sizes[row] for row in rows) for [rows] in steps]
    assert max(loads) / (sum(loads) / 8) < 1.02
    in_turn = [sum(sizes[row] for row in range(rank, 128, 8)) for rank in range(8)]
    assert max(in_turn) / (sum(in_turn) / 8) > 1.2, "the rows would not be balanced by themselves"


@pytest.mark.parametrize("skip", [0, 2])
def test_a_data_loader_tells_the_epoch_even_when_it_begins_in_its_middle(skip: int) -> None:
    loader = DataLoaderShard(range(10), batch_sampler=Steps(10, 3, seed=5), collate_fn=list)
    assert list(loader) == vanilla_steps(10, 3, 5, 0)
    later = skip_first_batches(loader, skip) if skip else loader
    later.set_epoch(3)
    assert list(later) == vanilla_steps(10, 3, 5, 3)[skip:]
