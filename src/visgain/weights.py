"""How much the loss of a kept token weighs: one, or as much as the picture helped it.

A weighting is a small frozen dataclass whose fields are its options, named in text like a counterfactual: `hard`, or
`clamp:low=1,high=5,window=3`. It says what every answer token weighs; the rule of selection then takes the weight of
those that it does not keep.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Int64

from visgain.errors import ConfigError
from visgain.registry import Registry, spec_of


class Weighting(ABC):
    """Weights of answer tokens. Subclasses are frozen dataclasses, so equal specs are equal."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, gain: Float32[np.ndarray, " t"], answer: Int64[np.ndarray, " t"]) -> Float32[np.ndarray, " t"]:
        """Weights above 0 of tokens with these gains, in nats; tokens with the same number `answer` stand side by side.

        The weights of an answer depend on its own tokens alone, to the last bit.
        """

    @property
    def spec(self) -> str:
        """The canonical text with the value of every option, which `parse_weights` reads back."""
        return spec_of(self.name, self)


@dataclass(frozen=True)
class Hard(Weighting):
    """Every kept token weighs the same: the mask alone."""

    name: ClassVar[str] = "hard"

    def __call__(self, gain: Float32[np.ndarray, " t"], answer: Int64[np.ndarray, " t"]) -> Float32[np.ndarray, " t"]:
        return np.ones(len(gain), np.float32)


@dataclass(frozen=True)
class Clamp(Weighting):
    """The gain cut to `low` to `high` nats, then the mean over `window` tokens in whose middle each one stands.

    The weights of Contrastive ALignment (CAL: Xiao et al. 2024, arXiv 2405.17871), whose published code has these very
    constants, and pools without padding as is done here. Three things differ. CAL clamps the difference of the token's
    logits, seen minus blind; the gain is that of its log-probabilities, so the change of the softmax's denominator is
    left out. CAL's blind condition is the counterfactual `mask`; here it is that of the scores. And CAL pools along the
    whole batch as one line: beside an answer's first and last token stand tokens of the prompt, of an image, or of the
    next row, each with the logit difference of token 0 in place of a label. Here the window ends where the answer does,
    and the mean is over the tokens that are there.
    """

    low: float = 1.0
    high: float = 5.0
    window: int = 3
    name: ClassVar[str] = "clamp"

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf:
            raise ConfigError(f"clamp: low is {self.low} and high {self.high}; 0 < low <= high must hold, in nats")
        if self.window < 1 or self.window % 2 == 0:
            raise ConfigError(f"clamp:window is {self.window}; it must be an odd number of tokens")

    def __call__(self, gain: Float32[np.ndarray, " t"], answer: Int64[np.ndarray, " t"]) -> Float32[np.ndarray, " t"]:
        clamped = np.clip(gain.astype(np.float64), self.low, self.high)
        total, count = clamped.copy(), np.ones(len(gain), np.int64)
        for distance in range(1, min(self.window // 2 + 1, len(gain))):
            # One distance after the other, so that the order of summation does not depend on what else there is.
            together = answer[distance:] == answer[:-distance]
            total[:-distance][together] += clamped[distance:][together]
            total[distance:][together] += clamped[:-distance][together]
            count[:-distance] += together
            count[distance:] += together
        return (total / count).astype(np.float32)


WEIGHTINGS: Registry[type[Weighting]] = Registry("weighting", {kind.name: kind for kind in (Hard, Clamp)})


def parse_weights(spec: str) -> Weighting:
    """The weighting that `name` or `name:key=value,key=value` says. Raises UnknownName or ConfigError."""
    made: Weighting = WEIGHTINGS.make(spec)
    return made


UNIT = 149
"""Every float32 is a whole number of 2**-149."""


def exact_sums(values: Float32[np.ndarray, " t"], group: Int64[np.ndarray, " t"]) -> dict[int, int]:
    """Group -> the sum of its values, finite and in units of 2**-UNIT: exact, so sums of parts can be added up."""
    fraction, exponent = np.frexp(values)
    whole = np.ldexp(fraction.astype(np.float64), 24)  # float32 has 24 bits, so this is a whole number
    kinds, kind = np.unique(group * 1024 + (exponent.astype(np.int64) + 512), return_inverse=True)
    sums: dict[int, int] = {}
    for name, total in zip(kinds.tolist(), np.bincount(kind, weights=whole).tolist(), strict=True):
        number, power = name // 1024, name % 1024 - 512 - 24 + UNIT
        scaled = int(total) << power if power >= 0 else int(total) >> -power  # what is shifted out is 0
        sums[number] = sums.get(number, 0) + scaled
    return sums
