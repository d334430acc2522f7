"""Interests while things die at random moments, and prompts that ruin what they touch. Everything here is slow."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from distributed_mi.core.artifacts import Workspace
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.pool import ActorPool
from distributed_mi.interests.stage import run
from tests.unit.interests.fakes import REMOTE, answers_per_user, encode, make_workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

ROOT = Path(__file__).resolve().parents[2]
EXEMPLARS = 500
IN_FLIGHT, COMMIT_EVERY, ACTORS = 16, 16, 2
WINDOW = ACTORS * IN_FLIGHT + COMMIT_EVERY
"""Answers that are in flight: held by actors, or finished and not committed yet."""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def config(**fields: Any) -> InterestsConfig:
    script = {k: fields.pop(k) for k in list(fields) if k not in InterestsConfig.model_fields}
    defaults: dict[str, Any] = {
        "commit_every": COMMIT_EVERY,
        "in_flight": IN_FLIGHT,
        "num_actors": ACTORS,
        "short_history": 3,
        "max_retries": 0,
        "max_failed_fraction": 0.0,
    }
    return InterestsConfig(backend={"name": REMOTE, **script}, **{**defaults, **fields})


def check(workspace: Workspace, log: Path, most_again: int) -> None:
    """500 answers, none twice, none missing; at most so many were made again."""
    rows = workspace.stage("interests").read("answers", "answers").to_pylist()
    users = [r["user_index"] for r in rows]
    assert len(users) == EXEMPLARS
    assert sorted(users) == list(range(0, 2 * EXEMPLARS, 2))
    assert {r["step"] for r in rows} == {"first"}
    calls = answers_per_user(log)
    assert set(calls) == set(users)
    again = sum(calls.values()) - EXEMPLARS
    assert again <= most_again, f"{again} answers were made again"


@pytest.mark.parametrize("victim", ["actor", "process"])
@pytest.mark.parametrize("seed", range(10))
def test_an_engine_killed_at_a_random_moment(
    tmp_path: Path, log: Path, seed: int, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ray, or by SIGKILL to the worker process that holds the actor and its engine."""
    workspace = make_workspace(tmp_path / "w", num_users=2 * EXEMPLARS)
    draw, pools = random.Random(seed), list[ActorPool]()
    original = ActorPool.run

    def watched(self: ActorPool, jobs: Any) -> Any:
        pools.append(self)
        return original(self, jobs)

    monkeypatch.setattr(ActorPool, "run", watched)

    def kill() -> None:
        while not pools or len(pools[0].pids) < ACTORS:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.9))
        seat = draw.choice(pools[0]._seats)
        if victim == "actor":
            ray.kill(seat.handle)
        else:
            assert seat.pid is not None
            os.kill(seat.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    manifest = run(config(log=str(log), delay_s=0.06), workspace, encode=encode, start_ray=lambda: None)
    killer.join()
    assert manifest.stats["actor_restarts"] == 1
    check(workspace, log, IN_FLIGHT)


_DRIVER = """
import sys
import ray
from distributed_mi.core.artifacts import Workspace
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.stage import run
from tests.unit.interests.fakes import encode
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
config = InterestsConfig.model_validate_json(sys.argv[2])
run(config, Workspace(sys.argv[3]), encode=encode, start_ray=lambda: None)
"""


@pytest.mark.parametrize("seed", range(10))
def test_a_driver_killed_at_a_random_moment(tmp_path: Path, log: Path, seed: int) -> None:
    workspace, draw = make_workspace(tmp_path / "w", num_users=2 * EXEMPLARS), random.Random(seed)
    address = ray.get_runtime_context().gcs_address
    settings = config(log=str(log), delay_s=0.06).model_dump_json()
    command = [sys.executable, "-c", _DRIVER, address, settings, workspace.url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(command, env=environment)
    while not any(log.iterdir()):
        assert driver.poll() is None
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 0.9))
    driver.kill()
    assert driver.wait(timeout=60) == -signal.SIGKILL
    assert workspace.stage("interests").manifest() is None
    time.sleep(1.0)  # Ray ends the actors of a driver that is gone
    subprocess.run(command, env=environment, check=True, timeout=300)
    check(workspace, log, WINDOW)


def test_prompts_that_crash_hang_exceed_and_talk_do_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 % of each: every exemplar has an answer, and each that is not the model's is counted and sampled."""
    monkeypatch.setattr("distributed_mi.interests.pool.POLL_S", 0.1)
    count = 200
    workspace = make_workspace(tmp_path / "w", num_users=2 * count)
    users = list(range(0, 2 * count, 2))
    random.Random(1).shuffle(users)
    crash, hang, long, prose = (users[i * 10 : (i + 1) * 10] for i in range(4))
    settings = config(
        kill=crash[:5],
        poison=crash[5:],
        always_hang=hang,
        too_long=long,
        always_prose=prose,
        answer_timeout_s=0.4,
        max_failed_fraction=0.2,
        max_actor_restarts=20,
    )
    manifest = run(settings, workspace, encode=encode, start_ray=lambda: None)
    rows = {r["user_index"]: r for r in workspace.stage("interests").read("answers", "answers").to_pylist()}
    assert sorted(rows) == sorted(users)
    fell_back = {u for u, row in rows.items() if row["step"] == "keyphrase"}
    assert fell_back == {*crash, *hang, *long, *prose}
    assert all(row["answer"] for row in rows.values())
    assert manifest.stats["failed"] == 40
    lines = (Path(workspace.stage("interests").base) / "failures.jsonl").read_text().splitlines()
    reasons = {f["user_index"]: f["attempts"][-1]["reason"] for f in map(json.loads, lines)}
    assert set(reasons) == fell_back
    assert {reasons[u] for u in (*crash[:5], *hang)} == {"actor_died"}
    assert {reasons[u] for u in (*crash[5:], *long)} == {"backend_error"}
    assert {reasons[u] for u in prose} == {"not_json"}
