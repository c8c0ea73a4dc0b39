"""Answers in other people's formats are joined by id, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visgain.errors import DataError
from visgain.evaluation.answers import Answer, joined
from visgain.evaluation.benchmark import Question
from visgain.evaluation.foreign import read_foreign

PLAIN = [Question(id=name, prompt=f"{name}?\nShort.", facts={"text": f"{name}?"}) for name in ("v1_0", "v1_1")]
SPLIT = [
    Question(id=name, split=split, prompt="?")
    for split in ("coco/random", "coco/popular", "gqa/random")
    for name in "12"
]
SAID = [
    Answer(benchmark="x", split=question.split, id=question.id, prediction=f"{question.split}{question.id}")
    for question in SPLIT
]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"v1_1": "b", "v1_0": "a"}'),
        ("a.json", '[{"question_id": "v1_1", "text": "b"}, {"question_id": "v1_0", "text": "a"}]'),
        ("a.json", '{"question_id": "v1_1", "text": "b"}\n{"question_id": "v1_0", "text": "a"}'),
        ("a.jsonl", '{"questionId": "v1_1", "answer": "b"}\n\n{"questionId": "v1_0", "answer": "a"}\n'),
        ("a.tsv", "index\tprediction\nv1_1\tb\nv1_0\ta\n"),
        ("a.csv", '\ufeffid,output\r\nv1_1,b\r\nv1_0,"a"\r\n'),
        ("a.jsonl", "".join(Answer(benchmark="x", split="", id=f"v1_{n}", prediction="ab"[n]).line() for n in (1, 0))),
        ("a.jsonl", '{"question": "v1_0?", "answer": "a"}\n{"question": "v1_1?", "answer": "b"}'),
    ],
)  # fmt: skip
def test_formats(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    found = joined(PLAIN, read_foreign(tmp_path / name, "x", PLAIN))
    assert [answer.prediction for answer in found] == ["a", "b"]


def test_the_row_says_the_split(tmp_path: Path) -> None:
    rows = [{"question_id": int(a.id), "split": a.split, "text": a.prediction} for a in reversed(SAID)]
    assert joined(SPLIT, read_foreign(lines(tmp_path / "a.jsonl", rows), "x", SPLIT)) == SAID


def test_a_file_for_each_split(tmp_path: Path) -> None:
    for split in ("coco/random", "coco/popular", "gqa/random"):
        rows = [{"question_id": a.id, "text": a.prediction} for a in SAID if a.split == split]
        lines(tmp_path / f"model_{split.replace('/', '_pope_')}.jsonl", rows)
    assert joined(SPLIT, read_foreign(tmp_path, "x", SPLIT)) == SAID


def test_an_unclear_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1 .*answers 1, which 3 splits have"):
        read_foreign(lines(tmp_path / "random.jsonl", [{"question_id": 1, "text": ""}]), "x", SPLIT)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"answer": "a"}], "1 rows for 2 questions"),
        ([{"question": "v1_1?", "answer": "b"}, {"question": "v1_0?", "answer": "a"}], "line 1 .*answers 'v1_1"),
        ([{"question_id": "v1_0", "text": 3}], "'text' is 3, not a string"),
        ([{"question_id": "v1_0", "words": "a"}], "line 1 .*none of prediction"),
        ([{"question_id": "v1_0", "text": "a"}, {"text": "b"}], "line 2 .*no 'question_id'"),
        ([], "holds no answers"),
        ([{"id": "v1_0", "model_answer": ""}, {"id": "v1_1", "model_answer": ""}], "every 'model_answer' .*template"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, rows: list[Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_foreign(lines(tmp_path / "a.jsonl", rows), "x", PLAIN)


def test_missing_answers_are_told_when_joined(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"question_id": "v1_7", "text": "?"}, {"question_id": "v1_0", "text": "a"}])
    with pytest.raises(DataError, match=r"1 missing \(v1_1\); 1 of no question \(v1_7\)"):
        joined(PLAIN, read_foreign(path, "x", PLAIN))


def test_llavas_numbers_are_mm_vets_names(tmp_path: Path) -> None:
    rows = [{"question_id": n, "text": "ab"[n]} for n in (1, 0)]
    found = joined(PLAIN, read_foreign(lines(tmp_path / "a.jsonl", rows), "mmvet", PLAIN))
    assert [answer.prediction for answer in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("a.jsonl", {"category": "popular"}, "an answer of 'popular'"),
        ("a.jsonl", {"split": "gqa/random"}, "an answer of 'gqa'"),
        ("model_popular_answers.jsonl", {}, "an answer of 'popular'"),
        ("gqa_pope_random.jsonl", {}, "an answer of 'gqa'"),
        ("tuned_on_gqa.jsonl", {}, None),
        ("popular.jsonl", {"split": "random"}, None),
        ("a.jsonl", {"category": "conv"}, None),
    ],
)
def test_answers_of_a_split_that_is_not_there_are_refused(
    tmp_path: Path, name: str, row: dict[str, str], told: str | None
) -> None:
    path = lines(tmp_path / name, [{"question_id": n, "text": "no", **row} for n in "12"])
    if told is None:
        assert len(joined(SPLIT[:2], read_foreign(path, "pope", SPLIT[:2]))) == 2
        return
    with pytest.raises(DataError, match=told):
        read_foreign(path, "pope", SPLIT[:2])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"v1_1": "b", "v1_0": "\\ud800"}'),
        ("a.jsonl", '{"id": "v1_0", "text": "\\ud800"}'),
        ("a.jsonl", '{"benchmark": "x", "id": "v1_0", "prediction": "\\ud800"}'),
    ],
)
def test_half_of_a_surrogate_pair_is_told(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="surrogate"):
        read_foreign(tmp_path / name, "x", PLAIN)


def test_a_folder_of_results_is_read_for_its_answers(tmp_path: Path) -> None:
    given = [Answer(benchmark="x", split="", id=question.id, prediction="yes") for question in PLAIN]
    (tmp_path / "answers.jsonl").write_text("".join(answer.line() for answer in given))
    (tmp_path / "metrics.json").write_text("{}")
    assert joined(PLAIN, read_foreign(tmp_path, "x", PLAIN)) == given
