"""A server on this machine that speaks OpenAI's chat completions, and a place to put faults in front of one."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Answer = tuple[int, bytes]  # HTTP status and body
SLOW = 1.5  # seconds that the fault "silence" lasts


def odds(body: Body) -> float:
    """The stub's opinion: a log-odds in (-3, 3) that depends on every character of the request."""
    raw = hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).digest()
    return int.from_bytes(raw[:4], "big") / 2**32 * 6 - 3


def completion(text: str | None, top: dict[str, float] | None = None) -> Answer:
    """A reply in OpenAI's form, with the first token's likeliest where they are given."""
    choice: Body = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if top is not None:
        likeliest = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in top.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": likeliest}]}
    usage = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
    return 200, json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def with_logprobs(body: Body) -> Answer:
    """log p(A) - log p(B) = the stub's opinion; asked without logprobs it gives none."""
    opinion = odds(body)
    if not body.get("logprobs"):
        return with_text(body)
    return completion("A" if opinion > 0 else "B", {"A": -1 + opinion / 2, "B": -1 - opinion / 2, "The": -9.0})


def with_text(body: Body) -> Answer:
    """The letter alone, whatever is asked for."""
    return completion(f"**{'A' if odds(body) > 0 else 'B'}**.")


def passed_on(url: str) -> Callable[[Body], Answer]:
    """What another server says to the same request."""

    def ask(body: Body) -> Answer:
        request = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except urllib.error.URLError:  # it is not up yet
            return 503, b"{}"

    return ask


class Server:
    """Answers by a function; ``fault`` names what goes wrong with a request's n-th try, or None.

    Args:
        answer: a request's body -> status and reply.
        fault: a request's body and the number of the try (from 0) -> one of the names in :meth:`_spoil`, or None.
        delay: seconds that each reply takes.
    """

    def __init__(
        self,
        answer: Callable[[Body], Answer],
        fault: Callable[[Body, int], str | None] = lambda body, attempt: None,
        delay: float = 0.0,
    ) -> None:
        self.answer, self.fault, self.delay = answer, fault, delay
        self.asked: list[Body] = []  # every request that came, spoilt or not
        self.times: list[float] = []
        self.answered: list[Body] = []
        self.keys: set[str] = set()
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            attempt = sum(known["messages"] == body["messages"] for known in self.asked)
            self.asked.append(body)
            self.times.append(time.monotonic())
            self.keys.add(handler.headers.get("Authorization", "").removeprefix("Bearer "))
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        time.sleep(self.delay)
        fault = self.fault(body, attempt)
        status, reply = self.answer(body) if fault in (None, "cut", "truncated") else (200, b"")
        with self.lock:
            self.busy -= 1
            if fault is None:
                self.answered.append(body)
        try:
            self._spoil(handler, fault, reply) if fault else _send(handler, status, reply)
        except (BrokenPipeError, ConnectionResetError):  # the client has given up
            handler.close_connection = True

    def _spoil(self, handler: BaseHTTPRequestHandler, fault: str, reply: bytes) -> None:
        kind, _, value = fault.partition(" ")
        match kind:
            case "silence":
                time.sleep(SLOW)
                handler.close_connection = True
            case "429":
                _send(handler, 429, b'{"error": {"message": "slow down"}}', {"Retry-After": value or "0"})
            case "quota":
                _send(handler, 429, b'{"error": {"message": "no money", "code": "insufficient_quota"}}')
            case "status":
                _send(handler, int(value), json.dumps({"error": {"message": f"status {value}"}}).encode())
            case "cut":  # a reset in the middle of the body
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(reply)))
                handler.end_headers()
                handler.wfile.write(reply[: len(reply) // 2])
                handler.wfile.flush()
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                handler.connection.close()
                handler.close_connection = True
            case "truncated":
                _send(handler, 200, reply[: len(reply) // 2])
            case "garbage":
                _send(handler, 200, b"<html>please log in \xff</html>", {"Content-Type": "text/html"})
            case "empty":
                _send(handler, 200, b'{"choices": []}')
            case "null":
                _send(handler, 200, b"null")
            case "echo":  # the key, in the body of an error
                said = f"wrong key {handler.headers['Authorization']} in {dict(handler.headers)}"
                _send(handler, int(value), json.dumps({"error": {"message": said}}).encode())
            case _:
                raise ValueError(f"no fault is called {kind}")


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
