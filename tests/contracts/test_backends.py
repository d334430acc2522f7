"""What is asked of every file in `distributed_mi/interests/backends`."""

import importlib.util
import inspect
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from distributed_mi.core.config import ConfigModel, content_hash
from distributed_mi.core.registry import choices, resolve
from distributed_mi.interests.answer import answer_model, json_schema
from distributed_mi.interests.backends.base import Backend, BackendContext, Request
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.parse import ParsedAnswer, parse_answer
from distributed_mi.interests.prompts import render
from tests.fake_openai import FakeOpenAI
from tests.tiny_llm import write_tiny_llm
from tests.unit.interests.fakes import SCRIPTED, InOtherProcess

MAX_INTERESTS, MAX_CHARS, NUM_ITEMS = 3, 40, 30
MODEL = answer_model(
    max_interests=MAX_INTERESTS,
    max_interest_chars=MAX_CHARS,
    max_items_per_interest=5,
    max_item_index=NUM_ITEMS,
)
CATALOGUE = [
    HistoryItem(
        i,
        f"{['jazz', 'noir'][i % 2]} item number {i}",
        ("Shop", ["Music", "Film"][i % 2]),
        item_id=f"B{i}",
    )
    for i in range(1, NUM_ITEMS + 1)
]
NAMES = sorted({*choices("backend"), SCRIPTED})


@contextmanager
def tiny_model(folder: Path) -> Iterator[dict[str, Any]]:
    """A model on disk, and the library that runs it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    yield {"model": str(write_tiny_llm(folder)), "max_model_len": 2048, "kv_cache_gib": 1}


@contextmanager
def server(folder: Path) -> Iterator[dict[str, Any]]:
    """A server that gives good answers."""
    with FakeOpenAI().running() as running:
        yield {"model": "fake", "base_url": running.url, "api_key_env": ""}


@contextmanager
def file_of_answers(folder: Path) -> Iterator[dict[str, Any]]:
    """A file with an answer for each user of `requests`, whose support is the first item of any history of theirs."""
    path = folder / "answers.jsonl"
    rows = [
        {
            "user_id": f"U{user}",
            "interests": [{"text": f"interest of {user}", "item_ids": [first_item(user).item_id]}],
        }
        for user in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    yield {"path": str(path)}


NEEDS = {"vllm": tiny_model, "openai_http": server, "precomputed": file_of_answers}
"""Backend -> what it needs around it, as a context of a folder that gives settings."""


def first_item(user: int) -> HistoryItem:
    return CATALOGUE[user * 5 % NUM_ITEMS]


@pytest.fixture(scope="module", params=NAMES)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    cls = resolve("backend", request.param)
    context = BackendContext(json_schema(MODEL), MAX_INTERESTS, MAX_CHARS, CATALOGUE)
    folder = tmp_path_factory.mktemp("backend")
    with NEEDS[request.param](folder) if request.param in NEEDS else nullcontext({}) as settings:
        config = cls.Config(**settings)
        if cls.in_process:
            yield cls(config, context)
            return
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield InOtherProcess(request.param, config, context, process)  # type: ignore[misc]


def requests(count: int, history: int = 6) -> list[Request]:
    made = []
    for user in range(count):
        items = tuple(CATALOGUE[(user * 5 + j) % NUM_ITEMS] for j in range(history))
        exemplar = Exemplar(100 + user, items, f"U{user}")
        prompt = render("paper", exemplar, max_interests=MAX_INTERESTS, max_title_chars=50)
        made.append(Request(exemplar, prompt, max_answer_tokens=400))
    return made


def test_every_request_is_answered_once_and_in_order(backend: Backend) -> None:
    asked = requests(5)
    assert [r.user_index for r in backend.generate(asked)] == [100, 101, 102, 103, 104]
    assert [r.user_index for r in backend.generate(asked[::-1])] == [104, 103, 102, 101, 100]
    assert backend.generate([]) == []


def test_requests_stream_in_any_order_each_once(backend: Backend) -> None:
    if not hasattr(backend, "submit"):
        pytest.skip("held in another process, which offers generate alone")
    assert backend.collect() == []
    assert backend.window >= 1
    for request in requests(5):
        backend.submit(request)
    found: list[int] = []
    while len(found) < 5:
        got = [r.user_index for r in backend.collect()]
        assert got
        found += got
    assert sorted(found) == [100, 101, 102, 103, 104]
    assert backend.collect() == []


def test_answers_are_usable_and_counted(backend: Backend) -> None:
    for request, response in zip(requests(5), backend.generate(requests(5)), strict=True):
        assert response.error is None
        assert response.finish_reason == "stop"
        assert response.num_prompt_tokens >= 0
        assert 0 <= response.num_answer_tokens <= request.max_answer_tokens
        MODEL.model_validate(json.loads(response.text))
        parsed = parse_answer(
            response.text,
            [i.item_index for i in request.exemplar.history],
            max_interests=MAX_INTERESTS,
            max_interest_chars=MAX_CHARS,
        )
        assert isinstance(parsed, ParsedAnswer)
        assert 1 <= len(parsed.interests) <= MAX_INTERESTS


def test_the_default_configuration_repeats_its_answers(backend: Backend) -> None:
    first, second = ([r.text for r in backend.generate(requests(4))] for _ in range(2))
    assert first == second


def test_an_answer_does_not_depend_on_its_neighbours(backend: Backend) -> None:
    together = {r.user_index: r.text for r in backend.generate(requests(3))}
    alone = {r.user_index: backend.generate([r])[0].text for r in requests(3)}
    assert alone == together


def test_a_history_of_one_item_is_enough(backend: Backend) -> None:
    response = backend.generate(requests(1, history=1))[0]
    assert response.error is None
    assert json.loads(response.text)["interests"]


def test_identity_is_hashable_and_names_the_model(backend: Backend) -> None:
    assert backend.identity["model"] == backend.model_id
    assert backend.model_id
    assert len(content_hash(backend.identity)) == 64


def test_a_prompt_that_does_not_fit_fails_alone(backend: Backend) -> None:
    good, other = requests(2)
    long = Request(other.exemplar, "word " * 5000, 400)
    first, second = backend.generate([good, long])
    assert (first.user_index, second.user_index) == (100, 101)
    assert first.error is None
    assert first.text == backend.generate([good])[0].text
    limit = backend.config.model_dump().get("max_model_len")
    if limit is None:  # nothing can be too long, so the long prompt has to be answered like any other
        assert (second.error, second.finish_reason) == (None, "stop")
        assert json.loads(second.text)["interests"]
    else:
        assert second.finish_reason == "error"
        assert second.text == ""
        assert str(limit) in (second.error or "")


@pytest.mark.parametrize("name", NAMES)
def test_the_class_says_what_it_needs(name: str) -> None:
    cls = resolve("backend", name)
    assert issubclass(cls, Backend)
    assert issubclass(cls.Config, ConfigModel)
    required: dict[str, Any] = {n: "x" for n, f in cls.Config.model_fields.items() if f.is_required()}
    config = cls.Config(**required)
    assert cls.ray_actor_options(config)["num_cpus"] > 0
    assert set(cls.runtime_env(config)) <= {"env_vars", "pip", "working_dir"}
    assert not inspect.isabstract(cls)
    assert all(f.description for f in cls.Config.model_fields.values())
