"""What a benchmark is: questions read from the user's copy, and metrics of the answers.

A benchmark is one file: it says where to get the data, how a model is asked, and how replies are read and counted, to
the quirk. It never sees a model. Metrics are functions of weights over the items, so that the point estimate (all
weights 1) and the bootstrap (weights drawn) are the same few lines of the benchmark's own formula.

A new benchmark is an entry in `BENCHMARKS`, or an entry point in the group `visgain.benchmarks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from visgain.errors import DataError
from visgain.registry import Registry
from visgain.types import ImageRef

Weights = Float64[np.ndarray, " n"]
Metric = Callable[[Weights], float]
"""Value for given weights of the items, in the unit of the published tables; nan where it is undefined."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing that a model is asked."""

    id: str  # unique in its split
    split: str = ""
    prompt: str  # as the protocol words it, without marks for images, which stand in front
    images: tuple[ImageRef, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # what scoring needs: label, choices, references, ...
    cluster: str = ""  # questions of equal clusters are drawn together by the bootstrap; the own id where it is empty

    @property
    def key(self) -> tuple[str, str]:
        return self.split, self.id


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question with what the model said, and what a judge said about that, where one is asked."""

    question: Question
    prediction: str
    judgements: tuple[str, ...] = ()  # one for each run of the judge


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A benchmark's metrics over n items, and how many replies (of all runs of a judge) the protocol cannot read."""

    metrics: Mapping[str, Metric]  # the headline first
    unparsed: int = 0
    counts: Mapping[str, float] = field(default_factory=dict)  # further plain numbers: sizes, confusion counts
    notes: Mapping[str, str] = field(default_factory=dict)  # what a number must be told with: the data's release, ...


@runtime_checkable
class Benchmark(Protocol):
    """One benchmark. Instances hold no data."""

    name: str
    source: str  # where the data is to be had, in one line
    variants: Mapping[str, str]  # parser or protocol variant -> what it is; the first one is the official one
    max_new_tokens: int

    def questions(self, data: Path, image_root: Path | None) -> list[Question]:
        """Read the official files at `data`, a file or a folder. Raises DataError: what is missing or wrong."""
        ...

    def score(self, items: Sequence[Item], variant: str) -> Scored:
        """Metrics of all questions, each of which stands in `items` once, in the order of `questions`."""
        ...


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One message to a judge. `retry` is asked instead, with growing temperature, where a reply cannot be read."""

    user: str
    system: str = ""
    temperature: float = 0.0
    max_tokens: int | None = 1024  # None: as long as the judge likes
    retry: str | None = None


@runtime_checkable
class JudgedBenchmark(Benchmark, Protocol):
    """A benchmark whose replies are graded by a language model."""

    def request(self, question: Question, prediction: str, prompt: str | None) -> JudgeRequest:
        """What the judge is asked; `prompt` is the user's text in place of ours. Raises ConfigError if it is wrong."""
        ...

    def is_readable(self, judgement: str) -> bool:
        """Whether the protocol finds a grade in the judge's reply."""
        ...

    def reviews(self, path: Path, questions: Sequence[Question]) -> dict[tuple[str, str], tuple[str, ...]]:
        """Recorded replies in the official file format: those of each question, by its key. Raises DataError."""
        ...


BENCHMARKS: Registry[Callable[[], Benchmark]] = Registry(
    "benchmark",
    {
        "blind_faith": "visgain.evaluation.blind_faith:BlindFaith",
        "chair": "visgain.evaluation.chair:Chair",
        "cvbench": "visgain.evaluation.cvbench:CVBench",
        "docvqa": "visgain.evaluation.docvqa:DocVQA",
        "llava_bench_wild": "visgain.evaluation.llava_bench:LlavaBench",
        "mmbench": "visgain.evaluation.mmbench:MMBench",
        "mmhal": "visgain.evaluation.mmhal:MMHal",
        "mmvet": "visgain.evaluation.mmvet:MMVet",
        "pope": "visgain.evaluation.pope:Pope",
    },
)


def judge_runs(items: Sequence[Item]) -> int:
    """How many runs of a judge there are, the same number for each item. Raises DataError."""
    runs = sorted({len(item.judgements) for item in items})
    if runs in ([], [0]):
        raise DataError("no judgements to score: run the stage `judge` first")
    if len(runs) > 1:
        raise DataError(f"some answers were judged {runs[0]} times and others {runs[-1]} times; judge all in each run")
    return runs[0]


def mean(values: Float64[np.ndarray, " n"] | Sequence[float], *, scale: float = 1.0) -> Metric:
    """The weighted mean of `values`, times `scale`."""
    numbers = np.asarray(values, np.float64)
    return ratio(numbers, np.ones(len(numbers)), scale=scale)


def ratio(above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, *, scale: float = 1.0) -> Metric:
    """Weighted sum of `above` by that of `below`, times `scale`; nan where the latter is 0."""
    numerator, denominator = np.asarray(above, np.float64), np.asarray(below, np.float64)

    def value(weights: Weights) -> float:
        total = float(weights @ denominator)
        return scale * float(weights @ numerator) / total if total else float("nan")

    return value


def average(metrics: Sequence[Metric]) -> Metric:
    """The plain mean of metrics, e.g. over splits."""
    return lambda weights: float(np.mean([metric(weights) for metric in metrics]))
