"""POPE: every parser in circulation, both releases, and the published table."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visgain.errors import DataError
from visgain.evaluation.benchmark import Benchmark, Item, Question
from visgain.evaluation.bootstrap import estimates
from visgain.evaluation.pope import PARSERS, SUFFIX, Pope

POPE = Pope()
STRATEGIES = ("random", "popular", "adversarial")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def values(items: list[Item], variant: str = "official") -> dict[str, float]:
    return {name: metric(np.ones(len(items))) for name, metric in POPE.score(items, variant).metrics.items()}


def items(*said: tuple[str, str], split: str = "coco/random") -> list[Item]:
    """Of (label, reply)."""
    return [
        Item(
            question=Question(
                id=str(n), split=split, prompt="?", facts={"label": label, "text": f"{n}?", "image": str(n)}
            ),
            prediction=reply,
        )
        for n, (label, reply) in enumerate(said)
    ]


def write_split(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(n: int = 6, **more: Any) -> list[dict[str, Any]]:
    return [
        {"question_id": k + 1, "image": f"{k // 2}.jpg", "text": f"Is there a {k}?", "label": ["yes", "no"][k % 2]}
        | more
        for k in range(n)
    ]


def test_it_is_a_benchmark() -> None:
    assert isinstance(POPE, Benchmark)
    assert next(iter(POPE.variants)) == "official"


def test_every_parser_reads_the_recorded_replies_as_its_implementation_does(fixtures: Path) -> None:
    names = {
        "official": "official",
        "opera": "opera_pai",
        "vcd": "vcd",
        "vlmevalkit": "vlmevalkit_exact",
        "lmms-eval": "lmms_eval",
        "cambrian": "cambrian",
    }
    assert set(names) == set(PARSERS)
    cases = json.loads((fixtures / "pope" / "parser_cases.json").read_text())
    assert len(cases) == 28
    for case in cases:
        for ours, theirs in names.items():
            for label in ("yes", "no"):
                wanted = case[theirs][f"label_{label}"] if theirs == "vcd" else case[theirs]
                found = PARSERS[ours].read(case["text"], label) or "none"
                assert found == {"unknown": "none", "invalid": "none"}.get(wanted, wanted), (ours, case["text"])


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("No", ["no"] * 6),
        ("NO", ["yes", "no", "no", "no", "no", "no"]),
        ("There isn't a dog.", ["yes", "no", "no", None, None, None]),
        ("Yes. There is no cat", ["yes", "no", "yes", None, None, "yes"]),
        ("no.", ["no", "no", "no", "no", None, "no"]),
        ("", ["yes", "yes", "no", None, None, None]),
    ],
)
def test_replies_are_read_as_each_implementation_does(reply: str, wanted: list[str | None]) -> None:
    assert [parser.read(reply, "yes") for parser in PARSERS.values()] == wanted


@pytest.mark.published
def test_the_published_table_to_the_printed_digit(fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "pope"
    expected = json.loads((folder / "expected.json").read_text())
    questions = POPE.questions(folder / "coco_pope_*_2023-08.jsonl", None)
    assert len(questions) == 8910
    said = {
        (f"coco/{strategy}", str(row["question_id"])): row["text"]
        for strategy in STRATEGIES
        for row in read(folder / f"llava-v1.5-13b_{strategy}_answers.jsonl")
    }
    answered = [Item(question=question, prediction=said[question.key]) for question in questions]
    random.Random(0).shuffle(answered)
    scored = POPE.score(answered, "official")
    found = {name: metric(np.ones(len(answered))) for name, metric in scored.metrics.items()}
    for strategy in STRATEGIES:
        table = expected["computed_percent"][strategy]
        assert round(found[f"coco/{strategy}.f1"], 1) == expected["published"][strategy]
        for ours, theirs in {
            "accuracy": "acc",
            "precision": "P",
            "recall": "R",
            "f1": "F1",
            "yes_ratio": "yes",
        }.items():
            assert found[f"coco/{strategy}.{ours}"] == pytest.approx(table[theirs], abs=0.0051)
        for cell in ("TP", "FP", "TN", "FN"):
            assert scored.counts[f"coco/{strategy}.{cell}"] == table[cell]
        assert scored.notes[f"coco/{strategy}"].startswith(f"release 2023-08, {table['n']} questions, ")
    assert math.floor(found["f1"] * 100 + 0.5) / 100 == pytest.approx(85.95)
    assert expected["published"]["mean_f1"] == 85.9  # 85.95 before rounding
    assert abs(found["f1"] - 85.9) < 0.1


def test_the_releases_are_told_apart(fixtures: Path) -> None:
    for pattern, release, n in [("coco_pope_random_2*", "2023-08", 2910), ("coco_pope_random.jsonl", "2023-11", 3000)]:
        questions = POPE.questions(fixtures / "pope" / pattern, None)
        scored = POPE.score([Item(question=one, prediction="Yes") for one in questions], "official")
        [note] = scored.notes.values()
        assert note.startswith(f"release {release}, {n} questions, ")
        changed = [Item(question=one, prediction="Yes") for one in questions[1:]]
        assert POPE.score(changed, "official").notes["coco/random"].startswith(f"unknown release, {n - 1} questions")


def test_a_folder_with_both_releases_is_refused(tmp_path: Path) -> None:
    for name in ("coco_pope_random.jsonl", "coco_pope_random_2023-08.jsonl"):
        write_split(tmp_path, name, rows())
    with pytest.raises(DataError, match="6 ids more than once: coco/random/1"):
        POPE.questions(tmp_path, None)
    assert len(POPE.questions(tmp_path / "*_2023-08.jsonl", None)) == 6


def test_the_real_subset_is_read(shared_data: Path) -> None:
    questions = POPE.questions(shared_data / "coco" / "pope_official_subset.jsonl", shared_data)
    assert len(questions) == 684
    assert {question.split for question in questions} == {f"coco/{strategy}" for strategy in STRATEGIES}
    assert questions[0].prompt == "Is there a truck in the image?" + SUFFIX
    assert questions[0].images[0].open().size[0] > 0
    assert len({question.cluster for question in questions}) < 684 / 6 + 1


def test_files_of_all_sets_in_one_folder(tmp_path: Path) -> None:
    for name in ("coco_pope", "aokvqa_pope_seem", "gqa_pope_seem"):
        for strategy in STRATEGIES:
            write_split(tmp_path / name, f"{name}_{strategy}.json", rows())
    write_split(tmp_path, "answers.jsonl", [{"question_id": 1, "text": "Yes"}])
    questions = POPE.questions(tmp_path, tmp_path)
    assert len(questions) == 54
    assert len({question.split for question in questions}) == 9
    assert len({question.cluster for question in questions}) == 9  # three pictures a set
    answered = [Item(question=question, prediction="Yes") for question in questions]
    found = values(answered)
    assert found["accuracy"] == found["gqa.accuracy"] == found["gqa/random.accuracy"] == 50


def test_llavas_renumbered_file(tmp_path: Path) -> None:
    numbered = [row | {"question_id": 100 + k} for k, row in enumerate(rows(3, category="adversarial"))]
    path = write_split(tmp_path, "llava_pope_test.jsonl", numbered + rows(3, category="popular"))
    keys = [question.key for question in POPE.questions(path, None)]
    assert keys == [("coco/adversarial", str(n)) for n in (100, 101, 102)] + [("coco/popular", n) for n in "123"]


def test_the_hubs_tables(tmp_path: Path) -> None:
    def table(strategy: str) -> pa.Table:
        names = [f"COCO_val2014_{k:012d}" for k in range(4)]
        images = [{"bytes": png(k), "path": None} for k in range(4)]
        columns = {"id": ["0", "1", "2", "3"], "question_id": ["1", "2", "3", "4"], "question": ["Is there a dog?"] * 4}
        columns |= {"answer": ["yes", "no"] * 2, "image_source": names, "category": [strategy] * 4}
        return pa.table({**columns, "image": images})

    (tmp_path / "Full").mkdir()
    (tmp_path / "data").mkdir()
    for strategy in STRATEGIES:
        pq.write_table(table(strategy), tmp_path / "Full" / f"{strategy}-00000-of-00001.parquet")
        pq.write_table(table(strategy), tmp_path / "data" / f"test-{STRATEGIES.index(strategy):05d}-of-00003.parquet")
    questions = POPE.questions(tmp_path, None)
    assert [question.split for question in questions] == [f"coco/{s}" for s in sorted(STRATEGIES) for _ in range(4)]
    assert questions[2].images[0].open().getpixel((0, 0)) == (20, 0, 0)
    assert questions[2].facts["image"] == "COCO_val2014_000000000002"
    assert questions[1].facts["label"] == "no"


def png(k: int) -> bytes:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.new("RGB", (2, 2), (10 * k, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"label": "maybe"}, "line 2 .*'label' is 'maybe', not yes or no"),
        ({"label": None}, "line 2 .*'label' is None, not a string"),
        ({"text": 5}, "line 2 .*'text' is 5"),
        ({"text": "\ud800"}, "line 2 .*surrogate"),
        ({"image": 3}, "line 2 .*'image' is 3, not a picture"),
        ({"question_id": None}, "line 2 .*'question_id' is None"),
        ({"question_id": 1.0}, "line 2 .*'question_id' is 1.0"),
        ({"question_id": 1}, "1 ids more than once: coco/random/1"),
        ({"category": "rare"}, "line 2 .*'category' is 'rare', not one of random"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = write_split(tmp_path, "coco_pope_random.json", [rows()[0], rows()[1] | change, rows()[2]])
    with pytest.raises(DataError, match=told):
        POPE.questions(path, None)


def test_missing_and_empty_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist.*lmms-lab/POPE"):
        POPE.questions(tmp_path / "nothing", None)
    with pytest.raises(DataError, match="holds no POPE files"):
        POPE.questions(tmp_path, None)
    with pytest.raises(DataError, match="no POPE files"):
        POPE.questions(tmp_path / "pope_*.jsonl", None)
    with pytest.raises(DataError, match="holds no questions"):
        POPE.questions(write_split(tmp_path, "coco_pope_random.json", []), None)


def test_what_is_undefined_is_no_number() -> None:
    always_no = items(("yes", "No"), ("no", "No"))
    found = estimates(POPE.score(always_no, "official").metrics, ["a", "b"])
    assert found["precision"].value is None
    assert found["f1"].value is None
    assert found["recall"].value == 0
    assert found["accuracy"].value == 50
    wrong = values(items(("yes", "No"), ("no", "Yes")))
    assert (wrong["precision"], wrong["recall"], wrong["f1"]) == (0, 0, 0)
    assert math.isnan(values(items(("no", "Yes")))["recall"])


def test_unread_replies_are_wrong_and_counted() -> None:
    given = items(("yes", "Yes"), ("yes", "perhaps"), ("no", "perhaps"), ("no", "no"))
    assert POPE.score(given, "official").unparsed == 0
    kit, lmms = values(given, "vlmevalkit"), values(given, "lmms-eval")
    assert POPE.score(given, "vlmevalkit").unparsed == POPE.score(given, "lmms-eval").unparsed == 2
    assert (kit["accuracy"], kit["precision"], kit["recall"]) == (50, 100, 50)
    assert (lmms["accuracy"], lmms["precision"], lmms["recall"]) == (50, 100, 100)  # as its printed F1 of 1.0


REPLY = st.sampled_from(["Yes", "No", "no.", "NO", "Yes, not", "", "unsure", "\u2028no", "Nο"]) | st.text(max_size=20)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), REPLY), min_size=1, max_size=30), st.sampled_from([*PARSERS]))
@settings(max_examples=60, deadline=None)
def test_the_numbers_are_those_of_plain_counting(said: list[tuple[str, str]], variant: str) -> None:
    found, parser = values(items(*said), variant), PARSERS[variant]
    tp = fp = fn = right = yes = 0
    for label, reply in said:
        read_as = parser.read(reply, label)
        right += read_as == label
        yes += read_as == "yes"
        tp += read_as == "yes" and label == "yes"
        fp += read_as == "yes" and label == "no"
        fn += label == "yes" and (read_as == "no" or (read_as is None and variant != "lmms-eval"))
    assert found["accuracy"] == pytest.approx(100 * right / len(said))
    assert found["yes_ratio"] == pytest.approx(100 * yes / len(said))
    if tp:
        p, r = tp / (tp + fp), tp / (tp + fn)
        assert found["f1"] == pytest.approx(100 * 2 * p * r / (p + r))
        assert (found["precision"], found["recall"]) == pytest.approx((100 * p, 100 * r))
    elif fp + tp == 0 or tp + fn == 0:
        assert math.isnan(found["f1"])
    else:
        assert found["f1"] == 0
