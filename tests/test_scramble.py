"""Random numbers of integers: distinct, uniform, and different for every key."""

from __future__ import annotations

import numpy as np

from visgain.scramble import random_key, scrambled

NUMBERS = np.concatenate([np.arange(100_000), np.arange(100_000) << 24, np.arange(100_000) << 44]).astype(np.uint64)


def test_different_numbers_stay_different_and_each_bit_is_a_coin() -> None:
    numbers = np.unique(NUMBERS)
    tickets = scrambled(numbers, random_key(0))
    assert len(np.unique(tickets)) == len(numbers)
    for some in (scrambled(NUMBERS[start : start + 100_000], random_key(7)) for start in range(0, 300_000, 100_000)):
        shares = [float((some >> np.uint64(bit) & np.uint64(1)).mean()) for bit in range(64)]
        assert max(abs(share - 0.5) for share in shares) < 0.007  # 4.4 standard deviations


def test_keys_give_unrelated_numbers() -> None:
    numbers = np.arange(50_000, dtype=np.uint64)
    tickets = [scrambled(numbers, random_key(*seed)).astype(float) for seed in ((0,), (1,), (0, 1), (2**40,))]
    correlations = np.corrcoef([numbers.astype(float), *tickets])[np.triu_indices(5, 1)]
    assert abs(correlations).max() < 0.02


def test_a_number_has_the_same_ticket_alone_and_among_others() -> None:
    key = random_key(3)
    assert scrambled(NUMBERS, key)[5:6] == scrambled(NUMBERS[5:6], key)
    assert NUMBERS[1] == 1  # and its argument is left as it was
