"""Judgements: what a judge, or a file of recorded reviews, said about each answer in each run.

On disk JSON lines `{benchmark, split, id, run, judgement, attempts, meta}`, written when all are there. They are joined
to questions by split and id, and know by a hash which answer they are about.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from visgain.errors import DataError, JudgeError
from visgain.evaluation.answers import joined
from visgain.evaluation.benchmark import JudgedBenchmark, Question
from visgain.evaluation.records import Record, read_records
from visgain.storage import atomic_path

READABLE = 98
"""Percent of a judge's replies that must be readable for a score to mean something."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the judge said about one answer in one run."""

    benchmark: str
    split: str
    id: str
    run: int  # from 1
    judgement: str
    attempts: int = 1  # requests until the reply could be read, or patience was over
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.split, self.id

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def replayed(
    benchmark: JudgedBenchmark, questions: Sequence[Question], predictions: Sequence[str], paths: Sequence[Path]
) -> list[Judgement]:
    """Recorded judgements, in our format or the benchmark's own; runs are counted on from file to file."""
    found: list[Judgement] = []
    for path in paths:
        runs = max((judgement.run for judgement in found), default=0)
        found += _recorded(benchmark, questions, path, runs)
    by_run = _by_run(questions, predictions, found, ", ".join(map(str, paths)))
    return [
        replace(judgement, meta={**judgement.meta, "answer": short_hash(said)})  # from here on they belong together
        for judgements in by_run
        for judgement, said in zip(judgements, predictions, strict=True)
    ]


def judged(
    questions: Sequence[Question], predictions: Sequence[str], judgements: Sequence[Judgement]
) -> list[tuple[str, ...]]:
    """What was said about each prediction, in the order of the runs: `Item.judgements`.

    Raises DataError if a judgement is missing, there twice, of no question, or of another answer than the prediction.
    """
    by_run = _by_run(questions, predictions, judgements, "the file")
    return [tuple(judgement.judgement for judgement in runs) for runs in zip(*by_run, strict=True)]


def require_readable(unparsed: int, replies: int) -> None:
    """Raises JudgeError if so many of a judge's replies could not be read that a score would mislead."""
    if unparsed * 100 > replies * (100 - READABLE):
        raise JudgeError(
            f"{unparsed} of the judge's {replies} replies hold no grade that the protocol can read, more than "
            f"{100 - READABLE} %; look at them in judgements.jsonl, take another judge or --judge-prompt, or --force"
        )


def summary(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """For metrics.json: who judged with which words, how many runs, and what it took."""

    def counted(name: str) -> dict[str, int]:
        return dict(Counter(str(one.meta[name]) for one in judgements if one.meta.get(name)))

    return {
        "judge": " + ".join(counted("judge")),
        "models": counted("model"),
        "prompt": " + ".join(counted("prompt")),
        "runs": max((one.run for one in judgements), default=0),
        "requests": sum(one.attempts for one in judgements),
        "finish": counted("finish"),
        "changed": counted("changed"),
    }


# ---------------------------------------------------------------- files


def write_judgements(path: Path, judgements: Sequence[Judgement]) -> None:
    """Write all of them, or nothing. Raises StorageError."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(judgement.line() for judgement in judgements)


def read_judgements(path: Path, benchmark: str) -> list[Judgement]:
    """The judgements in a file of ours. Raises DataError that names the line if one is malformed."""
    return [_judgement(record, benchmark) for record in read_records(path)]


def _judgement(record: Record, benchmark: str) -> Judgement:
    fields = {"split": "", "run": 1, "attempts": 1, "meta": {}, "benchmark": benchmark, **record.fields}
    if fields["benchmark"] != benchmark:
        raise record.wrong("benchmark", repr(benchmark))
    for name in ("run", "attempts"):
        if not isinstance(fields[name], int) or isinstance(fields[name], bool) or fields[name] < 1:
            raise record.wrong(name, "a positive whole number")
    if not isinstance(fields["split"], str):
        raise record.wrong("split", "a string")
    if not isinstance(fields["meta"], dict):
        raise record.wrong("meta", "an object")
    return Judgement(
        benchmark=benchmark,
        split=fields["split"],
        id=record.id("id"),
        run=fields["run"],
        judgement=record.text("judgement"),
        attempts=fields["attempts"],
        meta=fields["meta"],
    )


def _recorded(benchmark: JudgedBenchmark, questions: Sequence[Question], path: Path, before: int) -> list[Judgement]:
    """The judgements in one file; its runs are counted on from `before`."""
    if _is_ours(path):
        ours = read_judgements(path, benchmark.name)
        return [replace(one, run=one.run + before) for one in ours]
    meta = {"judge": f"recorded in {path.name}"}
    return [
        Judgement(benchmark=benchmark.name, split=split, id=name, run=before + run, judgement=text, meta=meta)
        for (split, name), texts in benchmark.reviews(path, questions).items()
        for run, text in enumerate(texts, start=1)
    ]


def _is_ours(path: Path) -> bool:
    """Whether the first line is a judgement as we write them."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        try:
            first = json.loads(file.readline())
        except (ValueError, RecursionError):
            return False
    return isinstance(first, dict) and "judgement" in first


def _by_run(
    questions: Sequence[Question], predictions: Sequence[str], judgements: Sequence[Judgement], where: str
) -> list[list[Judgement]]:
    """The judgements of each run in the order of `questions`. Raises DataError."""
    runs = sorted({judgement.run for judgement in judgements})
    if not runs:
        raise DataError(f"{where} holds no judgements")
    by_run = [
        joined(questions, [one for one in judgements if one.run == run], f"judgements of run {run} in {where}")
        for run in runs
    ]
    for ordered in by_run:
        for judgement, said in zip(ordered, predictions, strict=True):
            if judgement.meta.get("answer", short_hash(said)) != short_hash(said):
                raise DataError(
                    f"the judgement of {judgement.id} in {where} is of another answer than the one there is now; run "
                    "the stage `judge` again"
                )
    return by_run


def short_hash(text: str) -> str:
    """What tells texts apart in files."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
