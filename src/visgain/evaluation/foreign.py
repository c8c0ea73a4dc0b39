"""Answers in the formats of others: LLaVA's `{question_id, text}`, MM-Vet's `{"v1_0": text}`, tables with a prediction.

They are joined by id, as our own are. Where an id stands in several splits, the row must say which split it means, or
the file's name. Only a file without any ids is taken in order, if it has as many rows as there are questions and, where
the rows repeat the question, the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from visgain.errors import DataError
from visgain.evaluation.answers import Answer, read_answers, require_unicode
from visgain.evaluation.benchmark import Question
from visgain.evaluation.hub import files
from visgain.evaluation.pope import SETS, STRATEGIES
from visgain.evaluation.records import Record, read_json, read_records

IDS = ("question_id", "questionId", "id", "index", "image_id", "idx")
TEXTS = ("prediction", "text", "answer", "output", "response", "caption", "model_answer")
SPLITS = ("split", "category", "subset")
ANSWERS = "answers.jsonl"
SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".parquet")

Splits = Mapping[str, Sequence[str]]
"""Of each id, the splits that have a question of it."""


def read_foreign(path: Path, benchmark: str, questions: Sequence[Question]) -> list[Answer]:
    """The answers in a file, or in all files of a folder, whatever their format. Raises DataError."""
    splits: dict[str, list[str]] = {}
    for question in questions:
        splits.setdefault(question.id, []).append(question.split)
    path = path / ANSWERS if (path / ANSWERS).is_file() else path  # a folder that `visgain eval` wrote
    found = files(path, lambda name: name.endswith(SUFFIXES), f"answers ({', '.join(SUFFIXES)})")
    return [answer for one in found for answer in _read(one, benchmark, questions, splits)]


def _read(path: Path, benchmark: str, questions: Sequence[Question], splits: Splits) -> list[Answer]:
    if path.suffix == ".json" and (texts := _by_key(path)) is not None:
        return [_answer(Record(where=str(path), fields={}), path, benchmark, splits, *one) for one in texts.items()]
    rows = read_records(path)
    if not rows:
        raise DataError(f"{path} holds no answers")
    if path.suffix in (".jsonl", ".json") and {"benchmark", "id", "prediction"} <= set(rows[0].fields):
        return read_answers(path, benchmark)
    name = next((name for name in IDS if name in rows[0].fields), None)
    if name is None:
        return _in_order(path, benchmark, rows, questions)
    found = [_answer(row, path, benchmark, splits, row.id(name), _text(row)) for row in rows]
    if "model_answer" in rows[0].fields and not any(answer.prediction for answer in found):
        raise DataError(f"every 'model_answer' in {path} is empty: it is MMHal-Bench's template, without answers")
    return found


def _by_key(path: Path) -> dict[str, str] | None:
    """The texts of a JSON file that is one object of id -> text; None if it is anything else. Raises DataError."""
    try:
        whole = read_json(path)
    except DataError:
        return None  # perhaps JSON lines under another name
    if not isinstance(whole, dict) or set(whole) & {*IDS, *TEXTS}:
        return None
    record = Record(where=str(path), fields=whole)
    return {name: record.text(name) for name in whole}


def _text(row: Record) -> str:
    name = next((name for name in TEXTS if name in row.fields), None)
    if name is None:
        raise DataError(f"{row.where} has none of {', '.join(TEXTS)}; it has {', '.join(map(str, row.fields))}")
    return row.text(name)


def _answer(row: Record, path: Path, benchmark: str, splits: Splits, name: str, text: str) -> Answer:
    if name not in splits and f"v1_{name}" in splits:
        name = f"v1_{name}"  # LLaVA numbers MM-Vet's questions
    known = splits.get(name, [""])  # an unknown id is told when answers are joined to questions
    split = known[0] if len(known) == 1 else _split_of(row, path, name, known)
    _require_no_other(row, path, split)
    require_unicode(text, f"{row.where}: the answer to {name}")
    return Answer(benchmark=benchmark, split=split, id=name, prediction=text)


def _split_of(row: Record, path: Path, name: str, known: Sequence[str]) -> str:
    """Which of the `known` splits with a question called `name` is meant. Raises DataError if nothing says."""
    said = [str(row.fields[field]) for field in SPLITS if row.has(field)]
    last = {split: split.rpartition("/")[2] for split in known}  # coco/random -> random
    readings = (
        [split for split in known if split in said],
        [split for split in known if last[split] in said],
        [split for split in known if all(part in path.stem for part in split.split("/"))],
        [split for split in known if last[split] in path.stem],
    )
    for meant in readings:
        if len(meant) == 1:
            return meant[0]
    raise DataError(
        f"{row.where} answers {name}, which {len(known)} splits have ({', '.join(known)}); "
        "give the row a field 'split', or the file a name with the split in it"
    )


def _require_no_other(row: Record, path: Path, split: str) -> None:
    """Raises DataError where the row, or else the file's name, says another of POPE's splits, which number alike."""
    name = path.stem.lower()
    for words, named in ((STRATEGIES, name), (SETS, name if "pope" in name else "")):
        own = next((part for part in split.split("/") if part in words), None)
        said = [str(row.fields[field]).lower() for field in SPLITS if row.has(field)]
        said = [text for text in said if any(word in text for word in words)] or [named]
        other = next((word for text in said for word in words if word in text), None)
        if own is not None and other is not None and not any(own in text for text in said):
            raise DataError(
                f"{row.where} is an answer of {other!r}, going by the row or the file's name, and the only question of "
                f"that id is of {split}; if it is meant, give the rows a field 'split'"
            )


def _in_order(path: Path, benchmark: str, rows: Sequence[Record], questions: Sequence[Question]) -> list[Answer]:
    if len(rows) != len(questions):
        raise DataError(
            f"{path} has no ids ({', '.join(IDS)}), so its rows are taken in order; "
            f"but it has {len(rows)} rows for {len(questions)} questions"
        )
    for row, question in zip(rows, questions, strict=True):
        asked = row.fields.get("question", row.fields.get("prompt"))
        if asked is not None and asked not in (question.prompt, question.facts.get("text")):
            raise DataError(
                f"{row.where} answers {str(asked)[:80]!r}, but the question there is {question.prompt[:80]!r}"
            )
    return [
        Answer(benchmark=benchmark, split=question.split, id=question.id, prediction=_text(row))
        for row, question in zip(rows, questions, strict=True)
    ]
