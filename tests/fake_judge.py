"""A chat completions server on this machine that misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Says:
    """One HTTP response."""

    status: int = 200
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds before the first byte
    trickle: float = 0.0  # seconds between bytes
    cut: int | None = None  # bytes of the body after which the connection ends, though more was promised


@dataclass(frozen=True, kw_only=True)
class Seen:
    body: dict[str, Any]
    headers: Mapping[str, str]
    path: str
    at: float

    @property
    def user(self) -> str:
        return str(self.body["messages"][-1]["content"])


def reply(text: str | None, **changes: Any) -> Says:
    """An ordinary completion."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    whole = {"model": "fake-1", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    return Says(body=json.dumps({**whole, **changes}).encode())


def error(status: int, message: str = "no", *, headers: Mapping[str, str] | None = None, **more: Any) -> Says:
    return Says(status=status, body=json.dumps({"error": {"message": message, **more}}).encode(), headers=headers or {})


class FakeJudge(ThreadingHTTPServer):
    """`answer` makes a response of a request and the number of those before it."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Seen, int], Says]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.seen: list[Seen] = []
        self.most = 0  # requests at the same time
        self.now = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that have gone away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeJudge

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            seen = Seen(body=body, headers=dict(self.headers), path=self.path, at=time.monotonic())
            before = len(server.seen)
            server.seen.append(seen)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            says = server.answer(seen, before)
            time.sleep(says.delay)
        finally:
            with server.lock:  # before the first byte: after the last, the client may have sent its next request
                server.now -= 1
        self._say(says)

    def _say(self, says: Says) -> None:
        self.send_response(says.status)
        self.send_header("Content-Length", str(len(says.body)))
        for name, value in says.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if says.trickle:
            for byte in says.body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(says.trickle)
        else:
            self.wfile.write(says.body[: says.cut])

    def log_message(self, *args: Any) -> None:
        """Not on stderr."""


@contextmanager
def serving(answer: Callable[[Seen, int], Says] | list[Says]) -> Iterator[FakeJudge]:
    """A server that answers with a function, or with a list of responses whose last one is repeated."""
    script = answer

    def scripted(seen: Seen, n: int) -> Says:
        assert isinstance(script, list)
        return script[min(n, len(script) - 1)]

    server = FakeJudge(scripted if isinstance(answer, list) else answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
