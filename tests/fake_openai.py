"""An OpenAI-compatible server on loopback that does what a script says; good answers without one."""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Call:
    """One request as it arrived: `attempt` counts from 1 for each prompt."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    attempt: int

    @property
    def prompt(self) -> str:
        """Text of the user message."""
        return self.body["messages"][-1]["content"]


@dataclass(frozen=True)
class Reply:
    """What is sent back, after `delay_s`. `cut`: bytes of the body really sent before the connection ends."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: int | None = None
    reset: bool = False
    """The connection is reset without a reply."""


def completion(content: Any, *, finish_reason: str = "stop", **more: Any) -> dict[str, Any]:
    """A chat completion; `more` goes into it, an own `usage` for example."""
    message = {"role": "assistant", "content": content}
    usage = {
        "prompt_tokens": 11,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"object": "chat.completion", "choices": [choice], "usage": usage, **more}


def error(message: str, *, code: str | int | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def good_answer(call: Call) -> Reply:
    """One interest, supported by the first two items of the prompt."""
    ids = [int(i) for i in re.findall(r"\((\d+)\)", call.prompt)][:2]
    return Reply(body=completion(json.dumps({"interests": [{"text": "an interest", "item_ids": ids}]})))


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        """Clients that go away are part of the tests."""


class FakeOpenAI:
    """The server; counts what it is asked."""

    def __init__(self, script: Callable[[Call], Reply] = good_answer) -> None:
        self.script = script
        self.calls: list[Call] = []
        self.most_at_once = 0
        self.bytes_sent = 0
        self.others: list[str] = []
        """Paths that were asked for besides /v1/chat/completions."""
        self._at_once = 0
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _QuietServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        """`base_url` of the backend."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @contextmanager
    def running(self) -> "Iterator[FakeOpenAI]":
        """Serve while the context is open."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.others.append(self.path)
                self.send_error(404)

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path != "/v1/chat/completions":
                    fake.others.append(self.path)
                    self.send_error(404)
                    return
                with suppress(ConnectionError):
                    fake._serve(self, json.loads(data))

        return Handler

    def _serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        prompt = body["messages"][-1]["content"]
        with self._lock:
            self._attempts[prompt] += 1
            call = Call(handler.path, dict(handler.headers), body, self._attempts[prompt])
            self.calls.append(call)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self.script(call)
            time.sleep(reply.delay_s)
        finally:
            with self._lock:  # before the reply: the client may send the next request as soon as it has it
                self._at_once -= 1
        self._send(handler, reply)

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        handler.close_connection = reply.reset or reply.cut is not None
        if reply.reset:
            # No lingering: the kernel sends RST and not FIN.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.shutdown(socket.SHUT_RD)
            return
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for start in range(0, len(data[: reply.cut]), 1 << 16):
            self.bytes_sent += handler.wfile.write(data[: reply.cut][start : start + (1 << 16)])
