"""Which words and which tokens gain most from the image, on average."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Integer

END_OF_TURN = "end of turn"

_WORD = re.compile(r"\w(?:\S*\w)?")  # what whitespace delimits, less the punctuation around it


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean gain of one word or token over all its occurrences."""

    label: str
    mean: float  # nats
    count: int


@dataclass(kw_only=True)
class Tally:
    """Sums of gains by label."""

    total: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    count: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, occurrences: Iterable[tuple[str, float]]) -> None:
        for label, gain in occurrences:
            self.total[label] += gain
            self.count[label] += 1

    def means(self, min_count: int) -> list[Mean]:
        """Labels that occur at least `min_count` times, highest mean first, ties by label."""
        counted = ((label, count) for label, count in self.count.items() if count >= min_count)
        means = [Mean(label=label, mean=self.total[label] / count, count=count) for label, count in counted]
        return sorted(means, key=lambda item: (-item.mean, item.label))

    @property
    def n_occurrences(self) -> int:
        return sum(self.count.values())


def min_count(n_occurrences: int) -> int:
    """How often a label must occur for its mean to be shown: grows with the root of the data, 11 for 20,000 words."""
    return max(1, round(math.sqrt(n_occurrences) / 12.5))


def extremes(means: Sequence[Mean], count: int) -> tuple[list[Mean], list[Mean]]:
    """The `count` highest (falling) and the `count` lowest (rising) of sorted means, no label in both."""
    count = min(count, (len(means) + 1) // 2)
    return list(means[:count]), list(reversed(means[max(count, len(means) - count) :]))


def word_gains(
    text: str, chars: Integer[np.ndarray, "A 2"], gain: Float[np.ndarray, " A"]
) -> Iterator[tuple[str, float]]:
    """Each word of one answer, lower case, with the sum of the gains of the tokens that overlap it.

    `chars` and `gain` are the answer's tokens in order. Words that the tokens do not cover to the end (the answer was
    cut) are left out.
    """
    spans = [word.span() for word in _WORD.finditer(text)]
    for (start, end), value in span_gains(spans, chars, gain):
        yield text[start:end].lower(), value


def span_gains(
    spans: Sequence[tuple[int, int]], chars: Integer[np.ndarray, "A 2"], gain: Float[np.ndarray, " A"]
) -> Iterator[tuple[tuple[int, int], float]]:
    """Each span [start, end) of one answer's characters, with the sum of the gains of the tokens that overlap it.

    Spans that the tokens do not cover to the end are left out.
    """
    starts, ends = chars[:, 0], chars[:, 1]
    before = np.concatenate([[0.0], np.cumsum(gain, dtype=np.float64)])
    for start, end in spans:
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(starts, end, side="left"))
        if first < last and ends[last - 1] >= end:
            yield (start, end), float(before[last] - before[first])


def token_gains(
    text: str, chars: Integer[np.ndarray, "A 2"], gain: Float[np.ndarray, " A"]
) -> Iterator[tuple[str, float]]:
    """Each token of one answer, as its stripped text (END_OF_TURN after the end), with its gain."""
    for (start, end), value in zip(chars.tolist(), gain.tolist(), strict=True):
        if start < end:
            yield visible(text[start:end]), value
        elif start >= len(text):
            yield END_OF_TURN, value


def visible(token: str) -> str:
    """A token's text without the blanks around it; marks for one that is nothing but blanks."""
    return token.strip() or token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
