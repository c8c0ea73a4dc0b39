"""One reply, whatever a server does on the way; and nobody learns the key."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import pytest

from fake_judge import FakeJudge, Says, Seen, error, reply, serving
from visgain.errors import ConfigError, JudgeError, VisgainError
from visgain.evaluation.endpoint import Address, Chat, Endpoint, Stopped

KEY = "sk-test-7Qz-never-to-be-seen"
CHAT = Chat(messages=(("system", "Be fair."), ("user", "Which? \u2028 😀")), temperature=0.5, max_tokens=9)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def endpoint(server: FakeJudge, **options: Any) -> Endpoint:
    return Endpoint(Address(model="gpt-x", url=server.url), **{"first_wait": 0.01, "timeout": 5.0, **options})


def test_what_is_sent_and_what_comes_back() -> None:
    with serving([reply("7 8\nwell")]) as server:
        answer = endpoint(server).complete(CHAT)
    assert (answer.text, answer.model, answer.finish) == ("7 8\nwell", "fake-1", "stop")
    assert (answer.tokens_in, answer.tokens_out, answer.changed) == (7, 3, ())
    assert server.seen[0].path == "/v1/chat/completions"
    assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"
    assert server.seen[0].body == {
        "model": "gpt-x",
        "messages": [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Which? \u2028 😀"}],
        "temperature": 0.5,
        "max_tokens": 9,
    }


def test_no_limit_of_tokens_is_sent_where_there_is_none() -> None:
    with serving([reply("x")]) as server:
        endpoint(server).complete(Chat(messages=(("user", "?"),), temperature=0.0, max_tokens=None))
    assert "max_tokens" not in server.seen[0].body


BAD = {
    "429": error(429),
    "500": error(500, "oops"),
    "502 in HTML": Says(status=502, body=b"<html>bad gateway</html>"),
    "408": error(408),
    "cut off": Says(body=reply("text").body, cut=20),
    "cut off, and its length with it": Says(body=reply("text").body[:20]),
    "nothing": Says(body=b""),
    "a list": Says(body=b"[1]"),
    "no text": Says(body=b"\xff\xfe"),
    "nested": Says(body=b"[" * 100_000),
    "no choices": Says(body=b'{"choices": []}'),
    "a number": Says(body=b'{"choices": [{"message": {"content": 7}}]}'),
    "another format": Says(body=b'{"choices": [{"text": "old"}]}'),
    "no completion": Says(body=b'{"detail": "loading"}'),
    "200 with an error": error(200, "overloaded"),
    "late": Says(delay=3.0, body=reply("too late").body),
    "slow": Says(trickle=0.1, body=reply("too slow").body),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_may_pass_is_asked_again(kind: str) -> None:
    with serving([BAD[kind], BAD[kind], reply("good")]) as server:
        patience = 1.0 if kind in ("late", "slow") else 20.0  # a busy machine may keep even a good reply waiting
        assert endpoint(server, timeout=patience).complete(CHAT).text == "good"
    assert len(server.seen) == 3


def test_patience_ends_with_the_last_reason() -> None:
    with serving([error(500, "first"), error(500, "later")]) as server:
        with pytest.raises(
            JudgeError, match=r"failed 4 times in a row, at last: HTTP 500: later; what is judged is kept"
        ):
            endpoint(server, tries=4).complete(CHAT)
        assert len(server.seen) == 4


def test_waits_grow() -> None:
    with serving([error(500)]) as server, pytest.raises(JudgeError):
        endpoint(server, tries=4, first_wait=0.1).complete(CHAT)
    gaps = [after.at - before.at for before, after in zip(server.seen, server.seen[1:], strict=False)]
    assert all(0.05 * 2**n <= gap <= 0.1 * 2**n + 0.25 for n, gap in enumerate(gaps))


@pytest.mark.parametrize("after", ["1", "0.8", "a date"])
def test_retry_after_is_honoured(after: str) -> None:
    def answer(_: Seen, n: int) -> Says:
        at = formatdate(time.time() + 2, usegmt=True) if after == "a date" else after  # whole seconds, so 1 to 2
        return error(429, headers={"Retry-After": at}) if n == 0 else reply("good")

    with serving(answer) as server:
        endpoint(server).complete(CHAT)
    assert 0.75 <= server.seen[1].at - server.seen[0].at <= 3.5


@pytest.mark.parametrize("after", ["soon", "", "-3", "nan", "0", "Mon, 01 Jan 1990 00:00:00 GMT"])
def test_retry_after_that_says_nothing_does_not_matter(after: str) -> None:
    with serving([error(429, headers={"Retry-After": after}), reply("good")]) as server:
        assert endpoint(server).complete(CHAT).text == "good"


def test_a_server_that_wants_hours_ends_the_run() -> None:
    with serving([error(429, "tomorrow", headers={"Retry-After": "86400"})]) as server:
        with pytest.raises(JudgeError, match=r"asks to wait 86400 s \(HTTP 429: tomorrow\); what is judged is kept"):
            endpoint(server).complete(CHAT)
        assert len(server.seen) == 1


def test_429_holds_everyone() -> None:
    """While one was told to wait, no other thread goes on asking."""
    with serving([error(429, headers={"Retry-After": "0.6"}), reply("good")]) as server:
        asked = endpoint(server)
        first = threading.Thread(target=asked.complete, args=(CHAT,))
        first.start()
        while not server.seen or server.now:
            time.sleep(0.005)
        time.sleep(0.05)
        asked.complete(CHAT)
        first.join()
    assert server.seen[1].at - server.seen[0].at > 0.5


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_told_at_once_and_by_its_variable(status: int) -> None:
    with serving([error(status, f"Incorrect API key provided: {KEY}.")]) as server:
        with pytest.raises(
            JudgeError, match=rf"HTTP {status}: Incorrect API key provided: \*\*\*.*OPENAI_API_KEY"
        ) as told:
            endpoint(server).complete(CHAT)
        assert len(server.seen) == 1
    assert_unseen(told.value)


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving([error(401, "who are you?")]) as server:
        with pytest.raises(JudgeError, match="set the environment variable OPENAI_API_KEY"):
            endpoint(server).complete(CHAT)
        assert "Authorization" not in server.seen[0].headers


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (error(404, "no such model"), "does not know that .*no such model.*is /v1 missing"),
        (error(400, "context too long"), "does not take the request .*context too long"),
        (error(429, "pay", code="insufficient_quota"), "no money left"),
        (Says(status=301, headers={"Location": "http://elsewhere.invalid/"}), "sends us elsewhere"),
        (Says(status=418, body=b"tea\x1b[2Jpot"), r"does not take .*\\x1b"),
    ],
)
def test_what_cannot_pass_is_told_at_once(said: Says, told: str) -> None:
    with serving([said]) as server:
        with pytest.raises(JudgeError, match=told):
            endpoint(server).complete(CHAT)
        assert len(server.seen) == 1


def test_redirects_are_not_followed_and_the_key_goes_nowhere_else() -> None:
    with serving([reply("stolen")]) as other:
        moved = Says(status=307, headers={"Location": f"{other.url}/chat/completions"})
        with serving([moved]) as server, pytest.raises(JudgeError, match="sends us elsewhere"):
            endpoint(server).complete(CHAT)
        assert other.seen == []


def test_refusals_are_empty_replies() -> None:
    with serving([reply(None), error(400, "no", code="content_filter")]) as server:
        asked = endpoint(server)
        assert asked.complete(CHAT).text == ""
        assert asked.complete(CHAT).finish == "content_filter"


def test_content_in_parts_and_half_a_surrogate_pair() -> None:
    parts = [{"type": "text", "text": "0.5"}, {"type": "image"}, {"type": "text", "text": " \ud83d"}]
    with serving([reply(parts)]) as server:  # type: ignore[arg-type]
        assert endpoint(server).complete(CHAT).text == "0.5 ?"


def test_parameters_that_newer_models_refuse_are_renamed_or_left_out() -> None:
    said = [
        error(400, "use another", param="max_tokens", code="unsupported_parameter"),
        error(400, "only 1", param="temperature", code="unsupported_value"),
        reply("good"),
    ]
    with serving(said) as server:
        asked = endpoint(server)
        assert asked.complete(CHAT).changed == ("max_tokens", "temperature")
        assert asked.complete(CHAT).text == "good"
    assert len(server.seen) == 4  # the second question knows it from the start
    assert server.seen[-1].body["max_completion_tokens"] == 9
    assert not {"max_tokens", "temperature"} & set(server.seen[-1].body)


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match="failed 3 times in a row, at last: no connection, or it broke"):
        Endpoint(Address(model="m", url=url), tries=3, first_wait=0.01).complete(CHAT)


def test_connections_that_break() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            for _ in range(2):
                listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(JudgeError, match="failed 2 times in a row, at last: no connection, or it broke"):
            Endpoint(Address(model="m", url=url), tries=2, first_wait=0.01).complete(CHAT)
        thread.join()


def test_tls_with_a_server_that_has_none() -> None:
    with serving([reply("x")]) as server:
        asked = Endpoint(Address(model="m", url=server.url.replace("http:", "https:")), tries=2, first_wait=0.01)
        with pytest.raises(JudgeError, match="failed 2 times"):
            asked.complete(CHAT)


def test_requests_a_minute() -> None:
    with serving([reply("good")]) as server:
        asked = endpoint(server, per_minute=600)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(asked.complete, [CHAT] * 6))
    times = sorted(seen.at for seen in server.seen)
    assert times[-1] - times[0] >= 0.35  # of 0.5, less what the first one was late


def test_stop_ends_waiting_at_once() -> None:
    with serving([error(429, headers={"Retry-After": "200"})]) as server:
        asked = endpoint(server)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(asked.complete, CHAT)
            while not server.seen:
                time.sleep(0.01)
            began = time.monotonic()
            asked.stop()
            with pytest.raises(Stopped):
                waiting.result()
        assert time.monotonic() - began < 2


def test_the_key_is_sent_over_https_or_to_this_machine_only() -> None:
    def may(url: str) -> bool:
        return Address(model="m", url=url).may_have_key

    assert may("https://api.example.org/v1")
    assert may("http://localhost:8000/v1")
    assert may("http://127.0.0.1:8000")
    assert may("http://[::1]:8000")
    assert not may("http://10.0.0.7:8000/v1")
    assert not may("http://localhost.example.org/v1")
    assert not may("http://127.0.0.1.example.org/v1")


def test_a_key_is_withheld_from_others_on_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Address, "may_have_key", False)
    with serving([error(401)]) as server:
        with pytest.raises(JudgeError, match="OPENAI_API_KEY is not sent over http to another machine"):
            endpoint(server).complete(CHAT)
        assert KEY not in str(server.seen[0].headers)


def test_a_proxy_does_not_come_between_us_and_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9/")
    with serving([reply("good")]) as server:
        assert endpoint(server).complete(CHAT).text == "good"


@pytest.mark.parametrize("key", ["sk-1\nX-Evil: 1", "sk 1", "sk-ключ", "sk-\x7f1"])
def test_a_key_that_cannot_be_one_is_told_without_showing_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds a space") as told:
        Endpoint(Address(model="m", url="http://127.0.0.1:1"))
    assert key not in str(told.value)


@pytest.mark.parametrize("escaped", [False, True])
def test_the_key_is_in_no_reply_and_no_message(escaped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that repeats everything it is told, in every way it can."""
    echoes = [
        error(500, f"bad header Bearer {KEY}"),
        Says(status=503, body=f"<html>{KEY}</html>".encode()),
        Says(body=f"not json {KEY}".encode()),
        reply(f"the key is {KEY}", model=KEY),
    ]
    if escaped:
        letters = "".join(f"\\u{ord(letter):04x}" for letter in KEY).encode()
        echoes = [replace(says, body=says.body.replace(KEY.encode(), letters)) for says in echoes]
    with serving(echoes) as server:
        answer = endpoint(server).complete(CHAT)
    assert KEY not in repr(answer)
    assert "***" in answer.text
    with serving([error(400, f"{KEY}")]) as server:
        asked = endpoint(server)
        with pytest.raises(JudgeError) as told:
            asked.complete(CHAT)
    assert_unseen(told.value)
    assert KEY not in repr(vars(asked))
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err


def assert_unseen(problem: BaseException) -> None:
    shown = "".join(traceback.format_exception(problem))
    seen: BaseException | None = problem
    while seen is not None:
        shown += repr(seen) + repr(vars(seen))
        seen = seen.__cause__ or seen.__context__
    assert KEY not in shown


@pytest.mark.parametrize(
    ("text", "model", "url"),
    [
        ("gpt-4o@https://api.openai.com/v1", "gpt-4o", "https://api.openai.com/v1"),
        (" org/model@2024@http://h:8000/v1/ ", "org/model@2024", "http://h:8000/v1"),
        ("m@https://h/v1/chat/completions", "m", "https://h/v1"),
        ("m@HTTP://[::1]:80", "m", "HTTP://[::1]:80"),
    ],
)
def test_addresses(text: str, model: str, url: str) -> None:
    assert Address.of(text) == Address(model=model, url=url)


@pytest.mark.parametrize(
    "text",
    [
        "m@https://user:hunter2@h/v1",
        "m@https://hunter2@h/v1",
        "m@https://h/v1?api-key=hunter2",
        "m@https://h/v1#hunter2",
        "m@https://h:hunter2/v1",
        "m@http://",
        "m@https://h/a b",
        "m@https://hö/v1",
        "m@https://[::1/v1",
    ],
)
def test_addresses_that_are_none_are_told_without_their_secrets(text: str) -> None:
    with pytest.raises(VisgainError, match="URL") as told:
        Address.of(text)
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize("text", ["", "gpt-4o", "reviews.jsonl", "m@ftp://h", "@https://h"])
def test_what_is_no_address(text: str) -> None:
    assert Address.of(text) is None
