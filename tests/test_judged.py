"""LLaVA-Bench, MM-Vet and MMHal-Bench: published scores from recorded reviews, formulas once more and plainly."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import SHARED
from visgain.errors import DataError, VisgainError
from visgain.evaluation import llava_bench, mmhal, mmvet
from visgain.evaluation.answers import joined
from visgain.evaluation.benchmark import Item, JudgedBenchmark, Question
from visgain.evaluation.foreign import read_foreign
from visgain.evaluation.judge import JudgeOptions, judge_answers
from visgain.evaluation.judgements import judged
from visgain.evaluation.llava_bench import LlavaBench
from visgain.evaluation.mmhal import MMHal
from visgain.evaluation.mmvet import MMVet

FIXTURES = SHARED / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the fixtures (../shared) are not on this machine")
needs_data = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason="the real data (../shared/data) is not on this machine"
)


def metrics(benchmark: JudgedBenchmark, items: Sequence[Item], variant: str = "official") -> dict[str, float]:
    return {name: value(np.ones(len(items))) for name, value in benchmark.score(items, variant).metrics.items()}


def answers(benchmark: JudgedBenchmark, path: Path, questions: Sequence[Question]) -> dict[tuple[str, str], str]:
    """What `visgain eval --answers` takes from a file, by key."""
    found = joined(questions, read_foreign(path, benchmark.name, questions))
    return {answer.key: answer.prediction for answer in found}


def replay(benchmark: Any, questions: list[Question], answers: Path, reviews: Sequence[Path]) -> list[Item]:
    """Items as `visgain eval` makes them of official files of answers and reviews."""
    said = [answer.prediction for answer in joined(questions, read_foreign(answers, benchmark.name, questions))]
    options = JudgeOptions(judge=",".join(map(str, reviews)))
    runs = judged(questions, said, judge_answers(benchmark, questions, said, options))
    return [Item(question=q, prediction=p, judgements=j) for q, p, j in zip(questions, said, runs, strict=True)]


# ---------------------------------------------------------------- published numbers


@needs_fixtures
@needs_data
@pytest.mark.published
def test_llava_bench_of_llava_1_5() -> None:
    """65.4 in LLaVA's MODEL_ZOO: each run, each category, and the mean of three runs."""
    benchmark, folder = LlavaBench(), FIXTURES / "llava_bench"
    expected = json.loads((folder / "expected.json").read_text())
    questions = benchmark.questions(SHARED / "data/llava_bench_wild", None)
    reviews = [folder / f"llava-v1.5-7b_review{run}.jsonl" for run in (1, 2, 3)]
    items = replay(benchmark, questions, folder / "llava-v1.5-7b_answers.jsonl", reviews)
    found = metrics(benchmark, items)
    assert round(found["relative"], 1) == expected["published_mean_of_3_runs"]["7b"] == 65.4
    for run, categories in expected["7b"].items():
        for category, numbers in categories.items():
            group = f"run{run}." if category == "all" else f"run{run}.{category}."
            shown = [round(found[f"{group}{name}"], 1) for name in ("relative", "reference", "model")]
            assert shown == numbers, (run, category)
    for run, path in enumerate(reviews, start=1):
        alone = replay(benchmark, questions, folder / "llava-v1.5-7b_answers.jsonl", [path])
        assert metrics(benchmark, alone)["relative"] == found[f"run{run}.relative"]
    assert benchmark.score(items, "official").unparsed == 0


@needs_fixtures
@pytest.mark.published
@pytest.mark.parametrize("runs", [1, 3])
def test_mmvet_of_llava_1_5(runs: int) -> None:
    """31.1 in LLaVA's MODEL_ZOO."""
    benchmark, folder = MMVet(), FIXTURES / "mmvet"
    expected = json.loads((folder / "expected.json").read_text())
    totals = expected["total_percent"]["7b"]
    questions = benchmark.questions(folder / "llava-mm-vet_questions.jsonl", None)
    assert len(questions) == 218
    grades = folder / f"llava-v1.5-7b_grade_{runs}runs.json"
    items = replay(benchmark, questions, folder / "llava-v1.5-7b_answers.json", [grades])
    found = metrics(benchmark, items)
    if runs == 1:
        assert [round(found["total"], 1)] == totals["1run"]
        assert "std" not in found
    else:
        assert [round(found[f"run{run}.total"], 1) for run in (1, 2, 3)] == totals["3runs"]
        assert round(found["total"], 1) == totals["mean"] == expected["published"]["7b"] == 31.1
        assert round(found["std"], 1) == totals["std"]
    recorded = json.loads(grades.read_text())
    for item in items:
        assert [mmvet.official(text) for text in item.judgements] == recorded[item.question.id]["score"]


@needs_fixtures
@needs_data
def test_mmvet_by_capability_is_the_mean_over_the_questions_that_need_it() -> None:
    """On the questions whose capabilities are here; from the recorded scores, without our parser."""
    benchmark, folder = MMVet(), FIXTURES / "mmvet"
    questions = benchmark.questions(SHARED / "data/mmvet", None)
    recorded = json.loads((folder / "llava-v1.5-7b_grade_3runs.json").read_text())
    items = [Item(question=q, prediction="", judgements=tuple(recorded[q.id]["content"])) for q in questions]
    found = metrics(benchmark, items)
    for name in mmvet.CAPABILITIES:
        scores = [recorded[q.id]["score"] for q in questions if name in q.facts["capability"]]
        assert found[name] == pytest.approx(100 * statistics.fmean(statistics.fmean(runs) for runs in scores))
    assert list(found)[:8] == ["total", *mmvet.CAPABILITIES, "std"]


@needs_fixtures
@pytest.mark.published
def test_mmhal_reads_reviews_as_the_official_script() -> None:
    cases = json.loads((FIXTURES / "mmhal/review_parse_cases.json").read_text())
    benchmark = MMHal()
    questions = benchmark.questions(FIXTURES / "mmhal/mmhal-bench_questions.json", None)
    for case in cases:
        item = Item(question=questions[0], prediction="", judgements=(case["review"],))
        found = metrics(benchmark, [item])
        assert found["score"] == case["official_score"], case
        assert found["hallucination_rate"] == case["hallucination"], case
    assert len(cases) == 10


@needs_fixtures
def test_mmhal_questions_are_the_official_96() -> None:
    questions = MMHal().questions(FIXTURES / "mmhal/mmhal-bench_questions.json", None)
    assert [question.facts["type"] for question in questions] == list(mmhal.TYPES) * 12
    assert len({question.facts["topic"] for question in questions}) == 12


# ---------------------------------------------------------------- reading replies


def naive_llava(review: str) -> list[float]:
    first = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(first[0]), float(first[1])] if len(first) == 2 else [-1, -1]
    except ValueError:
        return [-1, -1]


@pytest.mark.parametrize(
    ("review", "official", "lmms_eval"),
    [
        ("8 7\nBoth", (8, 7), (8, 7)),
        ("8,7", (8, 7), (8, 7)),
        ("8, 7", (-1, -1), (8, 7)),
        ("8.5 7.25", (8.5, 7.25), (8.5, 7.25)),
        ("8 7 9", (-1, -1), (8, 7)),
        ("8 7 ", (-1, -1), (8, 7)),
        (" 8 7", (-1, -1), (8, 7)),
        ("\n8 7", (-1, -1), (8, 7)),
        ("8  7", (-1, -1), (8, 7)),
        ("8\t7", (-1, -1), (8, 7)),
        ("Assistant 1: 8\nAssistant 2: 7", (-1, -1), (1, 8)),
        ("8/10 7/10", (-1, -1), (8, 10)),
        ("eight seven", (-1, -1), (-1, -1)),
        ("nan inf", (-1, -1), (-1, -1)),
        ("8", (-1, -1), (-1, -1)),
        ("", (-1, -1), (-1, -1)),
        ("-1 5", (-1, 5), (-1, 5)),
    ],
)
def test_llava_bench_reviews(review: str, official: tuple[float, float], lmms_eval: tuple[float, float]) -> None:
    assert llava_bench.official(review) == official
    assert llava_bench.lmms_eval(review) == lmms_eval
    assert LlavaBench().is_readable(review) == (official != (-1, -1))


@pytest.mark.parametrize(
    ("reply", "official", "vlmevalkit"),
    [
        ("0.5", 0.5, 0.5),
        ("1", 1.0, 1.0),
        ("0.0 ", 0.0, 0.0),
        (" 0.5", None, 0.5),
        ("0.5\n", 0.5, 0.5),
        ("0.5 because", 0.5, None),
        ("0.5\nbecause", None, None),
        ("1.1", None, None),
        ("-0.1", None, None),
        ("nan", None, None),
        ("inf", None, None),
        ("0,5", None, None),
        ("**0.5**", None, None),
        ("", None, None),
    ],
)
def test_mmvet_grades(reply: str, official: float | None, vlmevalkit: float | None) -> None:
    assert mmvet.official(reply) == official
    assert mmvet.vlmevalkit(reply) == vlmevalkit
    assert MMVet().is_readable(reply) == (official is not None)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Fine.\nRating: 5, a lot", 5),
        ("RATING: 0", 0),
        ("Rating: 0 ... rating: 0", 0),
        ("Rating:4", None),
        ("Rating: 6, though not Rating: 2", None),
        ("Rating: 10", 1),
        ("Rating: 4.5", 4),
        ("Rating: 7", None),
        ("", None),
    ],
)
def test_mmhal_ratings(reply: str, rating: int | None) -> None:
    assert mmhal.official(reply) == rating
    assert MMHal().is_readable(reply) == (rating is not None)


ODD = st.text() | st.from_regex(
    r"\s?-?\d{0,2}[.,]?\d?[ ,\n]{0,2}\d{0,2}(\nso)?| rating: \d.*|nan nan|1e999 1|٣ ٤", fullmatch=True
)


@settings(deadline=None)
@given(ODD)
def test_whatever_a_judge_says_is_read_or_is_not(text: str) -> None:
    naive = naive_llava(text)
    expected = naive if all(map(math.isfinite, naive)) else [-1, -1]  # nan would make every score nan
    assert list(llava_bench.official(text)) == expected
    assert all(map(math.isfinite, llava_bench.lmms_eval(text)))
    for read in (mmvet.official, mmvet.vlmevalkit):
        grade = read(text)
        assert grade is None or 0 <= grade <= 1
    hits = [n for n in range(7) if f"rating: {n}" in text.lower()]
    assert mmhal.official(text) == (hits[0] if len(hits) == 1 else None)


# ---------------------------------------------------------------- formulas


def llava_items(reviews: Sequence[Sequence[str]]) -> list[Item]:
    kinds = ("conv", "detail", "complex")
    return [
        Item(
            question=Question(id=str(n), prompt="?", facts={"category": kinds[n % 3]}),
            prediction="",
            judgements=tuple(runs),
        )
        for n, runs in enumerate(reviews)
    ]


def naive_relative(reviews: Sequence[str], decimals: int | None) -> float:
    pairs = [naive_llava(review) for review in reviews]
    reference = sum(pair[0] for pair in pairs) / len(pairs)
    model = sum(pair[1] for pair in pairs) / len(pairs)
    if not reference:
        return math.nan
    if decimals is None:
        return model / reference * 100
    return round(round(model, decimals) / round(reference, decimals) * 100, 1)


SCORES = st.lists(
    st.tuples(*[st.sampled_from(["8 7", "9 2", "10 10", "5 6.5", "8, 7", "none", "7 7.5"])] * 2),
    min_size=3,
    max_size=20,
)


@settings(max_examples=12, deadline=None)
@given(SCORES)
def test_llava_bench_is_a_ratio_of_rounded_means_and_unreadable_reviews_stay_in(rows: list[tuple[str, str]]) -> None:
    items, benchmark = llava_items(rows), LlavaBench()
    found, plain = metrics(benchmark, items), metrics(benchmark, items, "vlmevalkit")
    for start, step, group in ((0, 1, ""), (0, 3, "conv."), (1, 3, "detail."), (2, 3, "complex.")):
        runs = [[row[run] for row in rows[start::step]] for run in (0, 1)]
        rounded = [naive_relative(texts, 3) for texts in runs]
        assert [found[f"run{run}.{group}relative"] for run in (1, 2)] == pytest.approx(rounded, nan_ok=True)
        assert found[f"{group}relative"] == pytest.approx(sum(rounded) / 2, nan_ok=True)
        exact = [naive_relative(texts, None) for texts in runs]
        assert plain[f"{group}relative"] == pytest.approx(sum(exact) / 2, nan_ok=True)
    unread = sum(naive_llava(text) == [-1, -1] for row in rows for text in row)
    scored = benchmark.score(items, "official")
    assert (scored.unparsed, scored.counts) == (unread, {"runs": 2, "replies": 2 * len(rows)})
    assert benchmark.score(items, "lmms-eval").unparsed == sum(text == "none" for row in rows for text in row)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from(mmvet.CAPABILITIES)),
            st.lists(st.sampled_from(["0.0", "0.3", "1.0", "0.5 x", "no", "2"]), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=15,
    )
)
def test_mmvet_is_percent_of_the_questions_and_runs(rows: list[tuple[set[str], list[str]]]) -> None:
    items = [
        Item(
            question=Question(id=str(n), prompt="?", facts={"capability": sorted(names)}),
            prediction="",
            judgements=tuple(texts),
        )
        for n, (names, texts) in enumerate(rows)
    ]
    points = {"0.0": 0.0, "0.3": 0.3, "1.0": 1.0, "0.5 x": 0.5, "no": 0.0, "2": 0.0}
    totals = [100 * sum(points[texts[run]] for _, texts in rows) / len(rows) for run in range(3)]
    scored, found = MMVet().score(items, "official"), metrics(MMVet(), items)
    assert found["total"] == pytest.approx(sum(totals) / 3)
    assert found["std"] == pytest.approx(statistics.pstdev(totals))
    for name in mmvet.CAPABILITIES:
        having = [points[text] for names, texts in rows if name in names for text in texts]
        assert (name in found) == bool(having)
        if having:
            assert found[name] == pytest.approx(100 * sum(having) / len(having))
    assert scored.unparsed == sum(text in ("no", "2") for _, texts in rows for text in texts)


@pytest.mark.parametrize("seed", range(5))
def test_mmhal_is_a_mean_and_a_share(seed: int) -> None:
    known = [*(f"Rating: {n}" for n in range(7)), "Rating:3", "?"]
    texts = [str(text) for text in np.random.default_rng(seed).choice(known, 96)]
    items = [
        Item(
            question=Question(id=str(n), prompt="?", facts={"type": mmhal.TYPES[n % 8]}), prediction="", judgements=(t,)
        )
        for n, t in enumerate(texts)
    ]
    scores = [int(text[8:]) if text.startswith("Rating: ") else 0 for text in texts]
    found = metrics(MMHal(), items)
    assert found["score"] == pytest.approx(sum(scores) / 96)
    assert found["hallucination_rate"] == pytest.approx(sum(score < 3 for score in scores) / 96)
    for k, name in enumerate(mmhal.TYPES):
        assert found[f"{name}.score"] == pytest.approx(sum(scores[k::8]) / 12)
    assert MMHal().score(items, "official").unparsed == sum(not text.startswith("Rating: ") for text in texts)


@pytest.mark.parametrize(
    ("benchmark", "facts"),
    [(LlavaBench(), {"category": "conv"}), (MMVet(), {"capability": ["ocr"]}), (MMHal(), {"type": "other"})],
)
def test_weights_are_repetitions(benchmark: JudgedBenchmark, facts: dict[str, Any]) -> None:
    """What the bootstrap counts on: a weight of k is the item k times, a weight of 0 is no item."""
    texts = {"llava_bench_wild": ["8 7", "9 2", "bad", "5 6"], "mmvet": ["0.1", "1.0", "no", "0.4"]}
    said = texts.get(benchmark.name, ["Rating: 6", "Rating: 1", "no", "Rating: 3"])
    items = [
        Item(question=Question(id=str(n), prompt="?", facts=facts), prediction="", judgements=(text, said[0]))
        for n, text in enumerate(said)
    ]
    weights = np.array([2.0, 0.0, 1.0, 3.0])
    repeated = [item for item, times in zip(items, weights, strict=True) for _ in range(int(times))]
    for variant in benchmark.variants:
        weighted = benchmark.score(items, variant).metrics
        plain = benchmark.score(repeated, variant).metrics
        for name, value in weighted.items():
            assert value(weights) == pytest.approx(plain[name](np.ones(len(repeated)))), name


@pytest.mark.parametrize("benchmark", [LlavaBench(), MMVet(), MMHal()])
def test_items_without_judgements_or_with_unequal_runs_have_no_score(benchmark: JudgedBenchmark) -> None:
    facts = {"category": "conv", "capability": [], "type": "other"}
    items = [Item(question=Question(id=str(n), prompt="?", facts=facts), prediction="") for n in range(2)]
    with pytest.raises(DataError, match="run the stage `judge` first"):
        benchmark.score(items, "official")
    uneven = [Item(question=items[0].question, prediction="", judgements=("1",) * n) for n in (1, 2)]
    with pytest.raises(DataError, match="judged 1 times and others 2 times"):
        benchmark.score(uneven, "official")


# ---------------------------------------------------------------- what the judge is asked


def test_llava_bench_asks_in_the_official_structure(tmp_path: Path) -> None:
    question = LlavaBench().questions(llava_folder(tmp_path), None)[1]
    asked = LlavaBench().request(question, "My {answer}", None)
    assert asked.user.startswith(
        "[Context]\nA cat.\nIt sleeps.\n\n[Question]\nWhy?\n\n[Assistant 1]\nBecause.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nMy {answer}\n\n[End of Assistant 2]\n\n[System]\n"
    )
    assert asked.user.endswith("\n\n")
    assert (asked.temperature, asked.max_tokens, asked.retry) == (0.2, 1024, None)
    assert asked.system
    own = LlavaBench().request(question, "A", "{category}: {context} {question} {reference} {answer}")
    assert (own.system, own.user) == ("", "complex: A cat.\nIt sleeps. Why? Because. A")


def test_mmvet_asks_in_the_official_structure() -> None:
    facts = {"reference": "1<AND>2<OR>3", "capability": []}
    question = Question(id="v1_0", prompt="What?", facts=facts)
    asked = MMVet().request(question, "one", None)
    table = asked.user.split("\n\n")[1].split("\n")
    assert table[0] == "Question | Ground truth | Prediction | Correctness"
    assert [row.count(" | ") for row in table] == [3] * 9
    assert [float(row.split(" | ")[3]) for row in table[2:]] == [0.0, 0.5, 0.5, 0.5, 1.0, 0.4, 1.0]
    assert asked.user.endswith("\n\nWhat? | 1 <AND> 2 <OR> 3 | one | ")
    assert asked.retry == asked.user + "\nPredict the correctness of the answer (digit): "
    assert (asked.system, asked.temperature, asked.max_tokens) == ("", 0.0, 3)


def test_mmhal_asks_in_the_official_structure(tmp_path: Path) -> None:
    question = MMHal().questions(mmhal_file(tmp_path), None)[0]
    asked = MMHal().request(question, "Red.", None)
    assert asked.user.endswith(
        "### Image Contents\nCar, Tree\n\n### Question\nWhich colour?\n\n### Human Answer\nBlue.\n\n"
        "### Response to Evaluate\nRed.\n"
    )
    assert [mmhal.official(f"Rating: {n}") for n in range(6, -1, -1)] == [6, 5, 4, 3, 2, 1, 0]
    assert [line[:11] for line in asked.user.split("\n") if line.startswith("- Rating")] == [
        f"- Rating: {n}" for n in range(6, -1, -1)
    ]
    assert (asked.system, asked.temperature, asked.max_tokens, asked.retry) == ("", 0.0, None, None)


# ---------------------------------------------------------------- files


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path)


def llava_folder(folder: Path, **changes: Any) -> Path:
    rows = [
        {"question_id": 0, "image": "001.png", "text": "What?", "category": "conv"},
        {"question_id": 1, "image": "001.png", "text": "Why?", "category": "complex", **changes},
    ]
    write_lines(folder / "questions.jsonl", rows)
    answers = [{"question_id": n, "text": text} for n, text in ((1, "Because."), (0, "A cat."))]
    write_lines(folder / "answers_gpt4.jsonl", answers)
    write_lines(folder / "context.jsonl", [{"id": "001", "image": "001.png", "caption": ["A cat.", "It sleeps."]}])
    picture(folder / "images/001.png")
    return folder


def test_llava_bench_from_its_files_and_from_the_hubs_table(tmp_path: Path) -> None:
    local = LlavaBench().questions(llava_folder(tmp_path / "local"), None)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, "PNG")
    rows = [
        {
            "question_id": question.id,
            "question": question.prompt,
            "gpt_answer": question.facts["reference"],
            "category": question.facts["category"],
            "caption": question.facts["context"],
            "image_id": "001",
            "image": {"bytes": buffer.getvalue(), "path": "001.png"},
        }
        for question in local
    ]
    (tmp_path / "hub/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub/data/train-00000-of-00001.parquet")
    hub = LlavaBench().questions(tmp_path / "hub", None)
    assert [(q.key, q.prompt, q.facts) for q in hub] == [(q.key, q.prompt, q.facts) for q in local]
    assert [q.images[0].open().size for q in [*hub, *local]] == [(8, 6)] * 4
    assert len({q.cluster for q in hub}) == len({q.cluster for q in local}) == 1
    assert LlavaBench().questions(tmp_path / "local/questions.jsonl", None)[0].facts == local[0].facts


def test_llava_bench_without_references_can_be_asked_but_not_judged(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path)
    (folder / "answers_gpt4.jsonl").unlink()
    question = LlavaBench().questions(folder, None)[0]
    with pytest.raises(DataError, match=r"question 0 has no reference; a judge needs answers_gpt4\.jsonl"):
        LlavaBench().request(question, "x", None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"category": "other"}, "line 2 of .*'category' is 'other', not one of conv, detail, complex"),
        ({"question_id": 0}, "ids more than once"),
        ({"question_id": 2}, r"nothing for '2' .*'text'"),
        ({"question_id": None}, "'question_id' is None"),
        ({"image": "002.png"}, r"nothing for '002\.png' .*'caption'"),
        ({"text": 7}, "'text' is 7, not a string"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_llava_bench_files_that_are_wrong(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        LlavaBench().questions(llava_folder(tmp_path, **change), None)


VET = {
    "imagename": "v1_0.png",
    "question": "What?",
    "answer": "1<OR>2",
    "capability": ["ocr", "math"],
    "imagesource": "x",
}


def test_mmvet_from_every_format(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "PNG")
    for folder in ("official", "llava", "rows"):
        picture(tmp_path / folder / "images/v1_0.png")
    (tmp_path / "official/mm-vet.json").write_text(json.dumps({"v1_0": VET}))
    llava = {"question_id": 0, "image": "v1_0.png", "text": "What?", "category": "conv"}
    write_lines(tmp_path / "llava/llava-mm-vet.jsonl", [llava])
    rows = {
        "id": "v1_0",
        "image": "images/v1_0.png",
        "question": "What?",
        "answer": "1<OR>2",
        "capability": ["math", "ocr"],
    }
    write_lines(tmp_path / "rows/questions.jsonl", [rows])
    hub = {
        "question_id": "v1_0",
        "image": {"bytes": buffer.getvalue(), "path": None},
        "question": "What?",
        "answer": "1<OR>2",
        "image_source": "v1_0.png",
        "capability": "ocr,math",
    }
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist([hub]), tmp_path / "hub/test-00000-of-00001.parquet")
    for folder in ("official", "llava", "rows", "hub"):
        (question,) = MMVet().questions(tmp_path / folder, None)
        assert (question.id, question.prompt) == ("v1_0", "What?"), folder
        assert question.images[0].open().size == (8, 6), folder
        known = folder != "llava"
        assert question.facts["capability"] == (["math", "ocr"] if known else []), folder
        assert question.facts["reference"] == ("1<OR>2" if known else None), folder
    with pytest.raises(DataError, match=r"v1_0 has no reference answer; a judge needs mm-vet\.json"):
        MMVet().request(MMVet().questions(tmp_path / "llava", None)[0], "x", None)


@pytest.mark.parametrize(
    ("whole", "told"),
    [
        ({"v1_0": {**VET, "question": None}}, "v1_0 in .*'question' is None"),
        ({"v1_0": {**VET, "capability": 5}}, "'capability' is 5, not a list of strings"),
        ({"v1_0": {**VET, "imagename": ["a"]}}, "'imagename' is"),
        ({"v1_0": "text"}, "no JSON object like"),
        ({}, "no questions"),
        ([1], "entry 1 of .* is 1, not a JSON object"),
    ],
)
def test_mmvet_files_that_are_wrong(whole: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "mm-vet.json").write_text(json.dumps(whole))
    with pytest.raises(DataError, match=told):
        MMVet().questions(tmp_path, None)


def mmhal_file(folder: Path, n: int = 96, **changes: Any) -> Path:
    rows = [
        {
            "question_type": mmhal.TYPES[i % 8],
            "question_topic": "outdoor",
            "image_id": f"{i:016x}",
            "image_src": f"https://farm.example.org/1/{i}_o.jpg",
            "image_content": ["Car", "Tree"],
            "question": "Which colour?",
            "gt_answer": "Blue.",
            "model_answer": "",
            **(changes if i == 3 else {}),
        }
        for i in range(n)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "response_template.json").write_text(json.dumps(rows))
    return folder / "response_template.json"


def test_mmhal_finds_pictures_by_either_name(tmp_path: Path) -> None:
    path = mmhal_file(tmp_path)
    picture(tmp_path / "images/0_o.jpg")
    picture(tmp_path / f"images/{1:016x}.jpg")
    questions = MMHal().questions(tmp_path, None)
    assert [question.images[0].open().size for question in questions[:2]] == [(8, 6)] * 2
    with pytest.raises(VisgainError, match=r"image not found: 2_o\.jpg"):
        questions[2].images[0].open()
    assert [q.key for q in MMHal().questions(path, tmp_path / "images")] == [q.key for q in questions]


def test_mmhal_contents_as_the_hubs_script_declares_them(tmp_path: Path) -> None:
    for content in ({"class": ["Car", "Tree"]}, [{"class": "Car"}, {"class": "Tree"}], ["Car", "Tree"]):
        question = MMHal().questions(mmhal_file(tmp_path, image_content=content), None)[3]
        assert question.facts["context"] == "Car, Tree"
    assert MMHal().questions(mmhal_file(tmp_path, image_content=[]), None)[3].facts["context"] == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n": 95}, "has 95 questions; MMHal-Bench has 96"),
        ({"question_type": "odd"}, "entry 4 of .*'question_type' is 'odd'"),
        ({"image_id": f"{2:016x}"}, "1 ids more than once"),
        ({"image_content": "Car"}, "'image_content' is 'Car', not a list of strings"),
        ({"gt_answer": None}, "'gt_answer' is None"),
    ],
)
def test_mmhal_files_that_are_wrong(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        MMHal().questions(mmhal_file(tmp_path, **change), None)


@pytest.mark.parametrize("benchmark", [LlavaBench(), MMVet(), MMHal()])
def test_a_folder_without_the_files_is_told(benchmark: JudgedBenchmark, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path} holds no .*"):
        benchmark.questions(tmp_path, None)
    with pytest.raises(DataError, match="does not exist"):
        benchmark.questions(tmp_path / "nowhere", None)


# ---------------------------------------------------------------- answers and reviews of others


VET_QUESTIONS = [Question(id=f"v1_{n}", prompt="?", facts={"capability": []}) for n in range(2)]


def test_answers_in_official_formats(tmp_path: Path) -> None:
    (tmp_path / "vet.json").write_text(json.dumps({"v1_1": "b", "v1_0": ""}))
    assert answers(MMVet(), tmp_path / "vet.json", VET_QUESTIONS) == {("", "v1_0"): "", ("", "v1_1"): "b"}
    rows = [{"question_id": 1, "prompt": "?", "text": "b", "metadata": {}}, {"question_id": 0, "text": ""}]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    assert answers(MMVet(), path, VET_QUESTIONS) == {("", "v1_0"): "", ("", "v1_1"): "b"}
    assert answers(LlavaBench(), path, [Question(id=str(n), prompt="?") for n in range(2)]) == {
        ("", "0"): "",
        ("", "1"): "b",
    }
    filled_in = mmhal_file(tmp_path, model_answer="Red.")
    questions = MMHal().questions(filled_in, None)
    found = answers(MMHal(), filled_in, questions)
    assert [found[question.key] for question in questions] == ["", "", "", "Red.", *[""] * 92]
    with pytest.raises(DataError, match=r"every 'model_answer' .* is empty"):
        answers(MMHal(), mmhal_file(tmp_path), questions)


def completions(texts: Sequence[Any]) -> list[Any]:
    return [{"choices": [{"message": {"role": "assistant", "content": text}}]} for text in texts]


def test_mmhal_reviews_have_no_ids_and_go_by_order_if_there_are_as_many(tmp_path: Path) -> None:
    questions = MMHal().questions(mmhal_file(tmp_path), None)
    path = tmp_path / "reviews.json"
    path.write_text(json.dumps(completions([f"Rating: {i % 7}" for i in range(96)])))
    assert [MMHal().reviews(path, questions)[q.key] for q in questions] == [(f"Rating: {i % 7}",) for i in range(96)]
    path.write_text(json.dumps(completions(["Rating: 1"] * 95)))
    with pytest.raises(DataError, match="holds 95; a file of reviews is a list of 96 chat completions"):
        MMHal().reviews(path, questions)


BAD_FILES: list[tuple[Any, str, Callable[[Path], object], str]] = [
    (LlavaBench(), "jsonl", lambda p: [{"question_id": 0, "text": 1}], "'text' is 1"),
    (LlavaBench(), "jsonl", lambda p: [{"question_id": 0, "text": "a"}] * 2, "1 there more than once"),
    (LlavaBench(), "jsonl", lambda p: [{"text": "a"}], "has no ids .* but it has 1 rows for 2 questions"),
    (MMVet(), "json", lambda p: {"v1_0": 1}, "'v1_0' is 1, not a string"),
    (MMVet(), "json", lambda p: ["a"], "entry 1 of .*answers.json"),
    (MMHal(), "json", lambda p: [{"image_id": "a"}], "has none of .*model_answer"),
]


@pytest.mark.parametrize(("benchmark", "suffix", "content", "told"), BAD_FILES)
def test_answers_that_are_wrong(
    benchmark: Any, suffix: str, content: Callable[[Path], Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / f"answers.{suffix}"
    path.write_text("\n".join(map(json.dumps, content(path))) if suffix == "jsonl" else json.dumps(content(path)))
    with pytest.raises(DataError, match=told):
        answers(benchmark, path, VET_QUESTIONS)


@pytest.mark.parametrize(
    ("benchmark", "whole", "told"),
    [
        (MMVet(), {"v1_0": {"score": [1.0]}}, "v1_0 in .* has no 'content'"),
        (MMVet(), {"v1_0": {"content": ["1.0", None]}}, "'content' is .*, not a list of strings"),
        (MMVet(), {"v1_0": {"content": ["1.0"]}}, r"1 missing \(v1_1\)"),
        (MMVet(), {"v1_0": {"content": ["1.0", "0.0"]}, "v1_1": {"content": ["1.0"]}}, r"run 2 .*1 missing \(v1_1\)"),
        (MMVet(), {"v1_0": {"content": []}, "v1_1": {"content": []}}, "holds no judgements"),
        (MMVet(), "text", "no JSON object like"),
        (LlavaBench(), {"question_id": "v1_0", "tuple": [8, 7]}, "has no 'content'"),
        (MMHal(), {"choices": []}, "holds no list"),
        (MMHal(), completions([1, 2]), r"entry 1 of .* is no chat completion with a text"),
        (MMHal(), [None, {}], "entry 1 of"),
    ],
)
def test_recorded_reviews_that_are_wrong(benchmark: Any, whole: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "reviews.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(DataError, match=told):
        judge_answers(benchmark, VET_QUESTIONS, ["a", "b"], JudgeOptions(judge=str(path)))
