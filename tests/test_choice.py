"""Multiple choice: the letter in a reply, CV-Bench and MMBench."""

from __future__ import annotations

import base64
import csv
import json
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

from visgain.errors import DataError, ImageError
from visgain.evaluation import choice
from visgain.evaluation.benchmark import Benchmark, Item, Question
from visgain.evaluation.bootstrap import estimates
from visgain.evaluation.cvbench import CVBench
from visgain.evaluation.mmbench import MMBench

CV_BENCH, MMBENCH = CVBench(), MMBench()
MATCHERS: dict[str, choice.Matcher] = {
    "cambrian_extract": choice.cambrian,
    "lmms_cvbench_extract": choice.lmms_first_letter,
    "lmms_mmbench_prefetch": choice.mmbench_2023,
    "vlmevalkit_can_infer": choice.vlmevalkit,
}


def png(red: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def values(benchmark: Benchmark, items: list[Item], variant: str = "official") -> dict[str, float]:
    return {name: metric(np.ones(len(items))) for name, metric in benchmark.score(items, variant).metrics.items()}


# ---------------------------------------------------------------- letters


@pytest.mark.parametrize("benchmark", ["cvbench", "mmbench"])
def test_letters_are_those_of_each_implementation(fixtures: Path, benchmark: str) -> None:
    options = json.loads((fixtures / "mmbench" / "parser_cases.json").read_text())["options"]
    cases = json.loads((fixtures / benchmark / "parser_cases.json").read_text())["cases"]
    assert len(cases) == 24
    checked = 0
    for case in cases:
        for theirs, match in MATCHERS.items():
            if theirs in case:
                assert (match(case["prediction"], options) or "") == (case[theirs] or ""), (theirs, case["prediction"])
                checked += 1
    assert checked >= 3 * 24


OPTIONS = {"A": "a red apple", "B": "pear", "C": "two dogs"}


@pytest.mark.parametrize(
    ("reply", "cambrian", "first", "official", "vlmevalkit"),
    [
        ("B", "B", "B", "B", "B"),
        ("b", "B", "B", None, None),
        ("The answer is (C).", "C", "T", "C", "C"),
        ("A pear.", "A", "A", "A", "A"),
        ("A ripe pear it is", "A", "A", "B", "B"),
        ("C: two dogs", "C", "C", "C", "C"),
        ("two dogs", "T", "T", "C", "C"),
        ("A is right, if you look at it", "A", "A", None, None),
        ("I'm sorry, but without the image provided", "I", "I", None, "Z"),
        ("", None, None, None, None),
        ("  ", None, None, None, None),
    ],
)
def test_letters(reply: str, cambrian: Any, first: Any, official: Any, vlmevalkit: Any) -> None:
    assert choice.cambrian(reply, OPTIONS) == cambrian
    assert choice.lmms_first_letter(reply, OPTIONS) == first
    assert choice.mmbench_2023(reply, OPTIONS) == official
    assert choice.vlmevalkit(reply, OPTIONS) == vlmevalkit


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_reply_has_a_letter_or_none(reply: str) -> None:
    for match in MATCHERS.values():
        found = match(reply, OPTIONS)
        assert found is None or found


# ---------------------------------------------------------------- CV-Bench


def cv_row(n: int, source: str = "COCO", **more: Any) -> dict[str, Any]:
    return {
        "idx": n,
        "type": "3D" if source == "Omni3D" else "2D",
        "task": "Depth" if source == "Omni3D" else "Count",
        "question": "How many?",
        "choices": ["3", "2", "1"],
        "answer": "(B)",
        "prompt": "How many? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1",
        "filename": f"img/{n}.png",
        "source": source,
    } | more


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_cv_bench_is_the_mean_of_means(tmp_path: Path) -> None:
    rows = [*(cv_row(n, "ADE20K") for n in range(4)), *(cv_row(n + 4) for n in range(2))]
    write_lines(tmp_path / "test_2d.jsonl", rows)
    write_lines(tmp_path / "test_3d.jsonl", [cv_row(n, "Omni3D") for n in range(3)])
    questions = CV_BENCH.questions(tmp_path, None)
    assert [question.key for question in questions] == [("2D", str(n)) for n in range(6)] + [("3D", n) for n in "012"]
    assert questions[0].prompt == (
        "How many? Select from the following choices.\n(A) 3\n(B) 2\n(C) 1\n"
        "Answer with the option's letter from the given choices directly."
    )
    replies = ["B", "A", "(B)", "b.", "A", "The answer is B", "C", "B", "hm"]
    items = [Item(question=question, prediction=text) for question, text in zip(questions, replies, strict=True)]
    found = values(CV_BENCH, items)
    ade, coco, omni = 3 / 4, 1 / 2, 1 / 3
    assert found["ADE20K"] == pytest.approx(100 * ade)
    assert found["2d"] == pytest.approx(100 * (ade + coco) / 2)
    assert found["3d"] == pytest.approx(100 * omni)
    assert found["cvbench"] == pytest.approx(100 * ((ade + coco) / 2 + omni) / 2)
    assert found["micro"] == pytest.approx(100 * 5 / 9)
    assert found["2d.micro"] == pytest.approx(100 * 4 / 6)
    assert found["Depth"] == pytest.approx(100 / 3)
    assert next(iter(found)) == "cvbench"
    assert CV_BENCH.score(items, "official").unparsed == 1  # hm: H is no option
    assert values(CV_BENCH, items, "lmms-eval")["COCO"] == 0  # T
    partial = estimates(CV_BENCH.score(items[:6], "official").metrics, list("abcdef"))
    assert partial["cvbench"].value is None
    assert partial["2d"].value == pytest.approx(100 * (ade + coco) / 2)


def test_cv_bench_from_parquet(tmp_path: Path) -> None:
    for name, source in (("2d", "COCO"), ("3d", "Omni3D")):
        rows = [cv_row(n, source) | {"image": {"bytes": png(40 * n), "path": None}} for n in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"test_{name}.parquet")
        write_lines(tmp_path / f"test_{name}.jsonl", [cv_row(n, source) for n in range(3)])
    questions = CV_BENCH.questions(tmp_path, None)
    assert len(questions) == 6
    assert questions[2].images[0].open().getpixel((0, 0)) == (80, 0, 0)
    assert questions[0].images[0].key != questions[1].images[0].key


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": "(D)"}, r"line 1 .*'answer' is '\(D\)', not one of \(A\), \(B\), \(C\)"),
        ({"choices": "3, 2, 1"}, "line 1 .*'choices' is '3, 2, 1', not a list"),
        ({"type": "4D"}, "line 1 .*'type' is '4D'"),
        ({"source": "LVIS"}, "line 1 .*'source' is 'LVIS', not one of ADE20K"),
        ({"idx": True}, "line 1 .*'idx' is True"),
    ],
)
def test_a_wrong_cv_bench_row_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        CV_BENCH.questions(write_lines(tmp_path / "test.jsonl", [cv_row(0) | change, cv_row(1)]), None)


# ---------------------------------------------------------------- MMBench

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split")


def mm_row(index: int, answer: str = "A", **more: Any) -> dict[str, Any]:
    row = {"index": index, "question": "What?", "A": "cat", "B": "dog", "answer": answer, "category": "naming"}
    return row | {"image": base64.b64encode(png(index % 7)).decode(), "l2-category": "all", "split": "dev"} | more


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def mm_items(*said: tuple[int, str, str], options: str = "ABCD", category: str = "") -> list[Item]:
    """Of (index, answer, reply)."""
    facts = {"options": {letter: f"option {letter}" for letter in options}, "category": category, "l2-category": ""}
    return [
        Item(
            question=Question(id=str(n), prompt="?", facts=facts | {"answer": answer}, cluster=str(n % 1_000_000)),
            prediction=reply,
        )
        for n, answer, reply in said
    ]


@pytest.mark.published
@pytest.mark.parametrize("variant", list(MMBENCH.variants))
def test_mmbench_to_the_published_digit(fixtures: Path, variant: str) -> None:
    folder = fixtures / "mmbench"
    expected = json.loads((folder / "expected.json").read_text())
    rows = [json.loads(line) for line in (folder / "llava-v1.5-13b_dev_20230712.jsonl").read_text().splitlines()]
    items = [
        item
        for row in rows
        for item in mm_items((row["index"], row["answer"], row["prediction"]), options="ABCD"[: row["n_options"]])
    ]
    scored = MMBENCH.score(items, variant)
    found = values(MMBENCH, items, variant)
    assert (scored.counts["rows"], scored.counts["questions"]) == (expected["rows"], expected["groups"])
    assert round(found["circular"], 2) == expected["circular_percent"] == 67.69
    assert round(found["circular"], 1) == expected["published"]["circular"] == 67.7
    assert round(found["vanilla"], 2) == expected["vanilla_percent"] == 75.43


def test_a_question_counts_if_every_rotation_is_right() -> None:
    items = mm_items(
        *[(1, "A", "A"), (1_000_001, "B", "B"), (2_000_001, "C", "C")],
        *[(2, "A", "A"), (1_000_002, "B", "A")],
        *[(3, "A", "B"), (1_000_003, "B", "option B")],
        *[(4, "A", "perhaps"), (1_000_004, "B", "B")],
    )
    found = values(MMBENCH, items)
    assert found == pytest.approx({"circular": 25, "vanilla": 50})
    assert MMBENCH.score(items, "official").unparsed == 1
    judged = [Item(question=i.question, prediction=i.prediction, judgements=("A",)) for i in items]
    assert values(MMBENCH, judged)["circular"] == 50  # only what the rule does not match is taken from the judge
    assert MMBENCH.score(judged, "official").unparsed == 0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4), st.integers(0, 3), st.sampled_from("AB"), st.sampled_from(["A", "B", "", "\u2028"])
        ),
        unique_by=lambda one: one[:2],
        min_size=1,
    )
)
@settings(max_examples=100, deadline=None)
def test_circular_is_what_plain_counting_gives(said: list[tuple[int, int, str, str]]) -> None:
    found = values(MMBENCH, mm_items(*((n + 1_000_000 * turn, answer, reply) for n, turn, answer, reply in said)))
    groups = {n: all(a == r for m, _, a, r in said if m == n) for n, *_ in said}
    assert found["circular"] == pytest.approx(100 * sum(groups.values()) / len(groups))
    plain = [a == r for _, turn, a, r in said if turn == 0]
    assert found["vanilla"] == pytest.approx(100 * np.mean(plain)) if plain else np.isnan(found["vanilla"])


def test_mmbench_tables(tmp_path: Path) -> None:
    rows = [
        mm_row(7, hint="Look closely.\nReally.", C='a "bird"\twith tab', D="fish\u2028"),
        mm_row(1_000_007, "B", image="7", hint="nan"),
        mm_row(9, C="None", D="lost", answer="D", category="counting"),
    ]
    questions = MMBENCH.questions(write_table(tmp_path / "mmbench_dev_20230712.tsv", rows), None)
    assert questions[0].prompt == (
        'Look closely.\nReally.\nWhat?\nA. cat\nB. dog\nC. a "bird"\twith tab\nD. fish\u2028\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert questions[1].prompt.startswith("What?\nA. cat\nB. dog\nAnswer")
    assert questions[1].images[0].key == questions[0].images[0].key
    assert questions[0].images[0].open().getpixel((0, 0)) == (0, 0, 0)
    assert questions[0].cluster == questions[1].cluster == "7"
    assert questions[2].facts["options"] == {"A": "cat", "B": "dog"}  # as LLaVA reads the table
    items = [Item(question=question, prediction="A") for question in questions]
    assert MMBENCH.score(items, "official").counts["answer_not_offered"] == 1
    assert values(MMBENCH, items)["circular.naming"] == 0
    assert values(MMBENCH, items)["circular.counting"] == 0


def test_mmbench_from_the_hub(tmp_path: Path) -> None:
    (tmp_path / "en").mkdir()
    rows = [mm_row(3, hint="nan", C="nan", D="nan") | {"image": {"bytes": png(90), "path": None}, "L2-category": "x"}]
    del rows[0]["l2-category"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "en" / "dev-00000-of-00001.parquet")
    [question] = MMBENCH.questions(tmp_path, None)
    assert question.facts["options"] == {"A": "cat", "B": "dog"}
    assert question.facts["l2-category"] == "x"
    assert question.images[0].open().getpixel((0, 0)) == (90, 0, 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": ""}, "row 2 .*no answer; MMBench's test split"),
        ({"answer": "E"}, "row 2 .*'answer' is 'E', not one of A, B, C, D"),
        ({"index": "x1"}, "row 2 .*'index' is 'x1', not a whole number"),
        ({"index": 1}, "1 ids more than once: 1"),
        ({"image": ""}, "row 2 .*'image' is '', not a picture"),
        ({"image": "55"}, "row 2 .*'image' is '55', not the index of a row"),
    ],
)
def test_a_wrong_mmbench_row_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = write_table(tmp_path / "mmbench.tsv", [mm_row(1), mm_row(2) | change, mm_row(3)])
    with pytest.raises(DataError, match=told):
        MMBENCH.questions(path, None)


def test_a_damaged_picture_and_a_damaged_table_are_told(tmp_path: Path) -> None:
    [question] = MMBENCH.questions(write_table(tmp_path / "mmbench.tsv", [mm_row(1, image="no base64!")]), None)
    with pytest.raises(ImageError, match="image of row 1"):
        question.images[0].open()
    (tmp_path / "mmbench.tsv").write_text("index\tquestion\n1\n")
    with pytest.raises(DataError, match=r"row 1 .*has 1 cells; the header names 2"):
        MMBENCH.questions(tmp_path, None)
    (tmp_path / "mmbench.tsv").write_text('index\tquestion\n1\t"open')
    with pytest.raises(DataError, match="cannot read the table"):
        MMBENCH.questions(tmp_path, None)
