"""Answers are joined by id, or refused with a list; intervals draw whole clusters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from visgain.errors import DataError
from visgain.evaluation.answers import Answer, joined, read_answers
from visgain.evaluation.benchmark import Question, average, mean, ratio
from visgain.evaluation.bootstrap import estimates

QUESTIONS = [Question(id=str(n), split=split, prompt="?") for split in ("a", "b") for n in range(3)]


def answers(*keys: str) -> list[Answer]:
    return [Answer(benchmark="x", split=key[0], id=key[1:], prediction=key) for key in keys]


def test_answers_come_in_the_order_of_the_questions() -> None:
    found = joined(QUESTIONS, answers("b2", "a1", "b0", "a0", "b1", "a2"))
    assert [answer.prediction for answer in found] == ["a0", "a1", "a2", "b0", "b1", "b2"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("a0", "a1", "a2", "b0", "b2"), r"1 missing \(b/1\)"),
        (("a0", "a1", "a2", "b0", "b1", "b2", "a7"), r"1 of no question \(a/7\)"),
        (("a0", "a1", "a2", "b0", "b1", "b2", "a1"), r"1 there more than once \(a/1\)"),
        (("b0", "b1", "b2"), r"3 missing \(a/0, a/1, a/2\)"),
    ],
)
def test_what_does_not_fit_is_listed(given: tuple[str, ...], told: str) -> None:
    with pytest.raises(DataError, match=told):
        joined(QUESTIONS, answers(*given))


def test_a_line_survives_whatever_is_in_it(tmp_path: Path) -> None:
    odd = [
        "",
        " \n",
        "\u2028\x85 line?",
        "😀 \ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        "x" * 100_000,
    ]
    path = tmp_path / "answers.jsonl"
    written = [Answer(benchmark="x", split="", id=str(n), prediction=text, meta={"n": n}) for n, text in enumerate(odd)]
    path.write_text("".join(answer.line() for answer in written), encoding="utf-8", newline="\n")
    assert read_answers(path, "x") == written


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": "1"}', "line 2 .* no 'prediction'"),
        ('{"prediction": "x"}', "line 2 .* no 'id'"),
        ('{"id": "1", "prediction": 5}', "line 2 .*not a string"),
        ('{"id": null, "prediction": "x"}', "line 2 .*id is null"),
        ('{"id": true, "prediction": "x"}', "line 2 .*id is true"),
        ('{"id": "1", "prediction": "x", "benchmark": "y"}', "line 2 .*answers 'y'"),
        ('{"id": "1", "prediction": "x", "split": 3}', "line 2"),
        ("[1]", "line 2 .* no JSON object"),
        ('{"id": "1", "predic', "line 2 .*not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 0, "prediction": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=told):
        read_answers(path, "x")


def test_an_interrupted_last_line_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    whole = Answer(benchmark="x", split="", id="0", prediction="fine").line()
    for cut in range(len(whole)):
        path.write_text(whole + whole[:cut])
        assert len(read_answers(path, "x", cut_last=True)) == 1
    path.write_text(whole + json.dumps({"id": "1", "prediction": "no line break"}))
    assert len(read_answers(path, "x", cut_last=True)) == 1


def test_metrics_weigh_items() -> None:
    weights = np.array([0.0, 2.0, 1.0])
    assert mean([5.0, 1.0, 4.0], scale=100)(weights) == pytest.approx(200)
    assert ratio([1, 2, 3], [4, 5, 6])(weights) == pytest.approx(7 / 16)
    assert np.isnan(ratio([1, 2, 3], [1, 0, 0])(weights))
    assert average([mean([1.0, 1.0, 1.0]), mean([0.0, 3.0, 0.0])])(weights) == pytest.approx(1.5)


def test_intervals_cover_what_they_should() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        values = (rng.random(100) < 0.3).astype(float)
        [found] = estimates({"m": mean(values)}, [str(n) for n in range(100)], seed=trial).values()
        assert found.value == pytest.approx(values.mean())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.3 <= found.high
    assert 50 <= covered <= 60  # 95% of 60 is 57


def test_clusters_are_drawn_whole() -> None:
    values = np.repeat([0.0, 1.0] * 5, 20)  # 10 pictures whose 20 questions agree
    [alone] = estimates({"m": mean(values)}, [str(n) for n in range(200)]).values()
    [together] = estimates({"m": mean(values)}, [str(n // 20) for n in range(200)]).values()
    assert alone.low is not None and alone.high is not None  # noqa: PT018
    assert together.low is not None and together.high is not None  # noqa: PT018
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_what_is_undefined_has_no_number() -> None:
    found = estimates({"m": ratio([1.0], [0.0])}, ["a"])["m"]
    assert (found.value, found.low, found.high) == (None, None, None)
    assert estimates({"m": mean([])}, [])["m"].value is None
