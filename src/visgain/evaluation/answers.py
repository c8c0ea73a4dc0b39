"""Answers on disk: JSON lines `{benchmark, split, id, prediction, meta}`, joined to their questions by split and id.

Answers are never matched by their position: a missing line would shift all that follow.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from visgain.errors import DataError
from visgain.evaluation.benchmark import Question

SHOWN = 10
"""Ids that an error message lists."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    benchmark: str
    split: str
    id: str
    prediction: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.split, self.id

    def line(self) -> str:
        fields = {"benchmark": self.benchmark, "split": self.split, "id": self.id, "prediction": self.prediction}
        return json.dumps({**fields, "meta": dict(self.meta)}, ensure_ascii=False) + "\n"


@runtime_checkable
class Keyed(Protocol):
    """What belongs to a question."""

    @property
    def key(self) -> tuple[str, str]: ...


K = TypeVar("K", bound=Keyed)


def read_answers(path: Path, benchmark: str, *, cut_last: bool = False) -> list[Answer]:
    """The answers in a JSONL file. Raises DataError that names the line if one is malformed or of another benchmark.

    cut_last: leave out a last line without its end, as an interruption leaves it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read answers {path}: {error}") from error
    lines = text.split("\n")
    if cut_last:
        lines = lines[:-1]  # what stands after the last line break
    return [_answer(path, n, line, benchmark) for n, line in enumerate(lines, start=1) if line.strip()]


def _answer(path: Path, number: int, line: str, benchmark: str) -> Answer:
    where = f"line {number} of {path}"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{where} is no JSON object")
    for name in ("id", "prediction"):
        if name not in fields:
            raise DataError(f"{where} has no {name!r}; an answer is {{benchmark, split, id, prediction, meta}}")
    said, split, meta = fields["prediction"], fields.get("split", ""), fields.get("meta", {})
    if not isinstance(said, str):
        raise DataError(f"{where}: the prediction is {json.dumps(said)[:40]}, not a string")
    require_unicode(said, f"{where}: the prediction")
    if not isinstance(fields["id"], str | int) or isinstance(fields["id"], bool):
        raise DataError(f"{where}: the id is {json.dumps(fields['id'])[:40]}, not a string or a whole number")
    if not isinstance(split, str) or not isinstance(meta, dict):
        raise DataError(f"{where}: 'split' must be a string and 'meta' an object")
    if fields.get("benchmark", benchmark) != benchmark:
        raise DataError(f"{where} answers {fields['benchmark']!r}, not {benchmark!r}")
    return Answer(benchmark=benchmark, split=split, id=str(fields["id"]), prediction=said, meta=meta)


def require_unicode(text: str, what: str) -> None:
    """Raises DataError if `text` cannot be written to a file: JSON may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} is not valid Unicode; it has half of a surrogate pair") from None


def joined(questions: Sequence[Question], answers: Iterable[K], what: str = "answers") -> list[K]:
    """The answer to each question, in their order. Raises DataError with a list if any is missing, extra or twice."""
    answers = list(answers)
    found = {answer.key: answer for answer in answers}
    wanted = {question.key for question in questions}
    problems = {
        "missing": [question.key for question in questions if question.key not in found],
        "of no question": [key for key in found if key not in wanted],
        "there more than once": [key for key, n in Counter(a.key for a in answers).items() if n > 1],
    }
    told = [f"{len(keys)} {problem} ({_listed(keys)})" for problem, keys in problems.items() if keys]
    if told:
        raise DataError(f"the {what} do not fit the {len(questions)} questions: {'; '.join(told)}")
    return [found[question.key] for question in questions]


def _listed(keys: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(f"{split}/{name}" if split else name for split, name in keys[:SHOWN])
    return shown + (", ..." if len(keys) > SHOWN else "")
