"""Blind faith in text: whom does a model believe, the picture or a text about it? Deng et al. 2025, arXiv 2503.02199.

Every question is asked with the picture alone, with the picture and a text that is right (`match`), wrong
(`corrupted`) or about something else (`irrelevant`), and with each text without the picture. Those are the splits:
`image`, `image+match`, `text_match`, ...

Data: rows `{question_id, question, answers, text_type, additional_info, image}`, one for each text, JSON lines or the
parquet files of dal-289/word_or_vision.

Normalised accuracy is that with picture and text by that with the picture alone. The text preference ratio is, among
questions where picture and text lead to different answers and the model with both gives one of them, the share of those
where it gives the text's, in percent. Two answers are the same if equal after `strip` and without a last full stop; the
variant `lowercase` is the repository's later notebook.

Accuracy: with ten answers of ten people, a third of those found in the reply, at most 1; else whether one is found. The
published accuracies need VQAv2's annotations.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from visgain.evaluation.benchmark import Item, Metric, Question, Scored, Weights, ratio
from visgain.evaluation.docvqa import distance
from visgain.evaluation.hub import files, local_copy
from visgain.evaluation.records import Record, field_named, read_records, unique
from visgain.types import ImageRef

TEXTS = ("corrupted", "match", "irrelevant")
TEMPLATE = (
    "Here are some additional information which are text descriptions based on the image to assist you for answering "
    "the later question. Note, the information could be irrelevant, missing some information or inaccurate, please use "
    "it with caution: {text}\n----------\n{question}"
)
SUFFIX = " Please only output the answer with a single word or phrase."
DOCVQA_SUFFIX = " Please only output the answer directly."

Outcome = Literal["img", "text", "same", "both", "neither", "undef"]
OUTCOMES: tuple[Outcome, ...] = ("img", "text", "same", "both", "neither", "undef")

_FILE = re.compile(r".*\.(jsonl|parquet)", re.IGNORECASE)


def original(answer: str) -> str:
    return answer.strip().removesuffix(".")


def lowercase(answer: str) -> str:
    return answer.lower().strip().rstrip(".")


_CLEAN: Mapping[str, Callable[[str], str]] = {"official": original, "lowercase": lowercase}


class BlindFaith:
    name = "blind_faith"
    source = "dal-289/word_or_vision on the hub"
    variants: Mapping[str, str] = {
        "official": "answers are compared without the last full stop",
        "lowercase": "answers are compared in lower case, without full stops at the end",
    }
    max_new_tokens = 64

    def questions(self, data: Path, image_root: Path | None) -> list[Question]:
        """Every question in every condition: of the file or folder `data`, or of dal-289/word_or_vision (VQAv2)."""
        data = local_copy(data, "dal-289/word_or_vision", ["*VQAv2*"], self.source)
        asked: dict[str, list[Question]] = {}
        for path in files(data, lambda name: bool(_FILE.fullmatch(name)), "JSON lines or parquet files"):
            suffix = DOCVQA_SUFFIX if "docvqa" in path.as_posix().lower() else SUFFIX
            for row in read_records(path):
                name = row.id("question_id")
                known = asked.setdefault(name, [])
                known += _questions(row, name, suffix, image_root or path.parent, is_first=not known)
        return unique([question for same in asked.values() for question in same], data)

    def score(self, items: Sequence[Item], variant: str) -> Scored:
        """Keys: `corrupted.norm`, `corrupted.tpr`, ... for each text, `image.accuracy`, ... for each condition."""
        accuracies = np.array([accuracy(item.prediction, item.question.facts["answers"]) for item in items])
        split = np.array([item.question.split for item in items], dtype=object)
        by_split = {
            name: ratio(accuracies * (split == name), split == name, scale=100)
            for name in ("image", *(f"{kind}{text}" for text in TEXTS for kind in ("image+", "text_")))
        }
        metrics: dict[str, Metric] = {}
        counts: dict[str, float] = {}
        for text in TEXTS:
            outcomes = np.array(_outcomes(items, text, _CLEAN[variant]), dtype=object)
            counts |= {f"{text}.{name}": int((outcomes == name).sum()) for name in OUTCOMES}
            chosen = (outcomes == "text") | (outcomes == "img")
            metrics[f"{text}.norm"] = _by(by_split[f"image+{text}"], by_split["image"])
            metrics[f"{text}.tpr"] = ratio(outcomes == "text", chosen, scale=100)
        return Scored(
            metrics=metrics | {f"{name}.accuracy": metric for name, metric in by_split.items()},
            counts=counts,
        )


def accuracy(said: str, answers: Sequence[str]) -> float:
    """The relaxed accuracy of one reply, 0 to 1: an answer counts if the reply holds it, whatever the case."""
    reply = said.strip().lower()
    found = sum(answer.strip().lower() in reply for answer in answers)
    return min(1.0, found / 3) if len(answers) == 10 else float(found > 0)


def preference(both: str, text: str, image: str) -> Outcome:
    """Whose answer the model gives that has `both`; if neither's, whether it is like both, neither or one of them."""
    if both == text:
        return "same" if both == image else "text"
    if both == image:
        return "img"
    alike = (similarity(both, text) > 0) + (similarity(both, image) > 0)
    return ("neither", "undef", "both")[alike]


def similarity(a: str, b: str) -> float:
    """1 if one holds the other, else one minus the edit distance by the longer one's length."""
    return 1.0 if a in b or b in a else 1 - distance(a, b) / max(len(a), len(b))


def _outcomes(items: Sequence[Item], text: str, clean: Callable[[str], str]) -> list[Outcome | None]:
    """At each question with picture and `text`, its outcome; None at all others, and where a condition is missing."""
    said = {item.question.key: clean(item.prediction) for item in items}
    outcomes: list[Outcome | None] = []
    for item in items:
        key = item.question.id
        alone, image = said.get((f"text_{text}", key)), said.get(("image", key))
        is_asked = item.question.split == f"image+{text}" and alone is not None and image is not None
        outcomes.append(preference(said[item.question.key], alone or "", image or "") if is_asked else None)
    return outcomes


def _by(above: Metric, below: Metric) -> Metric:
    def value(weights: Weights) -> float:
        base = below(weights)
        return above(weights) / base if base else float("nan")

    return value


def _questions(row: Record, name: str, suffix: str, root: Path, *, is_first: bool) -> list[Question]:
    """The question with picture and text, with the text alone, and before its first text with the picture alone."""
    kind = row.one_of("text_type", TEXTS)
    text = row.text(field_named(row, ("additional_info", "info", "context")))
    question = row.text("question").removesuffix(suffix) + suffix
    told = TEMPLATE.format(text=text, question=question)
    facts = {"answers": _answers(row), "text": row.text("question")}
    images = (row.image("image", root),)

    def asked(split: str, prompt: str, images: tuple[ImageRef, ...]) -> Question:
        return Question(id=name, split=split, prompt=prompt, images=images, facts=facts, cluster=name)

    alone = [asked("image", question, images)] if is_first else []
    return [*alone, asked(f"image+{kind}", told, images), asked(f"text_{kind}", told, ())]


def _answers(row: Record) -> list[str]:
    """One answer, a list of them, or a list written as Python does. Raises DataError."""
    value = row.fields.get(field_named(row, ("answers", "answer")))
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = [value]
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise row.wrong(field_named(row, ("answers", "answer")), "an answer or a list of answers")
    return answers
