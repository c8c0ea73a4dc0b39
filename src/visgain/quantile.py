"""Order statistics, quantiles and sums of more numbers than memory holds: exact, in a few passes over them.

Radix selection. Numbers are taken as unsigned integers of the same order. A histogram of their leading 16 bits tells
which bin each wanted rank falls into, the next pass looks at 16 bits more inside those bins, and once the bins hold few
numbers these are collected and sorted. So there are two or three passes over most data and never more than one for
every 16 bits, whatever the number of ties; memory is a histogram for each wanted rank, and what is collected.

Numbers come in chunks of one dtype (float64, float32 or uint64), without nan: an object that can be iterated once a
pass, such as a list of arrays or `Passes`. An iterator would be empty after the first pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float64

COLLECTED = 1 << 21
"""At most so many numbers are collected to be sorted."""

_DIGIT = 16  # bits that one pass adds

_Chunk = TypeVar("_Chunk")


class Passes(Generic[_Chunk]):
    """What `start()` iterates over, from the beginning for each pass."""

    def __init__(self, start: Callable[[], Iterator[_Chunk]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[_Chunk]:
        return self._start()


def order_statistics(chunks: Iterable[np.ndarray], ranks: Callable[[int], Sequence[int]]) -> np.ndarray:
    """The number of each of `ranks(n)`, n being how many there are and the smallest having rank 0; -0.0 is 0.0.

    Of the dtype of the chunks. Empty if there are no numbers; `ranks` is not asked then.
    """
    search = [(0, 0)]  # leading bits of each wanted number, and its rank among the numbers that share them
    known = 0  # bits
    while True:
        counts, dtype = _histograms(chunks, {bits for bits, _ in search}, known)
        if known == 0:
            n = int(counts[0].sum())
            search = [(0, rank) for rank in ranks(n)] if n else []
        search = [_one_digit_on(bits, rank, counts[bits]) for bits, rank in search]
        known += _DIGIT
        if known == 8 * dtype.itemsize:
            return _as_numbers([bits for bits, _ in search], dtype)
        held = sum(int(counts[bits >> _DIGIT][bits % (1 << _DIGIT)]) for bits in {bits for bits, _ in search})
        if held <= COLLECTED:
            return _as_numbers(_collected(chunks, search, known), dtype)


def quantiles(chunks: Iterable[np.ndarray], shares: Sequence[float]) -> Float64[np.ndarray, " shares"]:
    """What np.quantile gives for all numbers together: linear between the two nearest ranks. Needs one number."""
    at: list[float] = []

    def neighbours(n: int) -> list[int]:
        at.extend((n - 1) * share for share in shares)
        return [rank for place in at for rank in (int(place), min(int(place) + 1, n - 1))]

    pairs = order_statistics(chunks, neighbours).astype(np.float64).reshape(-1, 2)
    return np.array([np.quantile(pair, place - int(place)) for pair, place in zip(pairs, at, strict=True)])


def median(chunks: Iterable[np.ndarray]) -> float:
    """The middle number, or the mean of the two in the middle. Needs one number."""
    return float(np.mean(order_statistics(chunks, lambda n: [(n - 1) // 2, n // 2]), dtype=np.float64))


def exact_sum(chunks: Iterable[np.ndarray]) -> float:
    """The sum, rounded once at the end: the same for any order of the numbers and any cut into chunks."""
    return math.fsum(number for chunk in chunks for number in chunk.tolist())


# ---------------------------------------------------------------- numbers as bits


def _histograms(
    chunks: Iterable[np.ndarray], prefixes: Collection[int], known: int
) -> tuple[dict[int, np.ndarray], np.dtype]:
    """For each prefix of `known` bits: how many numbers go on with each digit, int64 [65536]; and their dtype."""
    counts = {prefix: np.zeros(1 << _DIGIT, np.int64) for prefix in prefixes}
    dtype = np.dtype(np.float64)
    for chunk in chunks:
        dtype, numbers = chunk.dtype, _as_bits(chunk)
        rest = 8 * dtype.itemsize - known
        for prefix, count in counts.items():
            inside = numbers[numbers >> rest == prefix] if known else numbers
            digit = (inside >> (rest - _DIGIT)).astype(np.int64) & ((1 << _DIGIT) - 1)
            count += np.bincount(digit, minlength=1 << _DIGIT)
    return counts, dtype


def _one_digit_on(bits: int, rank: int, count: np.ndarray) -> tuple[int, int]:
    """The prefix with the digit under which the rank falls, and the rank among the numbers that share it."""
    up_to = np.cumsum(count)
    digit = int(np.searchsorted(up_to, rank, side="right"))
    return (bits << _DIGIT) | digit, rank - int(up_to[digit] - count[digit])


def _collected(chunks: Iterable[np.ndarray], search: Sequence[tuple[int, int]], known: int) -> list[int]:
    """The bits of each number that is searched, from sorting all that share a prefix with one."""
    prefixes = sorted({bits for bits, _ in search})
    parts = []
    for chunk in chunks:
        numbers = _as_bits(chunk)
        leading = numbers >> (8 * chunk.dtype.itemsize - known)
        parts += [numbers[leading == prefix] for prefix in prefixes]
    held = np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    leading = held >> (8 * held.dtype.itemsize - known)
    first = np.searchsorted(leading, np.array(prefixes, held.dtype))
    start = dict(zip(prefixes, first.tolist(), strict=True))
    return [int(held[start[bits] + rank]) for bits, rank in search]


def _as_bits(numbers: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the numbers: floats gain a leading bit, negative ones are turned over."""
    if numbers.dtype.kind == "u":
        return numbers
    bits = (numbers + numbers.dtype.type(0)).view(f"u{numbers.dtype.itemsize}")  # adding 0 makes -0.0 a 0.0
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    negative = (bits.view(f"i{bits.itemsize}") >> (8 * bits.itemsize - 1)).view(bits.dtype)  # all ones, or all zeros
    turned: np.ndarray = bits ^ (negative | top)
    return turned


def _as_numbers(bits: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """What _as_bits was given."""
    held = np.array(bits, dtype=f"u{dtype.itemsize}")
    if dtype.kind == "u":
        return held
    top = held.dtype.type(1 << (8 * held.itemsize - 1))
    numbers: np.ndarray = np.where(held & top, held ^ top, ~held).view(dtype)
    return numbers
