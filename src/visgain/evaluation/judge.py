"""The stage `judge`: each answer goes to a language model (or to recorded reviews), each reply to judgements.jsonl.

A reply is kept on disk the moment it comes, under everything that it depends on. So an interrupted run asks only what
it has not asked, and the same command gives the same judgements.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from tqdm import tqdm

from visgain.data.cache import cache_folder
from visgain.errors import ConfigError
from visgain.evaluation.benchmark import JudgedBenchmark, JudgeRequest, Question
from visgain.evaluation.endpoint import Address, Chat, Endpoint, Reply
from visgain.evaluation.judge_prompt import read_prompt
from visgain.evaluation.judgements import Judgement, replayed, short_hash
from visgain.storage import storage_errors

ATTEMPTS, WARMER = 5, 0.5
"""How often one question is asked until its reply can be read, and by how much the temperature grows each time. The
first repetition, whose wording is another one, keeps the temperature (as MM-Vet's code does)."""

_BYTES_PER_TOKEN = 4  # of UTF-8, roughly, for the estimate


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Who judges, how often, how fast, and where replies are kept."""

    judge: str  # MODEL@URL, or files of recorded reviews with commas between, one or more runs each
    runs: int = 1
    prompt: Path | None = None  # the user's wording
    concurrency: int = 8
    per_minute: float | None = None  # requests
    timeout: float = 300.0  # seconds for one reply
    price: str = ""  # US dollars for a million tokens in and out, as 2.5,10
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("runs", "concurrency", "per_minute", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--judge-{name.replace('_', '-')} is {value}; it must be positive")
        self.prices  # noqa: B018 (a wrong price is told now)

    @property
    def prices(self) -> tuple[float, float] | None:
        """Dollars for a token in and out; None where the user does not say. Raises ConfigError."""
        if not self.price:
            return None
        try:
            into, out = (float(part) / 1e6 for part in self.price.split(","))
        except ValueError:
            into = out = -1.0
        if not (0 <= into < float("inf") and 0 <= out < float("inf")):
            raise ConfigError(f"--judge-price is {self.price!r}; write dollars for a million tokens in and out: 2.5,10")
        return into, out


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run will ask at least: repetitions of unreadable replies come on top."""

    calls: int
    known: int  # replies that are on disk already
    tokens_in: int  # estimated from the length of the texts
    tokens_out: int | None  # at most; None where the benchmark sets no limit
    prices: tuple[float, float] | None

    def __str__(self) -> str:
        out = "any number" if self.tokens_out is None else f"at most {self.tokens_out:,}"
        told = f"{self.calls:,} requests ({self.known:,} more are known), about {self.tokens_in:,} tokens in, {out} out"
        if self.prices is None:
            return f"{told}; with --judge-price IN,OUT also the price"
        least = self.tokens_in * self.prices[0]
        most = "more" if self.tokens_out is None else f"{least + self.tokens_out * self.prices[1]:.2f}"
        return f"{told}, {least:.2f} to {most} US dollars"


def judge_answers(
    benchmark: JudgedBenchmark, questions: Sequence[Question], predictions: Sequence[str], options: JudgeOptions
) -> list[Judgement]:
    """Every run's judgement of the prediction for each question, run after run, questions in their order.

    Raises ConfigError or DataError before anything is asked, JudgeError if the judge fails; what it said until then is
    kept and not asked again.
    """
    address = Address.of(options.judge)
    if address is None:
        return replayed(benchmark, questions, predictions, _files(options.judge))
    prompt = None if options.prompt is None else read_prompt(options.prompt)
    requests = [benchmark.request(q, said, prompt) for q, said in zip(questions, predictions, strict=True)]
    endpoint = Endpoint(address, per_minute=options.per_minute, timeout=options.timeout)
    judge = CachedJudge(endpoint, options.cache or cache_folder() / "judge")
    told = f"visgain: {benchmark.name} goes to {address}: {estimated(requests, judge, options)}"
    tqdm.write(told, file=sys.stderr)

    replies = dict(_asked(benchmark, requests, judge, options))
    named = {"judge": str(address), "prompt": "visgain" if prompt is None else f"user's, {short_hash(prompt)}"}
    return [
        Judgement(
            benchmark=benchmark.name,
            split=question.split,
            id=question.id,
            run=run,
            judgement=reply.text,
            attempts=attempts,
            meta=named | _about(reply) | {"answer": short_hash(said)},
        )
        for run in range(1, options.runs + 1)
        for i, (question, said) in enumerate(zip(questions, predictions, strict=True))
        for reply, attempts in [replies[i, run]]
    ]


def _files(text: str) -> list[Path]:
    """The files of recorded reviews that --judge names. Raises ConfigError."""
    paths = [Path(part.strip()) for part in text.split(",") if part.strip()]
    if not paths or not all(path.is_file() for path in paths):
        wrong = next((repr(str(path)) for path in paths if not path.is_file()), repr(text))
        raise ConfigError(
            f"--judge: {'that URL without a model' if '://' in text else wrong} is no file of recorded reviews, and no "
            "MODEL@URL such as gpt-4o@https://api.openai.com/v1"
        )
    return paths


# ---------------------------------------------------------------- asking


class CachedJudge:
    """An endpoint whose replies are kept in files, each under a hash of all that it depends on."""

    def __init__(self, endpoint: Endpoint, folder: Path) -> None:
        self.endpoint = endpoint
        self._folder = folder

    def known(self, chat: Chat, run: int, attempt: int) -> Reply | None:
        """The reply that is on disk, if there is one."""
        wanted = self._request(chat, run, attempt)
        try:
            kept = json.loads(self._path(wanted).read_bytes())
            if kept["request"] == wanted:
                return Reply(**{**kept["reply"], "changed": tuple(kept["reply"]["changed"])})
        except (OSError, ValueError, LookupError, TypeError):
            pass  # not there, or damaged: it is asked again
        return None

    def reply(self, chat: Chat, run: int, attempt: int) -> Reply:
        """The reply on disk, else the endpoint's, which is on disk then. Raises as `Endpoint.complete`."""
        kept = self.known(chat, run, attempt)
        if kept is not None:
            return kept
        reply = self.endpoint.complete(chat)
        self._keep(chat, run, attempt, reply)
        return self.known(chat, run, attempt) or reply  # of two processes that asked, both go on with the first reply

    def _keep(self, chat: Chat, run: int, attempt: int, reply: Reply) -> None:
        """Put `reply` on disk, unless there is one. Raises StorageError."""
        wanted = self._request(chat, run, attempt)
        path = self._path(wanted)
        temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps({"request": wanted, "reply": asdict(reply)}), encoding="ascii")
                with suppress(OSError):  # there is something (unlike a rename, a link minds), or links are unknown here
                    os.link(temporary, path)
                if self.known(chat, run, attempt) is None:
                    temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def _request(self, chat: Chat, run: int, attempt: int) -> dict[str, Any]:
        address = self.endpoint.address
        return {"url": address.url, "run": run, "attempt": attempt, "body": chat.body(address.model)}

    def _path(self, request: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self._folder / name[:2] / f"{name}.json"


def estimated(requests: Sequence[JudgeRequest], judge: CachedJudge, options: JudgeOptions) -> Cost:
    """What `requests` will cost in all runs."""
    chats = [_chat(request, 0) for request in requests]
    new = [chat for run in range(1, options.runs + 1) for chat in chats if judge.known(chat, run, 0) is None]
    size = sum(len(content.encode("utf-8", "replace")) for chat in new for _, content in chat.messages)
    lengths = [chat.max_tokens for chat in new]
    return Cost(
        calls=len(new),
        known=len(chats) * options.runs - len(new),
        tokens_in=-(-size // _BYTES_PER_TOKEN),
        tokens_out=None if None in lengths else sum(length or 0 for length in lengths),
        prices=options.prices,
    )


def _asked(
    benchmark: JudgedBenchmark, requests: Sequence[JudgeRequest], judge: CachedJudge, options: JudgeOptions
) -> Iterator[tuple[tuple[int, int], tuple[Reply, int]]]:
    """((position, run), (reply, attempts)) as they come. The first failure ends all; what is under way is kept."""
    tasks = [(i, run) for run in range(1, options.runs + 1) for i in range(len(requests))]
    pool = ThreadPoolExecutor(options.concurrency, thread_name_prefix="judge")
    try:
        futures = {pool.submit(_readable, benchmark, requests[i], judge, run): (i, run) for i, run in tasks}
        done = tqdm(as_completed(futures), total=len(tasks), desc=f"judging {benchmark.name}", unit="reply")
        for future in done:
            yield futures[future], future.result()
    except KeyboardInterrupt:
        tqdm.write("visgain: waiting for the replies that are under way, to keep them", file=sys.stderr)
        raise
    finally:
        judge.endpoint.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _readable(benchmark: JudgedBenchmark, request: JudgeRequest, judge: CachedJudge, run: int) -> tuple[Reply, int]:
    """The first reply that can be read, else the last one; and how many there were."""
    attempts = 1 if request.retry is None else ATTEMPTS
    for attempt in range(attempts):
        reply = judge.reply(_chat(request, attempt), run, attempt)
        if benchmark.is_readable(reply.text):
            break
    return reply, attempt + 1


def _chat(request: JudgeRequest, attempt: int) -> Chat:
    user = request.user if attempt == 0 or request.retry is None else request.retry
    system = [("system", request.system)] if request.system else []
    return Chat(
        messages=(*system, ("user", user)),
        temperature=request.temperature + WARMER * max(0, attempt - 1),
        max_tokens=request.max_tokens,
    )


def _about(reply: Reply) -> dict[str, Any]:
    about = {"model": reply.model, "finish": reply.finish, "changed": ", ".join(reply.changed)}
    return {name: value for name, value in about.items() if value} | {"tokens": [reply.tokens_in, reply.tokens_out]}
