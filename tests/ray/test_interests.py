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
from distributed_mi.interests.answer import answer_model
from distributed_mi.interests.backends.base import BackendContext
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.pool import ActorPool, Job
from distributed_mi.interests.stage import run
from tests.tiny_llm import write_tiny_llm
from tests.unit.interests.fakes import NUM_ITEMS, REMOTE, answers_per_user, encode, make_workspace

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

CONTEXT = BackendContext({"type": "object"}, 20, 120)


def remote(**fields: Any) -> InterestsConfig:
    script = {k: fields.pop(k) for k in list(fields) if k not in InterestsConfig.model_fields}
    defaults = {"commit_every": 4, "short_history": 3, "num_actors": 2, "max_retries": 0}
    return InterestsConfig(backend={"name": REMOTE, **script}, **{**defaults, **fields})


def start(config: InterestsConfig, workspace: Workspace) -> Manifest:
    return run(config, workspace, encode=encode, start_ray=lambda: None)


def jobs(count: int) -> list[Job]:
    items = tuple(HistoryItem(i, f"t{i}") for i in range(1, 6))
    return [Job(Exemplar(user, items)) for user in range(count)]


def answered(pool: ActorPool, count: int) -> dict[int, str]:
    """User -> step; each user once."""
    outcomes = [o for finished in pool.run(jobs(count)) for o in finished]
    assert len({o.user_index for o in outcomes}) == len(outcomes) == count
    return {o.user_index: o.step for o in outcomes}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def test_an_actor_that_dies_amid_a_run_costs_nothing_but_its_window(tmp_path: Path, log: Path) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=80)
    manifest = start(remote(kill_once_at=24, log=str(log), in_flight=8), workspace)
    assert manifest.stats["actor_restarts"] == 1
    assert manifest.stats["steps"]["first"] == 40
    # two engines, and the one in place of the dead one, were held for some time each
    assert manifest.stats["ledger"]["engine_seconds"] > 0.0
    answers = workspace.stage("interests").read("answers", "answers")["user_index"].to_pylist()
    assert sorted(answers) == list(range(0, 80, 2))
    calls = answers_per_user(log)
    assert set(calls) == set(answers)
    assert sum(calls.values()) <= 40 + 8


def test_a_prompt_that_kills_its_actor_is_found_and_given_up_alone(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=24)
    config = remote(kill=[6], max_failed_fraction=0.1, num_actors=1)
    manifest = start(config, workspace)
    assert manifest.stats["failed"] == 1
    # twelve kill an actor, then six, three, one or two of them, and the exemplar alone two
    assert 5 <= manifest.stats["actor_restarts"] <= 6
    rows = workspace.stage("interests").read("answers", "answers").to_pylist()
    assert [r["user_index"] for r in rows if r["step"] == "keyphrase"] == [6]
    assert len(rows) == 12
    failures = (Path(workspace.stage("interests").base) / "failures.jsonl").read_text()
    assert "actor_died" in failures


def test_suspects_are_alone_in_their_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    # Were others in the same actor, one that has done nothing would be blamed for the next death.
    pool = ActorPool(remote(kill=[6], num_actors=2, in_flight=12), CONTEXT)
    groups: set[frozenset[int]] = set()
    send = pool._send

    def watched() -> None:
        send()
        groups.update(frozenset(s.held) for s in pool._seats if s.suspect and s.held)

    monkeypatch.setattr(pool, "_send", watched)
    steps = answered(pool, 48)
    assert [user for user, step in steps.items() if step != "first"] == [6]
    assert {len(g) for g in groups if 6 in g} == {6, 3, 2, 1} or {len(g) for g in groups if 6 in g} == {
        6,
        3,
        1,
    }
    assert frozenset({6}) in groups


@pytest.mark.slow
def test_many_bad_prompts_of_all_kinds_do_not_stop_a_run(log: Path) -> None:
    config = remote(
        kill=[3, 50, 51],
        dead=[20],
        poison=[30, 31],
        refuse=[40],
        always_prose=[45],
        num_actors=2,
        in_flight=16,
    )
    pool = ActorPool(config, CONTEXT)
    steps = answered(pool, 80)
    assert sorted(u for u, step in steps.items() if step != "first") == [3, 20, 30, 31, 40, 45, 50, 51]


def test_an_engine_that_never_answers_stops_the_stage() -> None:
    pool = ActorPool(remote(dead=list(range(40)), num_actors=1, max_actor_restarts=3), CONTEXT)
    with pytest.raises(StageError, match="max_actor_restarts = 3"):
        list(pool.run(jobs(40)))
    assert pool.restarts == 4
    assert pool.pids == []


def test_an_actor_that_hangs_is_replaced(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_mi.interests.pool.POLL_S", 0.2)
    pool = ActorPool(remote(hang=[5], log=str(log), num_actors=1, answer_timeout_s=1.0), CONTEXT)
    assert set(answered(pool, 12).values()) == {"first"}
    assert pool.restarts == 1


def test_actors_come_while_prompts_wait_and_go_when_they_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ActorPool(remote(num_actors=(1, 3), in_flight=4), CONTEXT)
    seats: list[int] = []
    scale = pool._scale

    def watched() -> None:
        scale()
        seats.append(len(pool._seats))

    monkeypatch.setattr(pool, "_scale", watched)
    assert len(answered(pool, 400)) == 400
    assert 1 < max(seats) <= 3
    few = ActorPool(remote(num_actors=(2, 3), in_flight=4), CONTEXT)
    assert len(answered(few, 1)) == 1


def test_a_backend_that_cannot_start_says_why() -> None:
    config = InterestsConfig(backend={"name": "tests.unit.interests.fakes:BrokenBackend"})
    with pytest.raises(StageError, match=r"could not start.*no weights here"):
        list(ActorPool(config, CONTEXT).run(jobs(1)))


def test_actors_that_never_get_their_resources_stop_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_mi.interests.pool.POLL_S", 0.2)
    config = InterestsConfig(
        backend={"name": "tests.unit.interests.fakes:HugeBackend"}, start_timeout_s=1.0, num_actors=2
    )
    with pytest.raises(StageError, match=r"each asks for .*1000.*free are"):
        list(ActorPool(config, CONTEXT).run(jobs(1)))


def test_the_window_bounds_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ActorPool(remote(num_actors=2, in_flight=5), CONTEXT)
    most = 0
    send = pool._send

    def watched() -> None:
        nonlocal most
        send()
        assert all(len(s.held) <= 5 and len(s.calls) <= 2 for s in pool._seats)
        most = max(most, sum(len(s.held) for s in pool._seats))

    monkeypatch.setattr(pool, "_send", watched)
    assert len(answered(pool, 48)) == 48
    assert 5 <= most <= 10


def vllm_config(model: Path, **fields: Any) -> InterestsConfig:
    return InterestsConfig(
        backend={"name": "vllm", "model": str(model), "max_model_len": 2048, "kv_cache_gib": 1},
        max_interests=3,
        max_interest_chars=32,
        max_items_per_interest=3,
        max_failed_fraction=0.0,
        same_script=False,  # random weights write in any
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
def test_vllm_two_actors_500_exemplars(tmp_path: Path, tiny_llm: Path) -> None:
    """Random weights: only the schema makes answers valid. All are, and nobody falls back."""
    workspace = make_workspace(tmp_path / "w", num_users=1000)
    manifest = start(vllm_config(tiny_llm, commit_every=50, num_actors=2), workspace)
    check_vllm_result(workspace, manifest, 500)
    model = answer_model(
        max_interests=3, max_interest_chars=32, max_items_per_interest=3, max_item_index=NUM_ITEMS
    )
    rows = workspace.stage("interests").read("answers", "answers").to_pylist()
    whole = [r for r in rows if r["step"] == "first"]
    for row in whole:
        model.model_validate_json(row["answer"])
    # others ran out of tokens and were continued, or got more
    assert len(whole) >= 400
    ledger = manifest.stats["ledger"]
    assert ledger["num_cached_tokens"] > 0
    assert ledger["requests"] == ledger["exemplars"] + ledger["retries"]


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
            if not killed and result:
                killed.append(self.pids[0])
                os.kill(self.pids[0], signal.SIGKILL)

    monkeypatch.setattr(ActorPool, "run", run_and_kill)
    manifest = start(config, workspace)
    assert len(killed) == 1
    assert manifest.stats["actor_restarts"] == 1
    check_vllm_result(workspace, manifest, 200)
