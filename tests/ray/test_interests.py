"""Interests on Ray actors: a scripted backend for everything that can die, and the real vLLM engine on a tiny model."""

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed_mi.core.artifacts import Manifest, Workspace
from distributed_mi.core.errors import StageError
from distributed_mi.interests.backends.base import BackendContext
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.pool import ActorPool
from distributed_mi.interests.stage import run
from tests.tiny_llm import write_tiny_llm
from tests.unit.interests.fakes import REMOTE, answers_per_user, encode, make_workspace

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

CONTEXT = BackendContext({"type": "object"}, 20, 120)


def remote(**fields: Any) -> InterestsConfig:
    script = {k: fields.pop(k) for k in list(fields) if k not in InterestsConfig.model_fields}
    defaults = {"commit_every": 4, "short_history": 3, "num_actors": 2, "max_retries": 0}
    return InterestsConfig(backend={"name": REMOTE, **script}, **{**defaults, **fields})


def start(config: InterestsConfig, workspace: Workspace) -> Manifest:
    return run(config, workspace, encode=encode, start_ray=lambda: None)


def chunks(num_chunks: int, size: int = 4) -> dict[int, list[Exemplar]]:
    items = tuple(HistoryItem(i, f"t{i}") for i in range(1, 6))
    return {c * size: [Exemplar(c * size + i, items) for i in range(size)] for c in range(num_chunks)}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def test_an_actor_that_dies_amid_a_run_costs_nothing_but_its_shards(tmp_path: Path, log: Path) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=80)
    manifest = start(remote(kill_once_at=24, log=str(log)), workspace)
    assert manifest.stats["actor_restarts"] == 1
    assert manifest.stats["steps"]["first"] == 40
    answers = workspace.stage("interests").read("answers", "answers")["user_index"].to_pylist()
    assert answers == list(range(0, 80, 2))
    calls = answers_per_user(log)
    assert set(calls) == set(answers)
    # Sent again at most: what the dead actor had in its window of two shards of four.
    assert sum(calls.values()) <= 40 + 2 * 4


def test_a_prompt_that_kills_its_actor_is_found_and_given_up_alone(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=24)
    config = remote(kill=[6], max_failed_fraction=0.1, num_actors=1)
    manifest = start(config, workspace)
    assert manifest.stats["failed"] == 1
    # The shard of four kills two actors, then its half one, then the exemplar alone one.
    assert manifest.stats["actor_restarts"] == 4
    rows = workspace.stage("interests").read("answers", "answers").to_pylist()
    assert [r["user_index"] for r in rows if r["step"] == "keyphrase"] == [6]
    assert len(rows) == 12
    failures = (Path(workspace.stage("interests").base) / "failures.jsonl").read_text()
    assert "actor_died" in failures


def test_a_task_under_suspicion_is_alone_in_its_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    # An answer that was made just before the death of its actor is lost with it: were others in the same actor, a task
    # that has done nothing would be blamed for the next death and given up.
    pool = ActorPool(remote(kill=[6], num_actors=2, in_flight=3, max_actor_restarts=10), CONTEXT)
    suspects = 0
    send = pool._send

    def watched() -> None:
        nonlocal suspects
        send()
        for seat in pool._seats:
            if any(task.suspect for _, task in seat.tasks):
                suspects += 1
                assert len(seat.tasks) == 1

    monkeypatch.setattr(pool, "_send", watched)
    outcomes = {o.user_index: o.step for _, answered in pool.run(chunks(12)) for o in answered}
    assert suspects > 0
    assert [user for user, step in outcomes.items() if step != "first"] == [6]
    assert len(outcomes) == 48


def test_a_dead_engine_in_a_living_actor_is_replaced() -> None:
    pool = ActorPool(remote(dead=[1], num_actors=1, max_actor_restarts=3), CONTEXT)
    with pytest.raises(StageError, match="max_actor_restarts = 3"):
        list(pool.run(chunks(3)))
    assert pool.restarts == 4
    assert pool.pids == []


def test_an_actor_that_hangs_is_replaced(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_mi.interests.pool.POLL_S", 0.2)
    pool = ActorPool(remote(hang=[5], log=str(log), num_actors=1, answer_timeout_s=1.0), CONTEXT)
    answered = {key: [o.step for o in outcomes] for key, outcomes in pool.run(chunks(3))}
    assert answered == {0: ["first"] * 4, 4: ["first"] * 4, 8: ["first"] * 4}
    assert pool.restarts == 1


def test_a_backend_that_cannot_start_says_why() -> None:
    config = InterestsConfig(backend={"name": "tests.unit.interests.fakes:BrokenBackend"})
    with pytest.raises(StageError, match=r"could not start.*no weights here"):
        next(ActorPool(config, CONTEXT).run(chunks(1)))


def test_actors_that_never_get_their_resources_stop_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_mi.interests.pool.POLL_S", 0.2)
    config = InterestsConfig(
        backend={"name": "tests.unit.interests.fakes:HugeBackend"}, start_timeout_s=1.0, num_actors=2
    )
    with pytest.raises(StageError, match=r"each asks for .*1000.*free are"):
        next(ActorPool(config, CONTEXT).run(chunks(1)))


def test_the_window_bounds_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ActorPool(remote(num_actors=2, in_flight=2), CONTEXT)
    most = 0
    send = pool._send

    def watched() -> None:
        nonlocal most
        send()
        most = max(most, sum(len(s.tasks) for s in pool._seats))

    monkeypatch.setattr(pool, "_send", watched)
    assert len(list(pool.run(chunks(12)))) == 12
    assert 2 <= most <= 4


def vllm_config(model: Path, **fields: Any) -> InterestsConfig:
    return InterestsConfig(
        backend={"name": "vllm", "model": str(model), "max_model_len": 2048, "kv_cache_gib": 1},
        max_interests=3,
        max_interest_chars=32,
        max_items_per_interest=3,
        max_failed_fraction=0.0,
        **fields,
    )


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llm(tmp_path_factory.mktemp("tiny-llm"))


def check_vllm_result(workspace: Workspace, manifest: Manifest, count: int) -> None:
    """`count` valid answers of the model itself, each exemplar once."""
    users = workspace.stage("interests").read("answers", "answers")["user_index"].to_pylist()
    assert len(users) == len(set(users)) == count
    steps = manifest.stats["steps"]
    assert steps["keyphrase"] == 0
    assert sum(steps.values()) == count
    assert manifest.stats["num_answer_tokens"] > 0
    interests = workspace.stage("interests").read("interests", "interests").to_pylist()
    assert {i["user_index"] for i in interests} == set(users)
    assert all(1 <= len(i["text"]) <= 32 for i in interests)


@needs_vllm
def test_vllm_answers_every_exemplar(tmp_path: Path, tiny_llm: Path) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=80)
    manifest = start(vllm_config(tiny_llm, commit_every=16), workspace)
    check_vllm_result(workspace, manifest, 40)
    assert start(vllm_config(tiny_llm), workspace) == manifest


@needs_vllm
@pytest.mark.slow
def test_vllm_two_actors_200_exemplars(tmp_path: Path, tiny_llm: Path) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=400)
    manifest = start(vllm_config(tiny_llm, commit_every=20, num_actors=2), workspace)
    check_vllm_result(workspace, manifest, 200)


@needs_vllm
@pytest.mark.slow
def test_kill_9_of_a_vllm_actor(tmp_path: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=400)
    config = vllm_config(tiny_llm, commit_every=20, num_actors=2)
    killed: list[int] = []
    original: Callable[..., Any] = ActorPool.run

    def run_and_kill(self: ActorPool, work: Any) -> Any:
        for result in original(self, work):
            yield result
            if not killed:
                killed.append(self.pids[0])
                os.kill(self.pids[0], signal.SIGKILL)

    monkeypatch.setattr(ActorPool, "run", run_and_kill)
    manifest = start(config, workspace)
    assert len(killed) == 1
    assert manifest.stats["actor_restarts"] == 1
    check_vllm_result(workspace, manifest, 200)
