"""The stage `judge`: asked once, kept, resumed to the same result, replayed, and refused where it cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_judge import Says, Seen, error, reply, serving
from visgain.errors import ConfigError, DataError, JudgeError
from visgain.evaluation.benchmark import Item, JudgedBenchmark, Question
from visgain.evaluation.endpoint import Address, Chat, Endpoint, Reply
from visgain.evaluation.judge import CachedJudge, JudgeOptions, estimated, judge_answers
from visgain.evaluation.judge_prompt import filled, read_prompt
from visgain.evaluation.judgements import (
    Judgement,
    judged,
    read_judgements,
    require_readable,
    summary,
    write_judgements,
)
from visgain.evaluation.llava_bench import LlavaBench
from visgain.evaluation.mmhal import MMHal
from visgain.evaluation.mmvet import RETRY, MMVet

KEY = "sk-test-7Qz-never-to-be-seen"
BENCHMARK = MMVet()
QUESTIONS = [
    Question(id=f"v1_{n}", prompt=f"What is {n}?", facts={"reference": f"{n}<OR>it", "capability": ["rec"]})
    for n in range(12)
]
PREDICTIONS = [f"it is {n}" for n in range(12)]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def grade(seen: Seen, _: int = 0) -> Says:
    """A grade that depends on the request alone."""
    digest = hashlib.sha256(json.dumps(seen.body["messages"]).encode()).digest()
    return reply(f"0.{digest[0] % 10}")


def ask(url: str, cache: Path, **options: Any) -> list[Judgement]:
    given = JudgeOptions(judge=f"gpt-x@{url}", cache=cache, **options)
    return judge_answers(BENCHMARK, QUESTIONS, PREDICTIONS, given)


# ---------------------------------------------------------------- asking


def test_every_answer_is_judged_in_every_run_and_in_order(tmp_path: Path) -> None:
    with serving(grade) as server:
        said = ask(server.url, tmp_path, runs=2)
    assert [(one.run, one.id) for one in said] == [(run, q.id) for run in (1, 2) for q in QUESTIONS]
    assert len(server.seen) == 24
    by_text = {seen.user: grade(seen) for seen in server.seen}
    for one, question, text in zip(said[:12], QUESTIONS, PREDICTIONS, strict=True):
        expected = json.loads(by_text[BENCHMARK.request(question, text, None).user].body)
        assert one.judgement == expected["choices"][0]["message"]["content"]
    assert said[0].meta["model"] == "fake-1"
    assert said[0].meta["tokens"] == [7, 3]


def test_what_is_known_is_not_asked(tmp_path: Path) -> None:
    with serving(grade) as server:
        first = ask(server.url, tmp_path)
        assert ask(server.url, tmp_path) == first
        assert len(server.seen) == 12
        ask(server.url, tmp_path, runs=2)
        assert len(server.seen) == 24


@pytest.mark.parametrize("change", ["model", "url", "text", "temperature", "max_tokens", "system", "run", "attempt"])
def test_a_reply_is_kept_under_everything_that_it_depends_on(change: str, tmp_path: Path) -> None:
    with serving([reply("one"), reply("two")]) as server:

        def said(**new: Any) -> str:
            url = f"{server.url}/{new.get('url', '')}"
            judge = CachedJudge(Endpoint(Address(model=new.get("model", "m"), url=url)), tmp_path)
            messages = (("system", new.get("system", "s")), ("user", new.get("text", "u")))
            chat = Chat(messages=messages, temperature=new.get("temperature", 0.0), max_tokens=new.get("max_tokens", 3))
            return judge.reply(chat, new.get("run", 1), new.get("attempt", 0)).text

        assert said() == "one"
        assert said() == "one"
        other = {"temperature": 0.5, "max_tokens": None, "run": 2, "attempt": 1}.get(change, "other")
        assert said(**{change: other}) == "two"
        assert said() == "one"


def test_concurrency_is_used_and_kept_to(tmp_path: Path) -> None:
    def slow(seen: Seen, _: int) -> Says:
        time.sleep(0.05)
        return grade(seen)

    with serving(slow) as server:
        ask(server.url, tmp_path, concurrency=3)
    assert 2 <= server.most <= 3


def interrupted_after(n: int, how: Callable[[], Says | None]) -> Callable[[Seen, int], Says]:
    def answer(seen: Seen, before: int) -> Says:
        return (how() or grade(seen)) if before >= n else grade(seen)

    return answer


def test_a_run_that_a_failure_ended_goes_on_where_it_was(tmp_path: Path) -> None:
    with serving(grade) as server:
        whole = ask(server.url, tmp_path / "whole", runs=2)
        server.answer = interrupted_after(30, lambda: error(401))  # 24 of the whole run, and 6 of this
        with pytest.raises(JudgeError, match="OPENAI_API_KEY"):
            ask(server.url, tmp_path / "parts", runs=2, concurrency=2)
        server.answer = grade
        asked = len(server.seen)
        assert ask(server.url, tmp_path / "parts", runs=2) == whole
    assert len(server.seen) - asked == 24 - 6


def test_a_run_that_control_c_ended_goes_on_where_it_was(tmp_path: Path) -> None:
    def control_c() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with serving(grade) as server:
        whole = ask(server.url, tmp_path / "whole")
        server.answer = interrupted_after(16, control_c)  # 12 of the whole run, and 4 of this
        with pytest.raises(KeyboardInterrupt):
            ask(server.url, tmp_path / "parts", concurrency=1)
        server.answer = grade
        assert ask(server.url, tmp_path / "parts") == whole
        assert len(server.seen) <= 12 + 12 + 1  # what was under way when it ended was kept, too


def test_processes_that_ask_the_same_agree(tmp_path: Path) -> None:
    """The server never says the same twice; whoever is first is right."""
    with serving(lambda seen, n: reply(f"0.{n % 10} {n}")) as server:
        chat = Chat(messages=(("user", "?"),), temperature=0.0, max_tokens=None)
        judges = [CachedJudge(Endpoint(Address(model="m", url=server.url)), tmp_path) for _ in range(6)]
        found: list[Reply] = []
        threads = [threading.Thread(target=lambda j=j: found.append(j.reply(chat, 1, 0))) for j in judges]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({one.text for one in found}) == 1
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"request": {}, "reply": {}}', b"\xff"])
def test_a_damaged_file_of_the_cache_is_asked_again(damage: bytes, tmp_path: Path) -> None:
    with serving(grade) as server:
        first = ask(server.url, tmp_path)
        for path in sorted(tmp_path.rglob("*.json"))[:5]:
            path.write_bytes(damage)
        assert ask(server.url, tmp_path) == first
        assert len(server.seen) == 17
        assert ask(server.url, tmp_path) == first
        assert len(server.seen) == 17


def test_a_file_of_the_cache_under_another_name_is_not_believed(tmp_path: Path) -> None:
    with serving(grade) as server:
        first = ask(server.url, tmp_path)
        paths = sorted(tmp_path.rglob("*.json"))
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, [*contents[1:], contents[0]], strict=True):
            path.write_bytes(content)
        assert ask(server.url, tmp_path) == first
        assert len(server.seen) == 24


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with serving(grade) as server, pytest.raises(Exception, match="file") as told:
        ask(server.url, tmp_path / "file" / "cache")
    assert type(told.value).__name__ == "StorageError"


def test_an_unreadable_grade_is_asked_for_again_as_the_official_script_does(tmp_path: Path) -> None:
    with serving([reply("good"), reply("1.5"), reply("nan"), reply(" 0.5"), reply("0.7 !")]) as server:
        options = JudgeOptions(judge=f"m@{server.url}", cache=tmp_path)
        (said,) = judge_answers(BENCHMARK, QUESTIONS[:1], PREDICTIONS[:1], options)
    assert (said.judgement, said.attempts) == ("0.7 !", 5)
    assert [seen.body["temperature"] for seen in server.seen] == [0.0, 0.0, 0.5, 1.0, 1.5]
    assert [seen.user.endswith(RETRY) for seen in server.seen] == [False, True, True, True, True]
    assert all(seen.body["max_tokens"] == 3 for seen in server.seen)


def test_five_failures_are_enough(tmp_path: Path) -> None:
    with serving([reply("hm")]) as server:
        options = JudgeOptions(judge=f"m@{server.url}", cache=tmp_path)
        (said,) = judge_answers(BENCHMARK, QUESTIONS[:1], PREDICTIONS[:1], options)
    assert (said.judgement, said.attempts, len(server.seen)) == ("hm", 5, 5)
    item = Item(question=QUESTIONS[0], prediction="", judgements=(said.judgement,))
    assert BENCHMARK.score([item], "official").unparsed == 1


def test_the_key_is_in_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda seen, _: reply(f"0.5 {seen.headers['Authorization']}")) as server:
        said = ask(server.url, tmp_path / "cache")
        write_judgements(tmp_path / "judgements.jsonl", said)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 13
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in json.dumps(summary(said)) + "".join(capsys.readouterr())


# ---------------------------------------------------------------- cost


def test_the_cost_is_told_before_anything_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving([error(401)]) as server, pytest.raises(JudgeError):
        ask(server.url, tmp_path, runs=2, price="30,60")
    told = capsys.readouterr().err
    size = sum(len(BENCHMARK.request(q, p, None).user) for q, p in zip(QUESTIONS, PREDICTIONS, strict=True)) * 2
    tokens = -(-size // 4)
    assert f"24 requests (0 more are known), about {tokens:,} tokens in, at most 72 out" in told
    assert f"{tokens * 30e-6:.2f} to {tokens * 30e-6 + 72 * 60e-6:.2f} US dollars" in told


def test_the_cost_leaves_out_what_is_known(tmp_path: Path) -> None:
    requests = [BENCHMARK.request(q, p, None) for q, p in zip(QUESTIONS, PREDICTIONS, strict=True)]
    with serving(grade) as server:
        ask(server.url, tmp_path)
        judge = CachedJudge(Endpoint(Address(model="gpt-x", url=server.url)), tmp_path)
        cost = estimated(requests, judge, JudgeOptions(judge="", runs=3))
    assert (cost.calls, cost.known, cost.tokens_out) == (24, 12, 72)


@pytest.mark.parametrize("price", ["x", "1", "1,2,3", "-1,2", "nan,1", "inf,1", "1;2"])
def test_a_price_that_is_none(price: str) -> None:
    with pytest.raises(ConfigError, match="--judge-price is"):
        JudgeOptions(judge="m@http://h", price=price)


@pytest.mark.parametrize("name", ["runs", "concurrency", "per_minute", "timeout"])
def test_numbers_that_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--judge-{name.replace('_', '-')} is 0; it must be positive"):
        JudgeOptions(judge="m@http://h", **{name: 0})


# ---------------------------------------------------------------- judgements on disk


def test_judgements_come_back_from_their_file(tmp_path: Path) -> None:
    with serving(grade) as server:
        said = ask(server.url, tmp_path, runs=3)
    path = tmp_path / "judgements.jsonl"
    write_judgements(path, said)
    back = read_judgements(path, "mmvet")
    assert [one.line() for one in back] == [one.line() for one in said]
    fields = json.loads(path.read_text().split("\n")[0])
    assert list(fields) == ["benchmark", "split", "id", "run", "judgement", "attempts", "meta"]
    expected = [tuple(said[run * 12 + i].judgement for run in range(3)) for i in range(12)]
    assert judged(QUESTIONS, PREDICTIONS, back) == expected
    assert judged(QUESTIONS, PREDICTIONS, back[::-1]) == expected


def test_recorded_judgements_are_a_judge(tmp_path: Path) -> None:
    with serving(grade) as server:
        said = ask(server.url, tmp_path, runs=2)
    path = tmp_path / "recorded.jsonl"
    write_judgements(path, said)
    again = judge_answers(BENCHMARK, QUESTIONS, PREDICTIONS, JudgeOptions(judge=str(path)))
    assert [one.line() for one in again] == [one.line() for one in said]
    both = judge_answers(BENCHMARK, QUESTIONS, PREDICTIONS, JudgeOptions(judge=f"{path}, {path}"))
    assert sorted({one.run for one in both}) == [1, 2, 3, 4]


def test_reviews_of_others_belong_to_the_answers_that_they_were_replayed_for(tmp_path: Path) -> None:
    path = tmp_path / "grades.json"
    path.write_text(json.dumps({question.id: {"content": ["0.5"]} for question in QUESTIONS}))
    said = judge_answers(BENCHMARK, QUESTIONS, PREDICTIONS, JudgeOptions(judge=str(path)))
    assert judged(QUESTIONS, PREDICTIONS, said) == [("0.5",)] * 12
    with pytest.raises(DataError, match="is of another answer"):
        judged(QUESTIONS, [*PREDICTIONS[1:], "x"], said)


def lines(n: int = 12, **changes: Any) -> list[dict[str, Any]]:
    return [{"benchmark": "mmvet", "id": f"v1_{i}", "judgement": "0.5", **changes} for i in range(n)]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (lines(11), r"1 missing \(v1_11\)"),
        ([*lines(), *lines(1)], r"1 there more than once \(v1_0\)"),
        ([*lines(), {"id": "v1_77", "judgement": ""}], r"1 of no question \(v1_77\)"),
        ([*lines(), *lines(3, run=2)], r"run 2 in .* 9 missing"),
        (lines(judgement=5), "'judgement' is 5, not a string"),
        (lines(run=0), "'run' is 0, not a positive whole number"),
        (lines(run=True), "'run' is True"),
        (lines(attempts="1"), "'attempts' is '1'"),
        (lines(benchmark="mmhal"), "'benchmark' is 'mmhal', not 'mmvet'"),
        (lines(id=1.5), "'id' is 1.5"),
        (lines(split=None), "'split' is None"),
        (lines(meta=[]), r"'meta' is \[\]"),
        (lines(meta={"answer": "0123"}), "v1_0 .* is of another answer"),
    ],
)
def test_recorded_judgements_that_do_not_fit(written: list[dict[str, Any]], told: str, tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    with pytest.raises(DataError, match=told):
        judge_answers(BENCHMARK, QUESTIONS, PREDICTIONS, JudgeOptions(judge=str(path)))


def test_judgements_of_other_answers_are_refused(tmp_path: Path) -> None:
    with serving(grade) as server:
        said = ask(server.url, tmp_path)
    with pytest.raises(DataError, match=r"the judgement of v1_3 .* is of another answer .* run the stage `judge`"):
        judged(QUESTIONS, [*PREDICTIONS[:3], "changed", *PREDICTIONS[4:]], said)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_a_line_survives_whatever_is_in_it(text: str) -> None:
    one = Judgement(benchmark="x", split="", id="1", run=1, judgement=text, meta={"model": text})
    assert "\n" not in one.line()[:-1]
    assert json.loads(one.line()) == {
        **{"benchmark": "x", "split": "", "id": "1", "run": 1, "judgement": text, "attempts": 1},
        "meta": {"model": text},
    }


@pytest.mark.parametrize("judge", ["", "gpt-4o", "nowhere.jsonl", "reviews.jsonl,nowhere.jsonl"])
def test_a_judge_that_is_none(judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is no file of recorded reviews, and no MODEL@URL"):
        judge_answers(BENCHMARK, QUESTIONS, PREDICTIONS, JudgeOptions(judge=judge))


def test_a_url_without_a_model_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as told:
        judge_answers(BENCHMARK, QUESTIONS, PREDICTIONS, JudgeOptions(judge="https://user:hunter2@h/v1"))
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize(("unparsed", "replies"), [(0, 0), (0, 60), (2, 100), (1, 50), (4, 218)])
def test_some_unreadable_replies_are_let_pass(unparsed: int, replies: int) -> None:
    require_readable(unparsed, replies)


@pytest.mark.parametrize(("unparsed", "replies"), [(3, 100), (1, 49), (2, 60), (5, 218), (96, 96)])
def test_too_many_unreadable_replies_are_refused(unparsed: int, replies: int) -> None:
    with pytest.raises(JudgeError, match=rf"{unparsed} of the judge's {replies} replies hold no grade.*--force"):
        require_readable(unparsed, replies)


# ---------------------------------------------------------------- the user's wording


FIELDS = {"question": "Q {answer}?", "reference": "R", "answer": "A"}


@pytest.mark.parametrize(
    ("prompt", "system", "user"),
    [
        ("{question}|{reference}|{answer}", "", "Q {answer}?|R|A"),
        ("system: Be {reference}.\n{question} {answer} {answer}", "Be R.", "Q {answer}? A A"),
        ("SYSTEM:x\n\n{question}{answer}\n", "x", "\nQ {answer}?A\n"),
        ("{{question}} {question} {answer} {{}} { } {a b}", "", "{question} Q {answer}? A {} { } {a b}"),
    ],
)
def test_placeholders(prompt: str, system: str, user: str) -> None:
    assert filled(prompt, FIELDS) == (system, user)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("{question}", r"has no \{answer\}; it may use \{question\}, \{reference\}, \{answer\}"),
        ("", r"has no \{question\}, \{answer\}"),
        ("{question} {answr}", r"has \{answr\}, which stands for nothing here; did you mean 'answer'"),
        ("{} {question} {answer}", r"has \{\}, which stands for nothing here; write one of"),
        ("{question} {answer} {0}", r"has \{0\}"),
    ],
)
def test_placeholders_that_are_wrong(prompt: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        filled(prompt, FIELDS)


def test_a_prompt_that_is_wrong_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("{question}")
    with serving(grade) as server:
        with pytest.raises(ConfigError, match="--judge-prompt has no"):
            ask(server.url, tmp_path / "cache", prompt=tmp_path / "prompt.txt")
        assert server.seen == []


def test_the_users_wording_is_asked_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffsystem: Grüße.\r\n{question}\r\n{reference} / {answer}".encode())
    with serving(grade) as server:
        said = ask(server.url, tmp_path / "cache", prompt=path, concurrency=1)
    assert server.seen[0].body["messages"] == [
        {"role": "system", "content": "Grüße."},
        {"role": "user", "content": "What is 0?\n0 <OR> it / it is 0"},
    ]
    assert said[0].meta["prompt"].startswith("user's, ")


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_prompt_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"cannot read --judge-prompt {path}"):
        read_prompt(path)


@pytest.mark.parametrize("benchmark", [LlavaBench(), MMHal(), MMVet()])
def test_they_are_what_they_say(benchmark: object) -> None:
    assert isinstance(benchmark, JudgedBenchmark)
