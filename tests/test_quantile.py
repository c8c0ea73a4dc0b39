"""Order statistics and quantiles against sorting in memory, for every dtype, with ties, and however they are cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tiny_scores import patient
from visgain import quantile
from visgain.quantile import Passes, median, order_statistics, quantiles

few = st.sampled_from([-3.0, -0.0, 0.0, 0.25, 0.2500001, 7.0])
numbers = st.one_of(
    arrays.arrays(np.float64, st.integers(1, 60), elements=few),
    arrays.arrays(np.float64, st.integers(1, 60), elements=st.floats(allow_nan=False)),
    arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(allow_nan=False, width=32)),
    arrays.arrays(np.uint64, st.integers(1, 60), elements=st.integers(0, 2**64 - 1) | st.integers(0, 3)),
)
small = pytest.mark.parametrize("collected", [0, 3, 1 << 21])


@small
@patient
@given(numbers, st.integers(1, 4))
def test_every_rank_equals_sorting(collected: int, values: np.ndarray, n_chunks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantile, "COLLECTED", collected)
        found = order_statistics(np.array_split(values, n_chunks), lambda n: range(n))
    assert found.dtype == values.dtype
    assert np.array_equal(found, np.sort(values))


@small
@patient
@given(
    arrays.arrays(np.float64, st.integers(1, 60), elements=few | st.floats(-1e6, 1e6)),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
def test_quantiles_and_the_median_are_numpys_own(collected: int, values: np.ndarray, shares: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantile, "COLLECTED", collected)
        assert np.array_equal(quantiles([values[:1], values[1:]], shares), np.quantile(values, shares))
        assert median([values]) == np.median(values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_has_no_sign(dtype: type) -> None:
    found = order_statistics([np.array([-0.0, 0.0, -1.0, -0.0], dtype)], lambda n: range(n))
    assert np.signbit(found).tolist() == [True, False, False, False]


def test_many_numbers_need_few_passes() -> None:
    values = np.random.default_rng(0).normal(0.2, 0.7, 3_000_000)
    passes = 0

    def chunks() -> Iterator[np.ndarray]:
        nonlocal passes
        passes += 1
        yield from np.array_split(values, 7)

    found = order_statistics(Passes(chunks), lambda n: [n // 3, n // 2])
    assert found.tolist() == np.partition(values, [1_000_000, 1_500_000])[[1_000_000, 1_500_000]].tolist()
    assert passes == 2


def test_ranks_are_asked_for_once_with_the_count_and_never_without_numbers() -> None:
    asked: list[int] = []

    def ranks(n: int) -> list[int]:
        asked.append(n)
        return [0, n - 1]

    assert order_statistics([np.zeros(0), np.ones(3), np.full(2, -1.0)], ranks).tolist() == [-1, 1]
    assert len(order_statistics([np.zeros(0)], ranks)) == len(order_statistics([], ranks)) == 0
    assert asked == [5]
