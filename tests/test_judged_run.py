"""`visgain eval` with a judge, from answers to metrics.json: interrupted, resumed, replayed, refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fake_judge import Says, Seen, error, reply, serving
from visgain.config import EvalConfig
from visgain.errors import JudgeError
from visgain.evaluation.run import run_eval

KEY = "sk-test-7Qz-never-to-be-seen"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def scores(seen: Seen, _: int = 0) -> Says:
    """Two scores, or a grade where three tokens are allowed, that depend on the request alone."""
    digest = hashlib.sha256(seen.user.encode()).digest()
    return reply(f"0.{digest[0] % 10}" if seen.body.get("max_tokens") == 3 else f"9 {digest[0] % 9 + 1}\nWell.")


@pytest.fixture
def wild(tmp_path: Path) -> dict[str, Any]:
    """A LLaVA-Bench of our own, and answers in its official format."""
    folder = tmp_path / "wild"
    (folder / "images").mkdir(parents=True)
    kinds = ("conv", "detail", "complex")
    files = {
        "questions.jsonl": [
            {"question_id": n, "image": f"{n // 2}.jpg", "text": f"What is {n}?", "category": kinds[n % 3]}
            for n in range(12)
        ],
        "answers_gpt4.jsonl": [{"question_id": n, "text": f"It is {n}."} for n in range(12)],
        "context.jsonl": [{"id": str(n), "image": f"{n}.jpg", "caption": "Numbers."} for n in range(6)],
        "answers.jsonl": [{"question_id": n, "text": f"Perhaps {n}."} for n in reversed(range(12))],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"benchmarks": "llava_bench_wild", "data": folder, "answers": folder / "answers.jsonl"}


def found(out: Path, name: str = "llava_bench_wild") -> tuple[bytes, bytes]:
    return (out / name / "judgements.jsonl").read_bytes(), (out / name / "metrics.json").read_bytes()


def test_interrupted_and_resumed_to_the_same_files(wild: dict[str, Any], tmp_path: Path) -> None:
    with serving(scores) as server:
        judge = {"judge": f"m@{server.url}", "judge_runs": 2, "judge_concurrency": 2}
        server.answer = lambda seen, n: scores(seen) if n < 7 else error(403)
        with pytest.raises(JudgeError):
            run_eval(EvalConfig(**wild, **judge, out=tmp_path / "parts"))
        assert not (tmp_path / "parts/llava_bench_wild/judgements.jsonl").exists()
        server.answer = scores
        before = len(server.seen)
        run_eval(EvalConfig(**wild, **judge, out=tmp_path / "parts"))
        assert len(server.seen) - before == 24 - 7
        (tmp_path / "cache").rename(tmp_path / "forgotten")
        run_eval(EvalConfig(**wild, **judge, out=tmp_path / "whole"))
    assert found(tmp_path / "parts") == found(tmp_path / "whole")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_the_score_is_that_of_the_replies(wild: dict[str, Any], tmp_path: Path) -> None:
    with serving(scores) as server:
        (result,) = run_eval(EvalConfig(**wild, judge=f"m@{server.url}", out=tmp_path / "out"))
    model = [int(json.loads(scores(seen).body)["choices"][0]["message"]["content"][2]) for seen in server.seen]
    assert result.metrics["relative"].value == round(round(sum(model) / 12, 3) / 9 * 100, 1)
    assert result.judge is not None
    assert result.judge["prompt"] == "visgain"
    assert (result.questions, result.unparsed, result.judge["runs"]) == (12, 0, 1)


def test_recorded_reviews_need_no_endpoint(wild: dict[str, Any], tmp_path: Path) -> None:
    reviews = [{"question_id": n, "content": f"{8 + n % 2} {n % 9 + 1}\nx"} for n in range(12)]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (result,) = run_eval(EvalConfig(**wild, judge=str(path), out=tmp_path / "out"))
    model, reference = sum(n % 9 + 1 for n in range(12)) / 12, 8.5
    assert result.metrics["relative"].value == round(round(model, 3) / reference * 100, 1)


def test_unreadable_replies_are_no_score_unless_forced(wild: dict[str, Any], tmp_path: Path) -> None:
    with serving(lambda seen, n: reply("Both are fine.") if "What is 3?" in seen.user else scores(seen)) as server:
        options = {**wild, "judge": f"m@{server.url}", "out": tmp_path / "out"}
        with pytest.raises(JudgeError, match=r"1 of the judge's 12 replies hold no grade .*, more than 2 %"):
            run_eval(EvalConfig(**options))
        assert not (tmp_path / "out/llava_bench_wild/metrics.json").exists()
        (result,) = run_eval(EvalConfig(**options, force=True))
    assert result.unparsed == 1


@pytest.mark.slow
def test_the_embedded_model_on_real_questions(shared_data: Path, tmp_path: Path) -> None:
    """Asked, judged, interrupted in the judge's work, resumed; both benchmarks whole."""
    names = ("llava_bench_wild", "mmvet")
    options = {"benchmarks": ",".join(names), "data": shared_data, "max_new_tokens": 8, "batch_size": 32}
    with serving(scores) as server:
        judge = {"judge": f"m@{server.url}", "model": "embedded"}
        server.answer = lambda seen, n: scores(seen) if n < 100 else error(401)
        with pytest.raises(JudgeError):
            run_eval(EvalConfig(**options, **judge, out=tmp_path / "parts"))
        server.answer = scores
        before = len(server.seen)
        run_eval(EvalConfig(**options, **judge, out=tmp_path / "parts"))
        assert len(server.seen) - before == 60 + 174 - 100
        (tmp_path / "cache").rename(tmp_path / "forgotten")
        results = run_eval(EvalConfig(**options, **judge, out=tmp_path / "whole"))
    for name in names:
        assert found(tmp_path / "parts", name) == found(tmp_path / "whole", name)
    assert [result.questions for result in results] == [60, 174]
    assert {"rec", "ocr", "know", "gen", "spat", "math"} <= set(results[1].metrics)
