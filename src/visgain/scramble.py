"""Random numbers that belong to an integer and not to a place in a sequence: the same in any order, and in any part."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt64


def scrambled(numbers: UInt64[np.ndarray, "..."], key: UInt64[np.ndarray, " k"]) -> UInt64[np.ndarray, "..."]:
    """Each number under a random permutation of the 64-bit integers that `key` chooses: different ones stay different.

    One round for each word of the key: exclusive or with the word, then the finalizer of MurmurHash3 (A. Appleby,
    public domain), after which every bit depends on every bit. Two rounds look random; one is enough for a checksum.
    """
    numbers = numbers.copy()
    for word in key:
        numbers ^= word
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            numbers ^= numbers >> np.uint64(33)
            numbers *= np.uint64(factor)
        numbers ^= numbers >> np.uint64(33)
    return numbers


def random_key(*seed: int) -> UInt64[np.ndarray, " 2"]:
    """A key for `scrambled`: another one for every sequence of non-negative integers."""
    return np.random.SeedSequence(seed).generate_state(2, np.uint64)
