"""The client of OpenAI-compatible servers against a scripted one: what is sent, sent again, given up, and hidden."""

import asyncio
import gc
import json
import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distributed_mi.core.config import content_hash
from distributed_mi.core.errors import ConfigError, DistributedMIError, InputError, StageError
from distributed_mi.interests.answer import answer_model, json_schema
from distributed_mi.interests.backends import openai_http
from distributed_mi.interests.backends.base import BackendContext, Request, Response
from distributed_mi.interests.backends.openai_http import OpenAIHttpBackend, seconds_to_wait
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.stage import run
from tests.fake_openai import Call, FakeOpenAI, Reply, completion, error, good_answer
from tests.unit.interests.fakes import encode, make_workspace, no_ray

SCHEMA = json_schema(
    answer_model(max_interests=3, max_interest_chars=40, max_items_per_interest=5, max_item_index=30)
)
KEY = "sk-Not/a-real-key-0123456789"
NOW = 1_700_000_000.0

Make = Callable[..., OpenAIHttpBackend]


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI().running() as fake:
        yield fake


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the backend would have waited; it does not."""
    asked: list[float] = []

    async def sleep(seconds: float) -> None:
        asked.append(seconds)

    monkeypatch.setattr(OpenAIHttpBackend, "sleep", staticmethod(sleep))
    monkeypatch.setattr(OpenAIHttpBackend, "now", staticmethod(lambda: NOW))
    return asked


@pytest.fixture
def make(server: FakeOpenAI, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes backends that talk to the server, and ends them. No key unless the test sets one."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made: list[OpenAIHttpBackend] = []

    def make(**settings: Any) -> OpenAIHttpBackend:
        config = OpenAIHttpBackend.Config(**{"base_url": server.url, "model": "m", **settings})
        made.append(OpenAIHttpBackend(config, BackendContext(SCHEMA, 3, 40)))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def request(user: int = 1, prompt: str | None = None) -> Request:
    return Request(Exemplar(user, (HistoryItem(1, "t"),)), prompt or f"prompt {user} (3) (4)", 100)


def ask(backend: OpenAIHttpBackend, *users: int) -> list[Response]:
    return backend.generate([request(u) for u in users or (1,)])


def at_first(*replies: Reply) -> Callable[[Call], Reply]:
    """These replies to the first attempts at each prompt, then good ones."""
    return lambda call: replies[call.attempt - 1] if call.attempt <= len(replies) else good_answer(call)


def always(reply: Reply) -> Callable[[Call], Reply]:
    return lambda call: reply


def stop_of(backend: OpenAIHttpBackend, *users: int) -> str:
    """Text of the error that stops the run."""
    with pytest.raises(StageError) as caught:
        ask(backend, *users)
    return str(caught.value)


# What is sent, and what comes back.


def test_the_request_holds_prompt_sampling_and_schema(server: FakeOpenAI, make: Make) -> None:
    [response] = ask(make(model="org/m", temperature=0.5, top_p=0.9, seed=7, system_prompt="be brief"))
    [call] = server.calls
    assert call.body == {
        "model": "org/m",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "prompt 1 (3) (4)"},
        ],
        "stream": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "max_tokens": 100,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
        },
    }
    assert "Authorization" not in call.headers
    assert json.loads(response.text)["interests"][0]["item_ids"] == [3, 4]
    assert response == Response(
        1, response.text, num_prompt_tokens=11, num_answer_tokens=7, num_cached_tokens=4
    )


def test_fields_of_the_request_follow_the_configuration(server: FakeOpenAI, make: Make) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 5}
    ask(make(structured="json_object", omit=("temperature", "top_p", "seed"), extra_body=extra))
    ask(make(structured="none", max_tokens_field="max_completion_tokens"))
    first, second = (c.body for c in server.calls)
    assert first["response_format"] == {"type": "json_object"}
    assert not {"temperature", "top_p", "seed"} & first.keys()
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert first["top_k"] == 5
    assert "response_format" not in second
    assert second["max_completion_tokens"] == 100
    assert "max_tokens" not in second


def test_a_truncated_answer_says_so(server: FakeOpenAI, make: Make) -> None:
    server.script = always(Reply(body=completion('{"interests": [{"te', finish_reason="length")))
    [response] = ask(make())
    assert (response.text, response.finish_reason, response.error) == ('{"interests": [{"te', "length", None)


def test_a_reasoning_model_that_ran_out_of_tokens_counts_as_truncated(server: FakeOpenAI, make: Make) -> None:
    server.script = always(Reply(body=completion(None, finish_reason="length")))
    [response] = ask(make())
    assert (response.text, response.finish_reason, response.error) == ("", "length", None)


def test_content_in_parts_is_joined(server: FakeOpenAI, make: Make) -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "image"}, {"type": "text", "text": "c"}, None]
    server.script = always(Reply(body=completion(parts)))
    assert ask(make())[0].text == "abc"


def test_half_a_surrogate_pair_can_be_stored(server: FakeOpenAI, make: Make) -> None:
    server.script = always(Reply(body=completion("a\ud800b")))
    assert ask(make())[0].text.encode() == b"a?b"


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        {},
        {"prompt_tokens": None, "completion_tokens": "7", "prompt_tokens_details": None},
        {"prompt_tokens": -1, "completion_tokens": 1 << 70, "prompt_tokens_details": {"cached_tokens": 0.5}},
    ],
    ids=str,
)
def test_a_server_need_not_count_tokens(server: FakeOpenAI, make: Make, usage: Any) -> None:
    server.script = always(Reply(body=completion("x", usage=usage)))
    [response] = ask(make())
    assert response == Response(1, "x")


# Streaming.


def test_answers_are_given_up_as_they_come(server: FakeOpenAI, make: Make) -> None:
    release = threading.Event()

    def script(call: Call) -> Reply:
        if call.prompt.startswith("prompt 1 "):
            release.wait(10)
        return good_answer(call)

    server.script = script
    backend = make()
    for user in (1, 2, 3):
        backend.submit(request(user))
    found: list[int] = []
    while len(found) < 2:
        found += [r.user_index for r in backend.collect()]
    assert sorted(found) == [2, 3]
    release.set()
    assert [r.user_index for r in backend.collect()] == [1]
    assert backend.collect() == []


def test_generate_keeps_the_order_whatever_comes_first(server: FakeOpenAI, make: Make) -> None:
    def script(call: Call) -> Reply:
        return replace(good_answer(call), delay_s=0.02 * (6 - int(call.prompt.split()[1])))

    server.script = script
    assert [r.user_index for r in ask(make(), 1, 2, 3, 4, 5)] == [1, 2, 3, 4, 5]


def test_no_more_requests_are_under_way_than_allowed(server: FakeOpenAI, make: Make) -> None:
    server.script = lambda call: replace(good_answer(call), delay_s=0.02)
    backend = make(concurrency=3)
    assert backend.window == 6
    assert len(ask(backend, *range(20))) == 20
    assert 2 <= server.most_at_once <= 3


def test_a_request_that_waits_keeps_its_place(
    server: FakeOpenAI, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a server that asks for less would at once be asked by the next in the queue."""
    waiting, seen = threading.Event(), threading.Event()

    async def sleep(seconds: float) -> None:
        waiting.set()
        while not seen.is_set():
            await asyncio.sleep(0.01)

    monkeypatch.setattr(OpenAIHttpBackend, "sleep", staticmethod(sleep))
    server.script = at_first(Reply(429, error("slow down")))
    backend = make(concurrency=1)
    backend.submit(request(1))
    backend.submit(request(2))
    assert waiting.wait(10)
    assert len(server.calls) == 1
    seen.set()
    assert {r.user_index for r in [*backend.collect(), *backend.collect()]} == {1, 2}


def test_submit_returns_at_once(server: FakeOpenAI, make: Make) -> None:
    server.script = lambda call: replace(good_answer(call), delay_s=0.3)
    backend = make(concurrency=2)
    started = time.monotonic()
    for user in range(50):
        backend.submit(request(user))
    assert time.monotonic() - started < 0.2


# What is tried again.


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_a_busy_or_broken_server_is_asked_again(server: FakeOpenAI, make: Make, status: int) -> None:
    page = Reply(status, b"<html>bad gateway</html>", {"Content-Type": "text/html"})
    server.script = at_first(page, Reply(status, error("later")))
    backend = make()
    [response] = ask(backend)
    assert response.error is None
    assert len(server.calls) == 3
    assert backend.retries == 2


@pytest.mark.parametrize(
    "broken",
    [
        Reply(reset=True),
        Reply(body=completion("x"), cut=30),
        Reply(body=completion("x"), cut=0),
        Reply(body=b'{"choices": [{"message": {"content": "x'),
        Reply(body=error("overloaded", code=503)),
    ],
    ids=["reset", "cut", "no body", "broken JSON", "an error inside of a 200"],
)
def test_an_answer_lost_on_the_way_is_asked_for_again(server: FakeOpenAI, make: Make, broken: Reply) -> None:
    server.script = at_first(broken)
    [response] = ask(make())
    assert response.error is None
    assert len(server.calls) == 2


def test_a_request_over_its_time_is_sent_again(server: FakeOpenAI, make: Make) -> None:
    server.script = at_first(Reply(delay_s=0.6))
    [response] = ask(make(timeout_s=0.2))
    assert response.error is None
    assert len(server.calls) >= 2


def test_a_request_that_is_always_over_its_time_is_given_up(server: FakeOpenAI, make: Make) -> None:
    server.script = always(Reply(delay_s=0.5))
    [response] = ask(make(timeout_s=0.1, max_attempts=3))
    assert response.error == "no answer in 0.1 s (after 3 attempts)"


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (Reply(500, error("engine trouble")), "500 Internal Server Error"),
        (Reply(429, error("slow down")), "slow down"),
        (Reply(reset=True), "connection lost"),
        (Reply(body=b'{"choices": ['), "broken JSON"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_attempts_are_counted_and_then_this_prompt_is_given_up(
    server: FakeOpenAI, make: Make, waits: list[float], reply: Reply, text: str
) -> None:
    server.script = lambda call: reply if "prompt 1 " in call.prompt else good_answer(call)
    bad, good = ask(make(max_attempts=3), 1, 2)
    assert good.error is None
    assert bad.finish_reason == "error"
    assert text in (bad.error or "")
    assert "after 3 attempts" in (bad.error or "")
    assert len(server.calls) == 4
    assert len(waits) == 2


def test_waits_double_up_to_their_bound_and_are_drawn_below_it(
    server: FakeOpenAI, make: Make, waits: list[float]
) -> None:
    server.script = always(Reply(500, error("no")))
    ask(make(max_attempts=6, backoff_s=2.0, max_backoff_s=10.0, concurrency=8), *range(40))
    assert len(server.calls) == 240
    assert len(waits) == 200
    bounds = [2.0, 4.0, 8.0, 10.0, 10.0]
    assert all(0.0 <= w <= 10.0 for w in waits)
    # Uniform draws below the bounds have the mean of half of them; 200 of them, standard deviation under 0.25.
    assert sum(waits) / len(waits) == pytest.approx(sum(bounds) / len(bounds) / 2, abs=1.0)
    assert len(set(waits)) > 190


def test_one_attempt_means_no_retry(server: FakeOpenAI, make: Make, waits: list[float]) -> None:
    server.script = always(Reply(503, error("no")))
    [response] = ask(make(max_attempts=1))
    assert "after 1 attempt)" in (response.error or "")
    assert (len(server.calls), waits) == (1, [])


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("3600", 30.0),
        ("999999999999999999999", 0.0),
        (formatdate(NOW + 12, usegmt=True), 12.0),
        (formatdate(NOW + 1e6, usegmt=True), 30.0),
        (formatdate(NOW - 100, usegmt=True), 0.0),
        ("-5", 0.0),
        ("soon", 0.0),
        ("nan", 0.0),
        ("inf", 0.0),
    ],
)
def test_retry_after_is_honoured_within_the_bound(
    server: FakeOpenAI, make: Make, waits: list[float], header: str, seconds: float
) -> None:
    server.script = at_first(Reply(429, error("slow"), {"Retry-After": header}))
    ask(make(backoff_s=0.0, max_backoff_s=30.0))
    assert waits == [seconds]


def test_the_drawn_wait_is_added_to_retry_after(server: FakeOpenAI, make: Make, waits: list[float]) -> None:
    """Else all requests that were refused together would come again together."""
    server.script = at_first(Reply(429, error("slow"), {"Retry-After": "7"}))
    ask(make(backoff_s=2.0, concurrency=16), *range(16))
    assert all(7.0 <= w <= 9.0 for w in waits)
    assert len(set(waits)) > 8


@pytest.mark.parametrize("value", [None, "", "  ", "Tomorrow", "Mon, 99 Foo 2020 99:99:99 GMT"])
def test_an_unreadable_retry_after_is_no_wish(value: str | None) -> None:
    assert seconds_to_wait(value, NOW) is None


def test_requests_sent_again_are_logged_but_not_each(
    server: FakeOpenAI, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server.script = at_first(Reply(500, error("trouble")))
    with caplog.at_level(logging.INFO):
        backend = make()
        ask(backend, *range(10))
        backend.close()
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "trouble" in warned[0].getMessage()
    assert "sent 10 requests again" in caplog.text


# What concerns one prompt.


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (Reply(400, error("maximum context length is 2048", code="context_length_exceeded")), "2048"),
        (Reply(400, {"object": "error", "message": "too long", "code": 400, "param": None}), "too long"),
        (Reply(400, error("max_tokens is too large", param="max_tokens")), "too large"),
        (Reply(400, error("policy", code="content_filter")), "policy"),
        (Reply(422, {"detail": [{"msg": "bad"}]}), "bad"),
        (Reply(413, b"<html>Request Entity Too Large</html>"), "413"),
        (Reply(body=completion("x", finish_reason="content_filter")), "content filter"),
        (Reply(body=completion("x", choices=[])), "no answer"),
        (Reply(body=completion("x", choices=None)), "no answer"),
        (Reply(body=completion("x", choices=["x"])), "no answer"),
        (Reply(body=error("moderated", code=403)), "moderated"),
        (
            Reply(body=completion("x", choices=[{"message": {"refusal": "I cannot help with that"}}])),
            "I cannot help",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_refused_prompt_fails_alone_and_is_not_sent_again(
    server: FakeOpenAI, make: Make, reply: Reply, text: str
) -> None:
    server.script = lambda call: reply if "prompt 2 " in call.prompt else good_answer(call)
    first, second, third = ask(make(), 1, 2, 3)
    assert (first.error, third.error) == (None, None)
    assert (second.finish_reason, second.text) == ("error", "")
    assert text in (second.error or "")
    assert len(server.calls) == 3


def test_an_answer_that_nobody_thought_of_fails_alone(
    server: FakeOpenAI, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = openai_http._content

    def content(value: Any) -> str:
        if value == "odd":
            raise KeyError("a mistake of ours")
        return read(value)

    monkeypatch.setattr(openai_http, "_content", content)
    odd = Reply(body=completion("odd"))
    server.script = lambda call: odd if "prompt 1 " in call.prompt else good_answer(call)
    first, second = ask(make(), 1, 2)
    assert "KeyError: 'a mistake of ours'" in (first.error or "")
    assert second.error is None
    assert "user 1 failed" in caplog.text


def test_tokens_of_a_refusal_are_counted(server: FakeOpenAI, make: Make) -> None:
    server.script = always(Reply(body=completion("x", finish_reason="content_filter")))
    [response] = ask(make())
    assert (response.num_prompt_tokens, response.num_answer_tokens) == (11, 7)


def test_a_huge_answer_is_not_read_to_its_end(
    server: FakeOpenAI, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert openai_http.MAX_BODY_BYTES == 10_000_000
    monkeypatch.setattr(openai_http, "MAX_BODY_BYTES", 100_000)
    huge = Reply(body=b'{"choices": [' + b" " * 60_000_000)
    server.script = lambda call: huge if "prompt 1 " in call.prompt else good_answer(call)
    bad, good = ask(make(), 1, 2)
    assert good.error is None
    assert "more than 100,000 bytes" in (bad.error or "")
    assert server.bytes_sent < 30_000_000, "what was sent beyond the limit lay in the kernel's buffers"


def test_a_huge_error_is_quoted_only(server: FakeOpenAI, make: Make) -> None:
    server.script = always(Reply(400, b"n\x00o\xe2\x80\xae " * 3_000_000))
    [response] = ask(make())
    assert len(response.error or "") < 300
    assert (response.error or "").startswith("400 Bad Request: no no no")


# What concerns everything.


@pytest.mark.parametrize(
    ("reply", "texts"),
    [
        (Reply(401, error("who are you")), ["401 Unauthorized: ", "who are you", "OPENAI_API_KEY"]),
        (Reply(403, error("not you")), ["403 Forbidden", "not you", "OPENAI_API_KEY"]),
        (Reply(402, error("pay")), ["402", "no credit"]),
        (Reply(429, error("you exceeded your quota", code="insufficient_quota")), ["429", "no credit"]),
        (
            Reply(404, error("The model `m` does not exist")),
            ["404 Not Found", "'m'", "does not exist", "/v1/models", "base_url"],
        ),
        (Reply(404, error("no model m", param="model", code="model_not_found")), ["404", "/v1/models"]),
        (Reply(405, b""), ["405", "nothing", "base_url"]),
        (Reply(204, b""), ["204", "base_url"]),
        (Reply(400, b" <html>plain HTTP to an HTTPS port</html>"), ["400", "plain HTTP", "base_url"]),
        (Reply(400, error("no such schema", param="response_format")), ["no such schema", ".structured"]),
        (
            Reply(400, error("use max_completion_tokens", code="unsupported_parameter")),
            ["use max_completion_tokens", ".max_tokens_field"],
        ),
        (Reply(400, error("what is top_k", param="top_k")), ["what is top_k", ".extra_body"]),
        (
            Reply(200, b"<!doctype html><title>Log in</title>", {"Content-Type": "text/html"}),
            ["no chat completion", "Log in", "base_url"],
        ),
        (Reply(200, b""), ["no chat completion: nothing", "base_url"]),
        (Reply(200, ["a", "list"]), ["no chat completion", "list"]),
        (Reply(200, {"hello": "world"}), ["no chat completion", "world"]),
        (Reply(200, b'data: {"choices": []}'), ["no chat completion", "data:"]),
        (Reply(200, b"[" * 100_000), ["no chat completion"]),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_an_error_of_everything_stops_at_once_and_says_what_to_do(
    server: FakeOpenAI, make: Make, waits: list[float], reply: Reply, texts: list[str]
) -> None:
    server.script = always(reply)
    message = stop_of(make(extra_body={"top_k": 5}))
    assert message.startswith(f"{server.url}/chat/completions ")
    for text in texts:
        assert text in message
    assert len(message) < 900
    assert (len(server.calls), waits) == (1, [])


def test_nothing_is_sent_after_the_stop(server: FakeOpenAI, make: Make) -> None:
    server.script = always(Reply(401, error("no")))
    backend = make(concurrency=2)
    stop_of(backend, *range(100))
    time.sleep(0.1)
    sent = len(server.calls)
    assert sent <= 2, "those that were under way"
    for user in range(200, 210):
        backend.submit(request(user))
    with pytest.raises(StageError, match="401"):
        backend.collect()
    time.sleep(0.1)
    assert len(server.calls) == sent


def test_answers_that_had_come_are_given_up_before_the_stop(server: FakeOpenAI, make: Make) -> None:
    server.script = lambda call: (
        Reply(401, error("revoked")) if "prompt 3 " in call.prompt else good_answer(call)
    )
    backend = make(concurrency=1)
    for user in (1, 2, 3, 4):
        backend.submit(request(user))
    found: list[int] = []

    def collect_all() -> None:
        while True:
            found.extend(r.user_index for r in backend.collect())

    with pytest.raises(StageError, match="revoked"):
        collect_all()
    assert found == [1, 2]
    with pytest.raises(StageError, match="revoked"):
        backend.collect()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(server: FakeOpenAI, make: Make, status: int) -> None:
    server.script = always(Reply(status, b"", {"Location": f"{server.url}/elsewhere?token=abc"}))
    message = stop_of(make())
    assert "Redirects (to 127.0.0.1) are not followed" in message
    assert "token" not in message
    assert server.others == []


def test_a_server_that_does_not_listen_stops_the_run_after_all_attempts(
    make: Make, waits: list[float]
) -> None:
    gone = FakeOpenAI()
    gone._server.server_close()
    message = stop_of(make(base_url=gone.url, max_attempts=4))
    assert f"{gone.url}/chat/completions cannot be reached after 4 attempts" in message
    assert "interests.backend.base_url" in message
    assert len(waits) == 3


def test_a_server_that_speaks_no_http_stops_the_run(make: Make, waits: list[float]) -> None:
    with greeting_server(b"SSH-2.0-OpenSSH_9.6\r\n") as url:
        message = stop_of(make(base_url=url))
    assert "does not speak HTTP" in message
    assert waits == []


@contextmanager
def greeting_server(greeting: bytes) -> Iterator[str]:
    """A server of another kind, which greets and hangs up."""

    def serve(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)  # ends `accept`


# The key.


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    return KEY


def test_the_key_is_sent(server: FakeOpenAI, make: Make, key: str) -> None:
    ask(make(api_key_env="MY_KEY"))
    assert server.calls[0].headers["Authorization"] == f"Bearer {key}"


def echo(status: int) -> Callable[[Call], Reply]:
    """Says the key back, as some servers do."""

    def script(call: Call) -> Reply:
        said = call.headers["Authorization"]
        return Reply(status, error(f"wrong key: {said}", code="x"), {"X-Echo": said})

    return script


@pytest.mark.parametrize("status", [200, 301, 400, 401, 404, 429, 500])
def test_the_key_shows_nowhere(
    server: FakeOpenAI, make: Make, key: str, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    server.script = echo(status)
    shown: list[str] = []
    with caplog.at_level(logging.DEBUG):
        backend = make(api_key_env="MY_KEY", max_attempts=2)
        try:
            shown += map(repr, ask(backend))
        except DistributedMIError as stopped:
            shown += traceback.format_exception(stopped)
            shown += [repr(stopped), repr(stopped.__context__), repr(stopped.__cause__)]
    assert any("wrong key: Bearer [key]" in text for text in shown)
    config = backend.config
    shown += [repr(backend), repr(config), config.model_dump_json(), json.dumps(backend.identity)]
    shown += [repr(vars(backend)), repr(backend._server), caplog.text]
    assert not [text for text in shown if key in text or key.replace("/", r"\/") in text or key[:12] in text]


def test_the_key_does_not_show_when_what_comes_is_no_http(
    make: Make, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with greeting_server(f"nonsense {key}\r\n".encode()) as url, caplog.at_level(logging.DEBUG):
        backend = make(base_url=url, api_key_env="MY_KEY")
        with pytest.raises(StageError, match="does not speak HTTP") as caught:
            ask(backend)
    assert key not in "".join(traceback.format_exception(caught.value)) + caplog.text
    assert caught.value.__context__ is None


def test_the_key_does_not_show_when_the_server_escapes_it(server: FakeOpenAI, make: Make, key: str) -> None:
    def script(call: Call) -> Reply:
        said = json.dumps(error(f"wrong: {call.headers['Authorization']}"))
        return Reply(400, said.replace("/", r"\/").encode())

    server.script = script
    [response] = ask(make(api_key_env="MY_KEY"))
    assert "wrong: Bearer [key]" in (response.error or "")


def test_neither_a_proxy_nor_netrc_gets_in_between(
    server: FakeOpenAI, make: Make, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    [response] = ask(make(api_key_env="MY_KEY", max_attempts=1))
    assert response.error is None
    assert server.calls[0].headers["Authorization"] == f"Bearer {key}"


def test_the_key_in_an_answer_is_not_stored(server: FakeOpenAI, make: Make, key: str) -> None:
    server.script = lambda call: Reply(body=completion(f"I was given {call.headers['Authorization']}"))
    assert ask(make(api_key_env="MY_KEY"))[0].text == "I was given Bearer [key]"


def test_a_placeholder_for_a_key_does_not_change_answers(
    server: FakeOpenAI, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "EMPTY")
    server.script = always(Reply(body=completion("EMPTY shelves")))
    assert ask(make(api_key_env="MY_KEY"))[0].text == "EMPTY shelves"


def test_a_wrong_key_is_told_from_a_missing_one(server: FakeOpenAI, make: Make, key: str) -> None:
    server.script = always(Reply(401, error("no")))
    assert "The key in the environment variable MY_KEY is not accepted" in stop_of(make(api_key_env="MY_KEY"))
    assert "No key was sent: put it into the environment variable OTHER" in stop_of(make(api_key_env="OTHER"))
    assert "No key was sent" in stop_of(make(api_key_env=""))


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "sk-\u00e9t\u00e9", "a\x00b"])
def test_a_key_that_cannot_stand_in_a_header_is_refused_by_the_variable_s_name(
    make: Make, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setattr(openai_http.os, "environ", {"MY_KEY": value})
    with pytest.raises(InputError, match="MY_KEY") as caught:
        make(api_key_env="MY_KEY")
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "refused"),
    [
        ("http://llm.example.org/v1", True),
        ("http://10.0.0.7:8000/v1", True),
        ("http://127.0.0.1.example.org/v1", True),
        ("http://localhost.example.org/v1", True),
        ("https://llm.example.org/v1", False),
        ("http://localhost:8000/v1", False),
        ("http://127.8.9.1:8000/v1", False),
        ("http://[::1]:8000/v1", False),
    ],
)
def test_a_key_goes_over_plain_http_to_this_machine_only(
    make: Make, key: str, url: str, refused: bool
) -> None:
    if refused:
        with pytest.raises(InputError, match="plain http") as caught:
            make(base_url=url, api_key_env="MY_KEY")
        assert key not in str(caught.value)
    else:
        make(base_url=url, api_key_env="MY_KEY")
    make(base_url=url, api_key_env="MY_KEY", allow_insecure_http=True)
    make(base_url=url, api_key_env="UNSET")


@pytest.mark.parametrize(
    ("settings", "secret"),
    [
        ({"base_url": "http://me:hunter22@host/v1"}, "hunter22"),
        ({"base_url": "https://hunter22@host/v1"}, "hunter22"),
        ({"base_url": "https://host/v1?key=hunter22"}, "hunter22"),
        ({"base_url": "https://host/v1#hunter22"}, "hunter22"),
        ({"base_url": "me:hunter22@host/v1"}, "hunter22"),
        ({"base_url": "http://me:hunter22@host:port/v1"}, "hunter22"),
        ({"base_url": "http://me:hunter22@[host/v1"}, "hunter22"),
        ({"base_url": "http://a b:hunter22@host"}, "hunter22"),
        ({"base_url": "http:\\\\me:hunter22@host"}, "hunter22"),
        ({"base_url": "ftp://host/hunter22"}, "hunter22"),
        ({"base_url": ""}, None),
        ({"api_key_env": "sk-hunter22"}, "hunter22"),
        ({"api_key_env": "gsk_hunter22"}, "hunter22"),
    ],
    ids=str,
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(
    settings: dict[str, str], secret: str | None
) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))) as caught:
        OpenAIHttpBackend.Config(model="m", **settings)
    text = "".join(traceback.format_exception(caught.value))
    assert secret is None or secret not in text


# Configuration.


@pytest.mark.parametrize(
    "url", ["http://h/v1", "http://h/v1/", "http://h/v1/chat/completions", "http://h/v1/chat/completions/"]
)
def test_base_url_may_end_in_different_ways(url: str) -> None:
    assert OpenAIHttpBackend.Config(model="m", base_url=url).base_url == "http://h/v1"


@pytest.mark.parametrize(
    "settings",
    [
        {"extra_body": {"messages": []}},
        {"extra_body": {"stream": True}},
        {"extra_body": {"temperature": 1}},
        {"extra_body": {"response_format": {}}},
        {"extra_body": {"x": float("nan")}},
        {"model": ""},
        {"concurrency": 0},
        {"max_attempts": 0},
        {"timeout_s": 0.0},
        {"omit": ("model",)},
    ],
    ids=str,
)
def test_a_bad_setting_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        OpenAIHttpBackend.Config(**{"model": "m", **settings})


def test_a_response_format_of_one_s_own_is_allowed_where_none_is_sent() -> None:
    own = {"response_format": {"type": "grammar"}}
    assert OpenAIHttpBackend.Config(model="m", structured="none", extra_body=own).extra_body == own


def test_only_what_decides_an_answer_counts_for_re_runs() -> None:
    def identity(**settings: Any) -> str:
        config = OpenAIHttpBackend.Config(**{"model": "m", **settings})
        return content_hash(OpenAIHttpBackend.identity_of(config))

    same: list[dict[str, Any]] = [
        {"base_url": "http://other:9/v1"},
        {"api_key_env": "OTHER"},
        {"concurrency": 1, "timeout_s": 1.0, "max_attempts": 1, "backoff_s": 0.1, "max_backoff_s": 0.2},
    ]
    other: list[dict[str, Any]] = [
        {"model": "n"},
        {"temperature": 0.1},
        {"seed": 1},
        {"system_prompt": "x"},
        {"structured": "none"},
        {"extra_body": {"top_k": 1}},
        {"omit": ("seed",)},
    ]
    assert {identity(**s) for s in same} == {identity()}
    assert len({identity(), *(identity(**s) for s in other)}) == len(other) + 1


# The thread.


def test_the_thread_ends_with_the_backend(server: FakeOpenAI) -> None:
    def threads() -> int:
        return sum(t.name == "openai_http" for t in threading.enumerate())

    before = threads()
    config = OpenAIHttpBackend.Config(base_url=server.url, model="m")
    backend = OpenAIHttpBackend(config, BackendContext(SCHEMA, 3, 40))
    ask(backend)
    assert threads() == before + 1
    del backend
    gc.collect()
    assert threads() == before


def test_closing_drops_what_is_under_way(server: FakeOpenAI, make: Make) -> None:
    server.script = lambda call: Reply(delay_s=1.0)
    backend = make()
    backend.submit(request(1))
    started = time.monotonic()
    backend.close()
    assert time.monotonic() - started < 0.9


# The whole stage.


def stage_config(server: FakeOpenAI, **settings: Any) -> InterestsConfig:
    backend = {
        "name": "openai_http",
        "model": "m",
        "base_url": server.url,
        "api_key_env": "MY_KEY",
        **settings,
    }
    return InterestsConfig(backend=backend, commit_every=4)


def test_the_stage_asks_a_server_and_keeps_no_key(
    server: FakeOpenAI, key: str, waits: list[float], tmp_path: Path
) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=40)
    server.script = at_first(Reply(429, error("slow down")))
    manifest = run(stage_config(server), workspace, encode=encode, start_ray=no_ray)
    assert manifest.stats["steps"]["first"] == 20
    assert manifest.stats["num_answer_tokens"] == 20 * 7
    assert len(server.calls) == 40
    answers = workspace.stage("interests").read("answers", "answers").to_pylist()
    assert {(r["backend"], r["model"]) for r in answers} == {("openai_http", "m")}
    stored = [p.read_bytes() for p in (tmp_path / "w").rglob("*") if p.is_file()]
    stored += [repr(answers).encode(), manifest.to_json()]
    assert not any(key.encode() in data for data in stored)


def test_the_stage_stops_on_a_wrong_key_and_another_address_needs_no_new_answers(
    server: FakeOpenAI, key: str, waits: list[float], tmp_path: Path
) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=40)
    server.script = lambda call: Reply(401, error("no")) if len(server.calls) > 12 else good_answer(call)
    config = stage_config(server, concurrency=1)
    with pytest.raises(StageError, match="401 Unauthorized"):
        run(config, workspace, encode=encode, start_ray=no_ray)
    with FakeOpenAI().running() as other:
        run(stage_config(other), workspace, encode=encode, start_ray=no_ray)
    assert len(other.calls) <= 20 - 8, "what was committed is not asked for again"
