"""CV-Bench: counting, relations, depth and distance. Tong et al. 2024 (Cambrian-1), arXiv 2406.16860.

Data: rows `{idx, type, task, question, choices, answer, prompt, filename, source, ...}`, JSON lines or parquet with the
picture; 1,438 about 2D (ADE20K and COCO) and 1,200 about 3D (Omni3D).

Published: 2D is the mean of its two sources, 3D is Omni3D, CV-Bench is the mean of the two. lmms-eval prints the share
of all questions (`micro`) in its place, so both are here; so are the sources and the tasks.

Variants are ways to find the letter in a reply; see `choice`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from visgain.evaluation import choice
from visgain.evaluation.benchmark import Item, Metric, Question, Scored, average, ratio
from visgain.evaluation.hub import files, local_copy
from visgain.evaluation.records import Record, read_records, unique

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
SOURCES = ("ADE20K", "COCO", "Omni3D")
TYPES = ("2D", "3D")
TASKS = ("Count", "Relation", "Depth", "Distance")

_FILE = re.compile(r"(test|val)(_[23]d)?.*\.(jsonl|parquet)")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class CVBench:
    name = "cvbench"
    source = "nyu-visionx/CV-Bench on the hub"
    variants: Mapping[str, str] = {
        "official": "the first character after the last `answer is` or `answer:` (Cambrian)",
        "lmms-eval": "the letter that the reply begins with",
        "vlmevalkit": "a letter near the end, or the text of one option",
    }
    max_new_tokens = 512

    def questions(self, data: Path, image_root: Path | None) -> list[Question]:
        """The rows of the files at `data`: a file, a folder, or nyu-visionx/CV-Bench."""
        data = local_copy(data, "nyu-visionx/CV-Bench", ["test_*.parquet"], self.source)
        found = files(data, lambda name: bool(_FILE.fullmatch(name)), "test_2d.parquet, test_3d.parquet or .jsonl")
        tables = [path for path in found if path.suffix == ".parquet"]  # the repository has every row as JSON too
        rows = [(row, path) for path in tables or found for row in read_records(path)]
        return unique([_question(row, image_root or path.parent) for row, path in rows], data)

    def score(self, items: Sequence[Item], variant: str) -> Scored:
        """Keys: `cvbench` (published), `2d`, `3d`, `micro`, sources and tasks; accuracies in percent."""
        letters = [_letter(item, variant) for item in items]
        right = np.array([x == item.question.facts["answer"] for x, item in zip(letters, items, strict=True)], float)

        def accuracy(fact: str, value: str) -> Metric:
            where = np.array([item.question.facts[fact] == value for item in items], float)
            return ratio(right * where, where, scale=100)

        sources = {name: accuracy("source", name) for name in SOURCES}
        two, three = average([sources["ADE20K"], sources["COCO"]]), sources["Omni3D"]
        everything = np.ones(len(items))
        return Scored(
            metrics={
                "cvbench": average([two, three]),
                "2d": two,
                "3d": three,
                "micro": ratio(right, everything, scale=100),
                **sources,
                "2d.micro": accuracy("type", "2D"),
                **{task: accuracy("task", task) for task in TASKS},
            },
            unparsed=sum(x not in item.question.facts["choices"] for x, item in zip(letters, items, strict=True)),
            counts={name: sum(item.question.facts["source"] == name for item in items) for name in SOURCES},
        )


def _letter(item: Item, variant: str) -> str | None:
    options: Mapping[str, str] = item.question.facts["choices"]
    if variant == "lmms-eval":
        return choice.lmms_first_letter(item.prediction, options)
    if variant == "vlmevalkit":
        return choice.vlmevalkit(item.prediction, options)
    strip = ".:," if item.question.facts["source"] == "Omni3D" else "."
    return choice.cambrian(item.prediction, options, strip=strip)


def _question(row: Record, root: Path) -> Question:
    choices = dict(zip(_LETTERS, row.texts("choices"), strict=False))
    answer = row.text("answer").strip("()")
    if answer not in choices:
        raise row.wrong("answer", f"one of {', '.join(f'({letter})' for letter in choices)}")
    kind = row.one_of("type", TYPES)
    prompt = row.text("prompt") if row.has("prompt") else _prompt(row.text("question"), choices)
    facts = {"answer": answer, "choices": choices, "type": kind}
    return Question(
        id=row.id("idx"),
        split=kind,
        prompt=prompt + SUFFIX,
        images=(row.image("image" if "image" in row.fields else "filename", root),),
        facts=facts | {"source": row.one_of("source", SOURCES), "task": row.one_of("task", TASKS)},
        cluster=row.text("source_filename") if row.has("source_filename") else "",
    )


def _prompt(question: str, choices: Mapping[str, str]) -> str:
    lines = [f"({letter}) {text}" for letter, text in choices.items()]
    return f"{question} Select from the following choices.\n" + "\n".join(lines)
