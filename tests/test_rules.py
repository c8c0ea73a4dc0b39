"""The rules against naive references in plain Python, their invariants, and their independence of the pools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_scores import answers, naive, naive_tau, patient, percents, scored, token_gains
from visgain.config import SelectConfig
from visgain.errors import ConfigError, DataError
from visgain.rowset import RowSet
from visgain.rules import Answers, Choice, Pool, Rule, _Lottery, find_rule, kept_count, threshold


@dataclass(frozen=True)
class InMemory:
    """Scores that are read from a list of pools."""

    cut: Sequence[Pool]

    def values(self) -> list[np.ndarray]:
        return [pool.value for pool in self.cut]

    def rows(self) -> RowSet:
        rows = RowSet(1 + max(int(pool.row.max()) for pool in self.cut))
        for pool in self.cut:
            rows.add(pool.row)
        return rows

    def pools(self, purpose: str) -> Iterator[Pool]:
        return iter(self.cut)


def pool_of(gains: Sequence[Sequence[float]]) -> Pool:
    records = [scored(row, answer) for row, answer in enumerate(gains)]
    return Pool(
        row=np.arange(len(gains)),
        value=np.array([record.mean_gain for record in records]),
        length=np.array([len(answer) for answer in gains]),
        token_gain=np.concatenate([record.gain for record in records]),
        end_of_turn=np.zeros(sum(map(len, gains)), bool),
    )


def config(**options: Any) -> SelectConfig:
    return SelectConfig(scores=Path("scores"), out=Path("out"), **options)


def find(pool: Pool, **options: Any) -> Rule:
    return find_rule(InMemory([pool]), config(**options))


def choose(pool: Pool, **options: Any) -> Choice:
    return find(pool, **options).decide(pool)


# ---------------------------------------------------------------- the quantile rule


@pytest.mark.parametrize(
    ("n", "percent", "count"),
    [
        (10, 70, 7),
        (10, 70.0, 7),
        (10, 70.1, 8),
        (100, 7, 7),
        (100, 56.0, 56),
        (1000, 0.1, 1),
        (3, 0.01, 1),
        (7, 100, 7),
    ],
)
def test_the_number_kept_is_exact_in_decimals(n: int, percent: float, count: int) -> None:
    assert kept_count(n, percent) == count


@patient
@given(st.lists(token_gains, min_size=1), percents)
def test_tau_is_the_kth_largest_value(values: list[float], percent: float) -> None:
    assert threshold([np.array(values)], percent) == naive_tau(values, percent)


def test_ties_at_tau_are_kept() -> None:
    values = np.array([3.0, 1.0, 1.0, 1.0, 0.0])
    tau = threshold([values], 40)
    assert tau == 1.0
    assert (values >= tau).sum() == 4


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_values_that_cannot_be_ranked_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="values that are not finite"):
        threshold([np.zeros(3), np.array([1.0, value])], 50)
    with pytest.raises(DataError, match="nothing to rank"):
        threshold([np.zeros(0)], 50)


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan")])
def test_a_share_outside_of_0_to_100_is_refused(percent: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 100"):
        threshold([np.ones(3)], percent)


@patient
@given(answers, percents)
def test_sample_and_token_equals_the_naive_reference(gains: list[list[float]], percent: float) -> None:
    tau, kept = naive([scored(row, answer) for row, answer in enumerate(gains)], percent)
    pool = pool_of(gains)
    rule = find(pool, keep=percent)
    assert rule.tau == rule.token_tau == tau
    choice = rule.decide(pool)
    expected = [kept.get(row, [False] * len(answer)) for row, answer in enumerate(gains)]
    assert choice.active.tolist() == [active for answer in expected for active in answer]
    assert choice.chosen.tolist() == [row in kept for row in range(len(gains))]


@patient
@given(answers, percents, percents, st.sampled_from(["sample+token", "token"]))
def test_keep_tokens_equals_the_naive_reference(
    gains: list[list[float]], percent: float, of_tokens: float, by: str
) -> None:
    _, kept = naive([scored(row, answer) for row, answer in enumerate(gains)], percent)
    eligible = [row for row in range(len(gains)) if by == "token" or row in kept]
    tau = naive_tau([gain for row in eligible for gain in gains[row]], of_tokens)
    rule = find(pool_of(gains), keep=percent, keep_tokens=of_tokens, by=by)
    assert rule.token_tau == tau
    expected = [row in eligible and gain >= tau for row, answer in enumerate(gains) for gain in answer]
    assert rule.decide(pool_of(gains)).active.tolist() == expected


@patient
@given(answers, percents)
def test_a_kept_sample_always_keeps_a_token(gains: list[list[float]], percent: float) -> None:
    pool = pool_of(gains)
    choice = choose(pool, keep=percent)
    active = np.split(choice.active, np.cumsum(pool.length)[:-1])
    assert choice.chosen.any()
    assert [bool(tokens.any()) for tokens in active] == choice.chosen.tolist()


@pytest.mark.parametrize("by", ["sample+token", "sample", "token", "column:x"])
@patient
@given(gains=answers, percent=percents, more=percents)
def test_a_larger_share_keeps_a_superset(by: str, gains: list[list[float]], percent: float, more: float) -> None:
    pool = pool_of(gains)
    if by == "column:x":
        pool = replace(pool, value=pool.value[::-1].copy())
    few, many = (choose(pool, keep=keep, by=by) for keep in sorted([percent, more]))
    assert not (few.active & ~many.active).any()
    assert not (few.chosen & ~many.chosen).any()


def test_a_token_is_compared_with_tau_itself_and_not_with_its_float32() -> None:
    # The mean of the first sample lies between two float32 numbers and is rounded down to the token's gain.
    low, high = np.float32(1), np.nextafter(np.float32(1), np.float32(2))
    pool = pool_of([[low, low, high], [0.0]])
    rule = find(pool, keep=50)
    assert float(low) < rule.tau < float(high)
    assert rule.decide(pool).active.tolist() == [False, False, True, False]


# ---------------------------------------------------------------- random


@patient
@given(answers, percents, st.integers(0, 3))
def test_random_draws_equal_counts_or_everything_there_is(gains: list[list[float]], percent: float, seed: int) -> None:
    pool = pool_of(gains)
    paper = choose(pool, keep=percent)
    rule = find(pool, keep=percent, by="random", seed=seed)
    choice = rule.decide(pool)
    active = np.split(choice.active, np.cumsum(pool.length)[:-1])
    assert [bool(tokens.any()) for tokens in active] == choice.chosen.tolist()
    assert choice.chosen.sum() == paper.chosen.sum()
    assert rule.tokens_wanted == paper.active.sum()
    assert choice.active.sum() == min(paper.active.sum(), pool.length[choice.chosen].sum())


def test_random_does_not_cut_the_end_of_turn_tokens_that_are_always_kept() -> None:
    pool = replace(pool_of([[9.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), end_of_turn=np.array([0, 0, 1, 1, 1, 1], bool))
    rules = [find(pool, keep=33, by="random", end_of_turn="keep", seed=seed) for seed in range(20)]
    assert {int(rule.decide(pool).active.sum()) - (rule.tokens_wanted or 0) for rule in rules} == {0, 1}


def test_random_gives_a_row_its_token_even_where_ends_of_turn_alone_are_too_many() -> None:
    pool = pool_of([[9.0], [9.0], [0.0, 0.0, 0.0], [0.0] * 6])
    pool = replace(pool, end_of_turn=np.array([0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool))
    for seed in range(30):
        choice = choose(pool, keep=50, by="random", end_of_turn="keep", seed=seed)
        if choice.chosen.tolist() == [False, False, True, True]:
            assert choice.active[2:5].all()
            assert choice.active[5:].sum() == 1
            return
    pytest.fail("no seed drew the rows that this test is about")


def test_random_is_fixed_by_its_seed_and_favours_nobody() -> None:
    pool = pool_of([[float(row % 5 == 0)] * 4 for row in range(20)])
    draws = np.array([choose(pool, by="random", keep=20, seed=seed).active for seed in range(200)])
    again = choose(pool, by="random", keep=20, seed=3).active
    assert np.array_equal(draws[3], again)
    assert len(np.unique(draws, axis=0)) > 150
    share = draws.mean(axis=0)  # a fifth for each token: 4 standard deviations are 0.11
    assert share.min() > 0.09
    assert share.max() < 0.31


def test_random_tokens_inside_the_rows_favour_nobody() -> None:
    gains = [[1.0, -1.0, -1.0, -1.0, -1.0]] * 4  # all rows are kept, with one token; half the budget goes to the rest
    pool = replace(pool_of(gains), token_gain=np.array([1.0, 1.0, -1, -1, -1] * 4, np.float32))
    draws = np.array([choose(pool, by="random", keep=100, seed=seed).active for seed in range(250)])
    assert (draws.sum(axis=1) == 8).all()
    assert abs(draws.mean(axis=0) - 0.4).max() < 0.13


@patient
@given(answers, percents, st.integers(0, 1000))
def test_random_obeys_the_end_of_turn_option(gains: list[list[float]], percent: float, seed: int) -> None:
    pool = pool_of(gains)
    ends = np.random.default_rng(seed).random(len(pool.token_gain)) < 0.5
    pool = replace(pool, end_of_turn=ends)
    kept = choose(pool, keep=percent, by="random", end_of_turn="keep", seed=seed)
    assert kept.active[np.repeat(kept.chosen, pool.length) & ends].all()
    dropped = choose(pool, keep=percent, by="random", end_of_turn="drop", seed=seed)
    assert not dropped.active[ends].any()
    assert not dropped.active[~np.repeat(dropped.chosen, pool.length)].any()


def test_no_two_tokens_have_the_same_ticket() -> None:
    rng = np.random.default_rng(0)
    row = np.concatenate([np.arange(3000), [2**39, 2**39 + 1]])
    length = np.concatenate([rng.integers(1, 300, 3000), [5000, 1]])
    some = Answers(row=row, length=length, end_of_turn=np.zeros(length.sum(), bool))
    tickets = _Lottery(seed=1, keeps_ends=False, last_row=np.uint64(2**64 - 1)).token_tickets(some)
    assert len(np.unique(tickets)) == len(tickets) == length.sum() - len(length)  # all but the first of each row


# ---------------------------------------------------------------- pools


@patient
@given(
    gains=answers,
    options=st.sampled_from(
        [
            {},
            {"by": "sample"},
            {"by": "token"},
            {"by": "token", "keep_tokens": 30},
            {"keep_tokens": 30},
            {"by": "random"},
        ]
    ),
    end_of_turn=st.sampled_from(["select", "keep", "drop"]),
    percent=percents,
    seed=st.integers(0, 2**20),
)
def test_a_rule_decides_the_same_however_the_samples_are_cut_into_pools_and_in_any_order(
    gains: list[list[float]], options: dict[str, Any], end_of_turn: str, percent: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pool = pool_of(gains)
    if end_of_turn != "select":
        pool = replace(pool, end_of_turn=rng.random(len(pool.token_gain)) < 0.4)
    options = {**options, "end_of_turn": end_of_turn, "keep": percent}
    whole = choose(pool, **options)
    cut = [part(pool, rows) for rows in np.array_split(rng.permutation(len(gains)), 1 + rng.integers(4))]
    rule = find_rule(InMemory([some for some in cut if len(some.row)]), config(**options))
    first = np.cumsum(pool.length) - pool.length
    for some in cut:
        choice = rule.decide(some)
        assert choice.chosen.tolist() == whole.chosen[some.row].tolist()
        expected = [whole.active[first[row] : first[row] + pool.length[row]] for row in some.row]
        assert choice.active.tolist() == [token for tokens in expected for token in tokens.tolist()]


def part(pool: Pool, rows: np.ndarray) -> Pool:
    """The samples at the places `rows`."""
    bounds = np.cumsum(pool.length)[:-1]

    def tokens(values: np.ndarray) -> np.ndarray:
        pieces = np.split(values, bounds)
        return np.concatenate([values[:0], *(pieces[row] for row in rows)])

    return Pool(
        row=pool.row[rows],
        value=pool.value[rows],
        length=pool.length[rows],
        token_gain=tokens(pool.token_gain),
        end_of_turn=tokens(pool.end_of_turn),
    )
