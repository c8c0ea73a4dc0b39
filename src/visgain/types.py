"""The words of the project as types: what a sample is, what a model family makes of it, what is measured on it.

Frozen, keyword-only, and without behaviour beyond derived properties. In shapes, `T` is the length of the encoded
sequence and `A` the number of its answer tokens. NLLs are float32 nats: gain is a small difference of nearly equal
numbers, and 16 bits are not enough to subtract in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_MARK = "<image>"
"""Where an image stands in a turn's text. Never part of an answer."""


@runtime_checkable
class ImageRef(Protocol):
    """An image that is opened only when it is needed."""

    @property
    def key(self) -> str:
        """Identity of the image inside its dataset: equal keys mean the same picture."""
        ...

    def hint(self) -> str | None:
        """What is probably the same for equal content under another key, and cheap to tell; None if nothing is."""
        ...

    def open(self) -> Image:
        """Decode to an upright RGB picture. Raises ImageError when that is impossible or unsafe."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of a dataset. The user turns hold exactly one IMAGE_MARK per image, in order."""

    row: int  # position in the dataset: the join key of every file we write
    id: str  # the dataset's own name for the row, as text; it may repeat
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()
    source: str = ""  # sub-dataset the row came from; reports are grouped by it

    @cached_property
    def fingerprint(self) -> int:
        """Signed 64-bit hash of the turns and the image keys: tells whether a dataset changed under a row number."""
        digest = hashlib.blake2b(digest_size=8)
        for turn in self.turns:
            digest.update(f"{turn.role}\0{turn.text}\0".encode("utf-8", "surrogatepass"))
        for image in self.images:
            digest.update(f"image\0{image.key}\0".encode("utf-8", "surrogatepass"))
        return int.from_bytes(digest.digest(), "little", signed=True)

    @property
    def answers(self) -> tuple[str, ...]:
        """The assistant's texts; `AnswerTokens.turn` and character offsets count in these."""
        return tuple(turn.text for turn in self.turns if turn.role == "assistant")


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that cannot be scored, with the reason that lands in `skipped.jsonl`."""

    row: int
    id: str
    reason: str
    source: str = ""
    fingerprint: int = 0
    n_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample as a model reads it. Answer tokens are in order; their k-th is the k-th True of `is_answer`."""

    input_ids: Int64[np.ndarray, " T"]
    is_answer: Bool[np.ndarray, " T"]  # answer tokens and each turn's end-of-turn token
    turn: Int32[np.ndarray, " A"]  # which answer of the sample the token belongs to, from 0
    chars: Int32[np.ndarray, "A 2"]  # [start, end) in that answer's text; end-of-turn is [len, len)
    n_image_tokens: int
    truncated: bool = False
    model_inputs: Mapping[str, Any] = field(default_factory=dict)  # pixel_values and whatever else the model takes
    masked: bool = False  # whether attention to its image tokens is cut

    @property
    def token_id(self) -> Int64[np.ndarray, " A"]:
        ids: np.ndarray = self.input_ids[self.is_answer]
        return ids

    @property
    def n_prompt_tokens(self) -> int:
        """Every token that is not an answer token, image tokens included."""
        return len(self.input_ids) - len(self.turn)


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """The measurement of one row. Text-only rows have token ids but no NLLs (both arrays empty).

    `nll_blind_image[k]`: blind to image k alone. Empty where it was not measured, and for text-only rows.
    """

    row: int
    id: str
    fingerprint: int
    source: str
    n_images: int
    n_image_tokens: int
    n_prompt_tokens: int
    truncated: bool
    token_id: Int32[np.ndarray, " A"]
    turn: Int32[np.ndarray, " A"]
    chars: Int32[np.ndarray, "A 2"]
    nll_seen: Float32[np.ndarray, " N"]  # N = A, or 0 for a text-only row
    nll_blind: Float32[np.ndarray, " N"]
    nll_blind_image: tuple[Float32[np.ndarray, " N"], ...] = ()

    @property
    def gain(self) -> Float32[np.ndarray, " N"]:
        """Visual Information Gain of each answer token, in nats: blind minus seen."""
        gain: np.ndarray = self.nll_blind - self.nll_seen
        return gain

    @property
    def mean_gain(self) -> float:
        """The sample's Visual Information Gain: the mean over its answer tokens (nan for a text-only row)."""
        return float(self.gain.mean(dtype=np.float64)) if len(self.nll_seen) else float("nan")

    @property
    def image_gain(self) -> tuple[float, ...]:
        """Gain of each image: the mean over all answer tokens of what it is to lose this image alone, in nats."""
        return tuple(float((blind - self.nll_seen).mean(dtype=np.float64)) for blind in self.nll_blind_image)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows and which of their answer tokens carry loss."""

    tau: float  # threshold on sample gain in nats; nan where the rule has none
    token_tau: float  # threshold on token gain in nats; nan where the rule has none
    keep_percent: float
    rows: Int64[np.ndarray, " R"]  # rows that keep at least one active token, ascending
    keep: tuple[Bool[np.ndarray, " _"], ...]  # one mask over answer tokens for each of `rows`
