"""A language model behind an OpenAI-compatible address: one question, one reply, whatever happens on the way.

Plain `urllib`: it is one POST of JSON, and the standard library neither follows a redirect with the key, nor retries
on its own, nor takes settings from anywhere that is not written here. A reply takes seconds, so that a connection for
each costs nothing.

The key is in the environment variable OPENAI_API_KEY and nowhere else: it is read for each request, sent over https or
to this machine only, and taken out of everything that a server says before that is kept or shown.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import random
import re
import ssl
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from tqdm import tqdm

from visgain.errors import ConfigError, JudgeError

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 8
"""Requests for one reply before giving up; with the waits between them about two minutes."""
LONGEST_WAIT = 300.0
"""Seconds that a server may ask to wait; beyond, the run ends and can be resumed."""
_FIRST_WAIT, _SLOWEST_BACKOFF = 1.0, 60.0  # seconds
_MAX_BODY = 16 << 20  # bytes
_SHOWN = 300  # characters of what a server says
_TRANSIENT = frozenset({408, 409, 425, 429})  # and every 5xx
_ADDRESS = re.compile(r"(?P<model>.+?)@(?P<url>https?://.*)", re.IGNORECASE | re.DOTALL)
_NEWER: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None}
"""Parameters that newer models refuse: their name there, or None where such a model has one setting only."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What is asked: everything that a reply depends on, beside the model and its address."""

    messages: tuple[tuple[str, str], ...]  # role, content
    temperature: float
    max_tokens: int | None

    def body(self, model: str) -> dict[str, Any]:
        """The request's JSON."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        length = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return {"model": model, "messages": messages, "temperature": self.temperature, **length}


@dataclass(frozen=True, kw_only=True)
class Reply:
    text: str  # empty where the model refuses or a filter stops it
    model: str = ""  # which one answered, in the server's words
    finish: str = ""  # why it stopped
    tokens_in: int = 0
    tokens_out: int = 0
    changed: tuple[str, ...] = ()  # parameters that the model does not take, and that were renamed or left out


@dataclass(frozen=True, kw_only=True)
class Address:
    """A model and where it is."""

    model: str
    url: str  # without /chat/completions

    def __str__(self) -> str:
        return f"{self.model}@{self.url}"

    @classmethod
    def of(cls, text: str) -> Address | None:
        """From `MODEL@URL`; None for what is none. Raises ConfigError, which does not repeat a URL that has secrets."""
        match = _ADDRESS.fullmatch(text.strip())
        if match is None:
            return None
        try:
            parts = urlsplit(match["url"])
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise ConfigError(f"--judge {match['model']}@...: that is no valid URL") from None
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ConfigError(
                f"--judge {match['model']}@...: the URL must have no user, password or query; it is written to files. "
                f"The key belongs into the environment variable {KEY_VARIABLE}"
            )
        if not host or not match["url"].isascii() or not match["url"].isprintable() or " " in match["url"]:
            raise ConfigError(
                f"--judge {match['model']}@...: the URL names no host, or has spaces or odd letters in it"
            )
        return cls(model=match["model"], url=match["url"].rstrip("/").removesuffix("/chat/completions"))

    @property
    def is_local(self) -> bool:
        """Whether the host is this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def may_have_key(self) -> bool:
        """Whether nobody on the way can read what is sent."""
        return self.is_local or urlsplit(self.url).scheme.lower() == "https"


class Stopped(Exception):
    """The run ends; the reply was not waited for."""


class _Again(Exception):
    """A request failed in a way that may pass. `wait`: seconds that the server asks for."""

    def __init__(self, why: str, wait: float | None = None, *, everyone: bool = False) -> None:
        super().__init__(why)
        self.wait = wait
        self.everyone = everyone  # whether other requests would fare no better


class Pace:
    """When the next request may start, for all threads together."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def wait(self) -> None:
        """Return when it is the caller's turn. Raises Stopped."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._gap
        self.sleep(start - now)

    def hold(self, seconds: float) -> None:
        """Nobody starts for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Raises Stopped at once when the run ends."""
        if self._stop.wait(max(0.0, seconds)):
            raise Stopped

    def stop(self) -> None:
        self._stop.set()


class Endpoint:
    """Asks one model; used by many threads.

    per_minute: requests a minute, retries included. timeout: seconds for a whole reply. first_wait: seconds before the
    first retry, doubled each time.
    """

    def __init__(
        self,
        address: Address,
        *,
        per_minute: float | None = None,
        timeout: float = 120.0,
        tries: int = TRIES,
        first_wait: float = _FIRST_WAIT,
    ) -> None:
        self.address = address
        self._pace = Pace(per_minute)
        self._timeout = timeout
        self._tries = tries
        self._first_wait = first_wait
        self._renamed: dict[str, str | None] = {}
        self._opener = OpenerDirector()  # without the handlers that follow redirects and raise for a status
        for handler in (ProxyHandler({} if address.is_local else None), HTTPHandler(), HTTPSHandler()):
            self._opener.add_handler(handler)
        _key()  # a key that cannot be sent is told before the first question

    def complete(self, chat: Chat) -> Reply:
        """The reply to `chat`. Raises JudgeError if there is none to be had, Stopped if `stop` was called."""
        why = ""
        for attempt in range(self._tries):
            self._pace.wait()
            try:
                return self._ask(chat)
            except _Again as again:
                why = str(again)
                wait = max(again.wait or 0.0, self._backoff(attempt))
                if wait > LONGEST_WAIT:
                    raise JudgeError(
                        f"{self.address} asks to wait {wait:.0f} s ({why}); what is judged is kept, the same command "
                        "goes on from there"
                    ) from None
                if attempt + 1 < self._tries:
                    tqdm.write(f"visgain: judge: {why}; again in {wait:.1f} s", file=sys.stderr)
                    pause = self._pace.hold if again.everyone else self._pace.sleep
                    pause(wait)
        raise JudgeError(
            f"{self.address} failed {self._tries} times in a row, at last: {why}; what is judged is kept, the same "
            "command goes on from there"
        )

    def stop(self) -> None:
        """Let no request start or wait any more."""
        self._pace.stop()

    def _backoff(self, attempt: int) -> float:
        """Seconds, doubled with each attempt and partly random, lest all threads come back at once."""
        return float(min(_SLOWEST_BACKOFF, self._first_wait * 2**attempt) * random.uniform(0.5, 1.0))

    def _ask(self, chat: Chat) -> Reply:
        """One request, or two where the model refuses a parameter."""
        while True:
            renamed = dict(self._renamed)
            status, headers, content = self._post(_renamed(chat.body(self.address.model), renamed))
            said = _Said.of(content)
            unknown = status == 400 and said.code in ("unsupported_parameter", "unsupported_value")
            if unknown and said.param in _NEWER and said.param not in renamed:
                self._renamed[said.param] = _NEWER[said.param]
                continue
            return self._reply(status, headers, said, tuple(sorted(renamed)))

    def _post(self, body: Mapping[str, Any]) -> tuple[int, Message, bytes]:
        """Status, headers and content, secrets taken out of the latter. Raises _Again."""
        request = Request(  # noqa: S310 (the address is http or https, and the opener knows nothing else)
            f"{self.address.url}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "visgain"},
        )
        key = _key()
        if key and self.address.may_have_key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = _read(response, deadline)
                return response.status, response.headers, _without(content, key)
        except TimeoutError:
            raise _Again(f"no reply in {self._timeout:g} s") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise JudgeError(_certificate(self.address, reason)) from None
            if isinstance(reason, TimeoutError):
                raise _Again(f"no reply in {self._timeout:g} s") from None
            raise _Again(f"no connection, or it broke ({_one_line(str(reason) or type(reason).__name__)})") from None

    def _reply(self, status: int, headers: Message, said: _Said, changed: tuple[str, ...]) -> Reply:
        """What a complete answer means. Raises _Again or JudgeError."""
        told = f"HTTP {status}" + (f": {said.error}" if said.error else "")
        if status == 200 and not said.error:
            return said.reply(changed)
        if said.code == "content_filter":
            return Reply(text="", finish="content_filter", changed=changed)
        if said.code in ("insufficient_quota", "billing_hard_limit_reached"):
            raise JudgeError(f"{self.address} has no money left for this key ({told})")
        if status == 200 or status in _TRANSIENT or status >= 500:
            raise _Again(told, _retry_after(headers), everyone=status in (429, 503))
        if status in (401, 403):
            raise JudgeError(f"{self.address} refuses ({told}); {self._about_key()}")
        if 300 <= status < 400:
            raise JudgeError(f"{self.address} sends us elsewhere ({told}), which is not followed; give the final URL")
        if status == 404:
            raise JudgeError(f"{self.address} does not know that ({told}); is it the model, or is /v1 missing?")
        raise JudgeError(f"{self.address} does not take the request ({told})")

    def _about_key(self) -> str:
        if not _key():
            return f"set the environment variable {KEY_VARIABLE}"
        if not self.address.may_have_key:
            return f"the key in {KEY_VARIABLE} is not sent over http to another machine; use https or a tunnel"
        return f"the key in the environment variable {KEY_VARIABLE} is not accepted there"


@dataclass(frozen=True, kw_only=True)
class _Said:
    """A server's answer, as far as it can be understood. `error`: what it calls one, or what is wrong with it."""

    error: str = ""
    code: str = ""
    param: str = ""
    whole: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, content: bytes) -> _Said:
        try:
            whole = json.loads(content)
        except (ValueError, RecursionError):
            return cls(error=f"not JSON, or cut off: {_one_line(content.decode('utf-8', 'replace')) or 'nothing'}")
        if not isinstance(whole, dict):
            return cls(error=f"not a JSON object: {_one_line(content.decode('utf-8', 'replace'))}")
        error = whole.get("error")
        if isinstance(error, dict):
            texts = {name: str(error.get(name) or "") for name in ("message", "code", "param")}
            return cls(error=_one_line(texts["message"]) or "error", code=texts["code"], param=texts["param"])
        if error or "choices" not in whole:
            return cls(error=_one_line(str(error or whole.get("detail") or whole.get("message") or "no choices")))
        return cls(whole=whole)

    def reply(self, changed: tuple[str, ...]) -> Reply:
        """The first choice. Raises _Again if there is none with a text."""
        whole = self.whole or {}
        try:
            choice = whole["choices"][0]
            content = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise _Again("the reply holds no choice with a message") from None
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if isinstance(part, dict) and "text" in part)
        if not isinstance(content, str | None):
            raise _Again(f"the reply's content is {type(content).__name__}, not text")
        usage = whole.get("usage")
        return Reply(
            text=_valid(content or ""),
            model=_valid(str(whole.get("model") or "")),
            finish=_valid(str(choice.get("finish_reason") or "")),
            tokens_in=_count(usage, "prompt_tokens"),
            tokens_out=_count(usage, "completion_tokens"),
            changed=changed,
        )


def _key() -> str:
    """The key, or nothing. Raises ConfigError, which does not show it, for what cannot be sent."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{KEY_VARIABLE} holds a space, a line break or a letter that no key has; set it again")
    return key


def _without(content: bytes, key: str) -> bytes:
    """`content` without the key, should a server repeat it. Placeholders such as `none` are no secrets."""
    if len(key) < 8:
        return content
    with suppress(ValueError, RecursionError):  # as JSON, letters may be escaped: here those of the key are not
        content = json.dumps(json.loads(content)).encode()
    return content.replace(key.encode(), b"***")


def _renamed(body: dict[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    pairs = {names.get(name, name): value for name, value in body.items()}
    return {name: value for name, value in pairs.items() if name is not None}


def _read(response: Any, deadline: float) -> bytes:
    """The whole body, as long as it takes less than until `deadline` (monotonic seconds)."""
    pieces: list[bytes] = []
    while piece := cast(bytes, response.read1(1 << 16)):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError
        if sum(map(len, pieces)) > _MAX_BODY:
            raise _Again(f"a reply of more than {_MAX_BODY >> 20} MiB")
    return b"".join(pieces)


def _retry_after(headers: Message) -> float | None:
    """Seconds that the server asks to wait: a number, or a date. None if it says nothing that can be understood."""
    text = (headers.get("Retry-After") or "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _certificate(address: Address, error: Exception) -> str:
    why = _one_line(str(getattr(error, "verify_message", "") or error))
    return f"{address}: no safe connection ({why}); SSL_CERT_FILE may name a file with the authorities to trust"


def _valid(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON may hold and files may not."""
    return text.encode("utf-8", "replace").decode()


def _one_line(text: str) -> str:
    """Text from outside as part of a message: short, and nothing that a terminal obeys."""
    text = " ".join(text.split())
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return text if text.isprintable() else ascii(text)
