"""Ask a model about the world and grade it.

Accuracy: the share of questions whose reply contains the right word (and no other word of the same sort). Existence
questions are graded by the reply's first word; their yes-rate gives away a model that says what the text suggests.
Hallucination: of the objects named in captions, the share that is not in the picture (CHAIR's instance measure), and
the share of captions with at least one (its sentence measure).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visgain.data import open_dataset
from visgain.evaluation.generate import generate_answers
from visgain.types import Sample
from visgain.vlm.load import load_vlm
from visgain.vlm.template import make_encoder
from visgain.world.scene import COLOURS, HORIZONTAL, KINDS, SIZES, VERTICAL
from visgain.world.talk import NUMBERS, PLURAL

_SINGULAR = {plural: kind for kind, plural in PLURAL.items()} | {kind: kind for kind in KINDS}

SORTS: dict[str, frozenset[str]] = {
    "colour": frozenset(COLOURS),
    "size": frozenset(SIZES),
    "place": frozenset(VERTICAL) | frozenset(HORIZONTAL),
    "content": frozenset(KINDS),
    "count": frozenset(NUMBERS),
    "relation": frozenset(("left", "right", "above", "below")),
    "existence": frozenset(("yes", "no")),
}
"""The words that answer a question of each topic."""


@dataclass(frozen=True, kw_only=True)
class WorldMetrics:
    """All between 0 and 1. `questions` leaves captions out; yes-rates are over existence questions."""

    accuracy: float
    existence_accuracy: float
    yes_rate: float
    true_yes_rate: float
    hallucinated_objects: float
    captions_with_hallucination: float
    caption_recall: float
    accuracy_by_topic: dict[str, float]
    questions: int
    captions: int


def evaluate_world(model: str, world: Path, *, description: str = "evaluating", device: str = "auto") -> WorldMetrics:
    """Metrics of `model` on the split of the world at folder `world`."""
    dataset = open_dataset(world / "data.json")
    truth = [json.loads(line) for line in (world / "truth.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in range(len(dataset)) if truth[row]["things"]]
    samples = [sample for row in rows if isinstance(sample := dataset[row], Sample)]
    vlm = load_vlm(model, device=device)
    answers = generate_answers(vlm, make_encoder(vlm), samples, max_new_tokens=80, description=description)
    return grade([truth[row] for row in rows], answers)


def grade(truth: Sequence[dict[str, Any]], answers: Sequence[str]) -> WorldMetrics:
    """Grade the reply to the first question of each row of ground truth."""
    right: dict[str, list[bool]] = {}
    said_yes, is_yes = [], []
    named, wrong, captions, present, found = 0, 0, [], 0, 0
    for row, answer in zip(truth, answers, strict=True):
        topic, key = row["topics"][0], row["keys"][0]
        if topic == "caption":
            kinds = {thing["kind"] for thing in row["things"]}
            mentioned = caption_kinds(answer)
            invented = [kind for kind in mentioned if kind not in kinds]
            named, wrong = named + len(mentioned), wrong + len(invented)
            present, found = present + len(kinds), found + len(kinds & set(mentioned))
            captions.append(bool(invented))
        elif topic in SORTS:
            right.setdefault(topic, []).append(is_right(topic, key, answer))
            if topic == "existence":
                said_yes.append(_words(answer)[:1] == ["yes"])
                is_yes.append(key == "yes")
    graded = [value for values in right.values() for value in values]
    return WorldMetrics(
        accuracy=_mean(graded),
        existence_accuracy=_mean(right.get("existence", [])),
        yes_rate=_mean(said_yes),
        true_yes_rate=_mean(is_yes),
        hallucinated_objects=wrong / max(named, 1),
        captions_with_hallucination=_mean(captions),
        caption_recall=found / max(present, 1),
        accuracy_by_topic={topic: _mean(values) for topic, values in sorted(right.items())},
        questions=len(graded),
        captions=len(captions),
    )


def is_right(topic: str, key: str, answer: str) -> bool:
    """Whether the words of the topic's sort in `answer` are those of `key`, neither fewer nor more."""
    words = _words(answer)
    if topic == "existence":
        return words[:1] == [key]
    said = [word for word in words if word in SORTS[topic]]
    return said == key.split()


def caption_kinds(caption: str) -> list[str]:
    """Every kind of object that a caption names, one for each mention."""
    return [_SINGULAR[word] for word in _words(caption) if word in _SINGULAR]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
