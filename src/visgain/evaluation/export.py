"""Answers for other people's scorers, written beside answers.jsonl.

- llava        answers-llava.jsonl, the lines that LLaVA's evaluation scripts read
- vlmevalkit   answers-vlmevalkit.tsv, the table that VLMEvalKit's `evaluate` takes: index, question, prediction
- rrc          answers-rrc.json, what the server of the Robust Reading Competition (DocVQA's test split) takes
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from visgain.errors import DataError
from visgain.evaluation.answers import Answer
from visgain.evaluation.benchmark import Question
from visgain.registry import Registry
from visgain.storage import write_text

Pairs = Sequence[tuple[Question, Answer]]
Writer = Callable[[Pairs, str], str]
"""(questions with their answers, the model's name) -> the text of the file."""


def llava(pairs: Pairs, model: str) -> str:
    """JSON lines {question_id, prompt, text, answer_id, model_id, metadata}; a split is the category."""
    lines = []
    for question, answer in pairs:
        name = f"{model}\0{question.split}\0{question.id}\0{answer.prediction}"
        fields: dict[str, Any] = {
            "question_id": int(question.id) if question.id.isdecimal() else question.id,
            "prompt": question.prompt,
            "text": answer.prediction,
            "answer_id": hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:22],
            "model_id": model,
            "metadata": {},
        }
        lines.append(json.dumps(fields | ({"category": question.split} if question.split else {}), ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)


def vlmevalkit(pairs: Pairs, model: str) -> str:
    """A table with tabs; texts with tabs or line breaks are quoted, as pandas reads them."""
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(["index", "split", "question", "prediction"])
    table.writerows([question.id, question.split, question.prompt, answer.prediction] for question, answer in pairs)
    return text.getvalue()


def rrc(pairs: Pairs, model: str) -> str:
    """A JSON list of {questionId, answer}. Raises DataError if an id is no whole number."""
    odd = [question.id for question, _ in pairs if not question.id.isdecimal()]
    if odd:
        raise DataError(f"the RRC server wants whole numbers as question ids; {odd[0]!r} is none")
    rows = [{"questionId": int(question.id), "answer": answer.prediction} for question, answer in pairs]
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


EXPORTS: Registry[tuple[Writer, str]] = Registry(
    "export",
    {
        "llava": (llava, "answers-llava.jsonl"),
        "vlmevalkit": (vlmevalkit, "answers-vlmevalkit.tsv"),
        "rrc": (rrc, "answers-rrc.json"),
    },
)


def export_answers(folder: Path, names: Sequence[str], pairs: Pairs, model: str) -> list[Path]:
    """Write the files of `names`; returns their paths. Raises UnknownName, DataError or StorageError."""
    written = []
    for name in names:
        write, file = EXPORTS.get(name)
        write_text(folder / file, write(pairs, model))
        written.append(folder / file)
    return written
