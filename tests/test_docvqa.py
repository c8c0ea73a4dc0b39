"""DocVQA: the similarity of the challenge's server, to its quirk."""

from __future__ import annotations

import json
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from visgain.errors import DataError
from visgain.evaluation.benchmark import Benchmark, Item, Question
from visgain.evaluation.docvqa import DocVQA, anls, distance

DOCVQA = DocVQA()


def item(said: str, *answers: str) -> Item:
    return Item(question=Question(id=said, prompt="?", facts={"answers": list(answers)}), prediction=said)


def values(items: list[Item]) -> dict[str, float]:
    return {name: metric(np.ones(len(items))) for name, metric in DOCVQA.score(items, "official").metrics.items()}


def naive_distance(a: str, b: str) -> int:
    """By its definition."""

    @cache
    def between(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(between(i - 1, j) + 1, between(i, j - 1) + 1, between(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return between(len(a), len(b))


def test_it_is_a_benchmark() -> None:
    assert isinstance(DOCVQA, Benchmark)


def test_the_recorded_cases(fixtures: Path) -> None:
    cases = json.loads((fixtures / "docvqa" / "anls_cases.json").read_text())
    assert len(cases) == 15
    for case in cases:
        assert anls(case["prediction"], case["answers"]) == pytest.approx(case["rrc_anls"], abs=1e-6)


@pytest.mark.published
def test_a_thousand_real_answers(fixtures: Path) -> None:
    folder = fixtures / "docvqa"
    rows = [json.loads(line) for line in (folder / "llava-1.5-7b_val1000.jsonl").read_text().splitlines()]
    for row in rows:
        assert anls(row["prediction"], row["answers"]) == pytest.approx(row["anls"], abs=1e-6)
    expected = json.loads((folder / "expected.json").read_text())["llava-1.5-7b"]
    found = values([item(row["prediction"], *row["answers"]) for row in rows])
    assert len(rows) == expected["n"]
    assert found["anls"] == pytest.approx(expected["anls_percent"], abs=0.0005)
    assert round(found["anls"], 2) == 28.19
    assert found["exact_match"] == pytest.approx(expected["exact_match_percent"]) == 13.2


@pytest.mark.parametrize(
    ("said", "answer", "wanted"),
    [
        ("Paris", "paris", 1),
        ("abcd", "abxy", 0.5),  # one half is kept
        ("abcde", "abxyz", 0),
        ("aaaa bbbb", "aaaa bbbb cc", 0.75),
        ("aaaa     bbbb", "aaaa bbbb cc", 1 - 3 / 13),  # by the length before normalisation
        ("", "", 1),
        ("", "x", 0),
        ("İ", "i̇", 1),  # lower case can be longer
    ],
)
def test_similarity(said: str, answer: str, wanted: float) -> None:
    assert anls(said, [answer]) == pytest.approx(wanted)
    assert anls(said, ["qqqqqqqqqqqqqqqqqq", answer]) == pytest.approx(wanted)


@given(st.text("ab ", max_size=8), st.text("ab ", max_size=8))
@settings(max_examples=150, deadline=None)
def test_the_distance_is_that_of_its_definition(a: str, b: str) -> None:
    assert distance(a, b) == distance(b, a) == naive_distance(a, b)


@given(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_text_has_a_similarity(said: str, answers: list[str]) -> None:
    found = anls(said, answers)
    assert found == 0 or 0.5 <= found <= 1
    assert anls(answers[0], answers) == 1


def test_exact_match_is_after_normalisation() -> None:
    found = values([item(" ITC  Limited", "itc limited"), item("itc", "ITC Limited", "I.T.C.")])
    assert found["exact_match"] == 50


def test_the_challenges_file(tmp_path: Path) -> None:
    row = {
        "questionId": 337,
        "question": "What date?",
        "image": "documents/a_1.png",
        "docId": 279,
        "answers": ["1/8/93"],
    }
    path = tmp_path / "val_v1.0_withQT.json"
    path.write_text(json.dumps({"dataset_name": "SP-DocVQA", "data": [row, row | {"questionId": 338}]}))
    questions = DOCVQA.questions(tmp_path, tmp_path)
    assert [question.id for question in questions] == ["337", "338"]
    assert questions[0].prompt == "What date?\nAnswer the question using a single word or phrase."
    assert questions[0].images[0].key == "documents/a_1.png"
    assert questions[0].cluster == questions[1].cluster


def test_the_hubs_tables(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    row = {
        "questionId": "337",
        "question": "?",
        "image": {"bytes": buffer.getvalue(), "path": ""},
        "answers": ["a", "b"],
    }
    (tmp_path / "DocVQA").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "DocVQA" / "validation-00000-of-00006.parquet")
    [question] = DOCVQA.questions(tmp_path, None)
    assert question.images[0].open().size == (3, 2)
    assert question.facts["answers"] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answers": None}, "entry 1 .*no answers; DocVQA's test split"),
        ({"answers": []}, "entry 1 .*'answers' is .., not a list with an answer"),
        ({"answers": "1/8/93"}, "entry 1 .*not a list of strings"),
        ({"image": 7}, "entry 1 .*'image' is 7, not a picture"),
        ({"question": None}, "entry 1 .*'question' is None"),
        ({"questionId": 2}, "1 ids more than once: 2"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    row = {"questionId": 1, "question": "?", "image": "a.png", "answers": ["a"]}
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"data": [row | change, row | {"questionId": 2}]}))
    with pytest.raises(DataError, match=told):
        DOCVQA.questions(path, None)
