"""Blind faith in text: every recorded count, and the prompts to the letter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visgain.errors import DataError
from visgain.evaluation.benchmark import Benchmark, Item, Question
from visgain.evaluation.blind_faith import OUTCOMES, TEXTS, BlindFaith, accuracy, preference
from visgain.evaluation.bootstrap import estimates

BLIND_FAITH = BlindFaith()
SPLITS = ("image", *(f"{kind}{text}" for text in TEXTS for kind in ("image+", "text_")))


def items_of(name: str, answers: list[str], said: dict[str, str]) -> list[Item]:
    return [
        Item(
            question=Question(id=name, split=split, prompt="?", facts={"answers": answers}, cluster=name),
            prediction=said[split],
        )
        for split in SPLITS
        if split in said
    ]


def values(items: list[Item], variant: str = "official") -> dict[str, float]:
    return {name: metric(np.ones(len(items))) for name, metric in BLIND_FAITH.score(items, variant).metrics.items()}


def test_it_is_a_benchmark() -> None:
    assert isinstance(BLIND_FAITH, Benchmark)


@pytest.mark.published
def test_every_recorded_count(fixtures: Path) -> None:
    folder = fixtures / "blind_faith"
    rows = [json.loads(line) for line in (folder / "vqav2_llava-1.5-7b.jsonl").read_text().splitlines()]
    assert len(rows) == 500
    answered = [one for row in rows for one in items_of(str(row["question_id"]), [row["answer"]], row)]
    scored, found = BLIND_FAITH.score(answered, "official"), values(answered)
    expected = json.loads((folder / "expected.json").read_text())["counts_first_500"]["llava-1.5-7b"]
    for text in TEXTS:
        assert {name: scored.counts[f"{text}.{name}"] for name in OUTCOMES} == {n: expected[text][n] for n in OUTCOMES}
        assert round(found[f"{text}.tpr"], 2) == expected[text]["TPR"]


def rows_for(question: str, texts: dict[str, str], **more: Any) -> list[dict[str, Any]]:
    return [
        {"question_id": 1, "question": question, "answers": ["a"], "text_type": kind, "additional_info": text}
        | {"image": "1.jpg"}
        | more
        for kind, text in texts.items()
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_are_the_official_ones_to_the_letter(fixtures: Path, tmp_path: Path) -> None:
    prompts = json.loads((fixtures / "blind_faith" / "prompt_examples.json").read_text())
    question = prompts["image_only"].removesuffix(" Please only output the answer with a single word or phrase.")
    lead, end = "please use it with caution: ", "\n----------\n"
    texts = {kind: prompts[kind].partition(lead)[2].rpartition(end)[0] for kind in TEXTS}
    questions = BLIND_FAITH.questions(write(tmp_path / "vqav2.jsonl", rows_for(question, texts)), tmp_path)
    asked = {one.split: one for one in questions}
    assert set(asked) == set(SPLITS)
    assert asked["image"].prompt == prompts["image_only"]
    for kind in TEXTS:
        assert asked[f"image+{kind}"].prompt == asked[f"text_{kind}"].prompt == prompts[kind]
        assert len(asked[f"image+{kind}"].images) == 1
        assert asked[f"text_{kind}"].images == ()
    assert {one.cluster for one in questions} == {"1"}


def test_documents_are_asked_in_their_own_words(tmp_path: Path) -> None:
    path = write(tmp_path / "DocVQA" / "test.jsonl", rows_for("Who?", {"match": "{braces} stay"}))
    questions = BLIND_FAITH.questions(path, None)
    assert questions[0].prompt == "Who? Please only output the answer directly."
    assert questions[1].prompt.endswith(
        "caution: {braces} stay\n----------\nWho? Please only output the answer directly."
    )


def test_the_hubs_tables(tmp_path: Path) -> None:
    rows = rows_for("Who?", dict.fromkeys(TEXTS, "text"), image={"bytes": b"x", "path": None}, answers="['a', \"b's\"]")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "VQAv2-00000-of-00001.parquet")
    questions = BLIND_FAITH.questions(tmp_path, None)
    assert [one.split for one in questions] == list(SPLITS)
    assert questions[0].facts["answers"] == ["a", "b's"]


@pytest.mark.parametrize(
    ("both", "text", "image", "wanted"),
    [
        ("a", "a", "a", "same"),
        ("a", "a", "b", "text"),
        ("a", "b", "a", "img"),
        ("Bmw", "BMW", "Lexus", "undef"),
        ("6", "5", "5", "neither"),
        ("Shoe", "Shoes", "Show", "both"),
        ("", "a", "b", "both"),  # nothing is part of everything
    ],
)
def test_whose_answer_is_given(both: str, text: str, image: str, wanted: str) -> None:
    assert preference(both, text, image) == wanted


def test_the_metrics_by_hand() -> None:
    def said(image: str, both: str, text: str) -> dict[str, str]:
        return {"image": image, "image+corrupted": both, "text_corrupted": text}

    answered = [
        *items_of("1", ["red"], said("Red", "Blue.", " Blue")),  # right alone, believes the text
        *items_of("2", ["two"], said("two", "two dogs", "2")),  # right twice, neither's answer
        *items_of("3", ["cat"], said("dog", "dog", "cat")),  # wrong, believes the picture
        *items_of("4", ["x"], said("x", "x", "X.")),  # the picture; the same in lower case
    ]
    found, lower = values(answered), values(answered, "lowercase")
    assert found["image.accuracy"] == 75
    assert found["image+corrupted.accuracy"] == 50
    assert found["text_corrupted.accuracy"] == 50
    assert found["corrupted.norm"] == pytest.approx(2 / 3)
    assert found["corrupted.tpr"] == pytest.approx(100 / 3)
    assert lower["corrupted.tpr"] == pytest.approx(100 / 2)
    assert np.isnan(found["match.tpr"])
    assert estimates(BLIND_FAITH.score(answered, "official").metrics, ["a"] * 12)["match.norm"].value is None


def test_accuracy_asks_for_three_of_ten_people() -> None:
    assert accuracy("It is red.", ["red"]) == 1
    assert accuracy("It is red.", ["blue", "RED "]) == 1
    assert accuracy("It is red.", ["red"] * 2 + ["blue"] * 8) == pytest.approx(2 / 3)
    assert accuracy("It is red.", ["red"] * 4 + ["blue"] * 6) == 1
    assert accuracy("", ["red"]) == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text_type": "false"}, "line 1 .*'text_type' is 'false', not one of corrupted"),
        ({"answers": []}, "line 1 .*'answers' is .., not an answer"),
        ({"answers": ""}, "line 1 .*'answers' is '', not an answer"),
        ({"answers": "[1, 2]"}, "line 1 .*not an answer"),
        ({"answers": "[broken"}, None),
        ({"additional_info": 5}, "line 1 .*'additional_info' is 5"),
        ({"text_type": "match"}, "2 ids more than once: image.match/1, text_match/1"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, Any], told: str | None) -> None:
    rows = rows_for("Who?", {"corrupted": "a", "match": "b"})
    path = write(tmp_path / "vqa.jsonl", [rows[0] | change, rows[1]])
    if told is None:
        assert BLIND_FAITH.questions(path, None)[0].facts["answers"] == ["[broken"]
        return
    with pytest.raises(DataError, match=told):
        BLIND_FAITH.questions(path, None)
