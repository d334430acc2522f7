"""Training on two Ray Train workers: the numbers of one worker, errors that reach the caller, other worker counts."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from distributed_mi.core.artifacts import Manifest, Workspace
from distributed_mi.core.errors import ConfigError, InputError, StageError
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.training import elastic, launcher
from distributed_mi.training.checkpoint import load_model
from distributed_mi.training.config import ScalingConfig, TrainConfig
from tests.unit.training.workspaces import HitsOfLastItem, make_prepared, tiny_config

pytestmark = pytest.mark.ray  # the shared Ray has 8 logical CPUs on one machine

ONE = ScalingConfig(num_workers=1, threads_per_worker=1)
TWO = ScalingConfig(num_workers=2, threads_per_worker=1)


def train(
    workspace: Workspace, config: TrainConfig, scaling: ScalingConfig, validate: Any = None
) -> Manifest:
    validate = validate or HitsOfLastItem(workspace, config.max_history)
    return launcher.run(config, scaling, workspace, validate=validate, start_ray=lambda: None)


def losses(workspace: Workspace) -> list[float]:
    text = Path(workspace.stage("train/remi").path("metrics.jsonl")).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [x["loss"] for x in lines if x["kind"] == "train"]


def test_two_workers_give_the_losses_and_metrics_of_one(ray_local: None, tmp_path: Path) -> None:
    config = tiny_config(max_steps=60)
    one, two = make_prepared(tmp_path / "one"), make_prepared(tmp_path / "two")
    alone, shared = train(one, config, ONE), train(two, config, TWO)
    assert shared.stats["num_workers"] == 2
    assert losses(two)[:50] == pytest.approx(losses(one)[:50], abs=1e-4)
    assert shared.stats["validation"] == pytest.approx(alone.stats["validation"], abs=1e-3)
    model = load_model(two.fs, two.stage("train/remi").path("model"))
    assert HitsOfLastItem(two, 8)(model, WorkerGroup.alone())["recall@50"] == shared.stats["best_value"]
    assert not list(Path(two.root).glob(".ray-*"))


@pytest.mark.slow
def test_a_run_that_one_worker_began_continues_on_two(ray_local: None, tmp_path: Path) -> None:
    config = tiny_config(max_steps=40, engine={"name": "deepspeed", "zero_stage": 1})
    workspace, whole = make_prepared(tmp_path / "parts"), make_prepared(tmp_path / "whole")
    validate = HitsOfLastItem(workspace, config.max_history)
    calls: list[int] = []

    def killing(model: Any, group: WorkerGroup) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(model, group)

    with pytest.raises(KeyboardInterrupt):
        train(workspace, config, ONE, killing)
    resumed, undisturbed = train(workspace, config, TWO), train(whole, config, ONE)
    assert losses(workspace) == pytest.approx(losses(whole), abs=1e-4)
    assert resumed.stats["validation"] == pytest.approx(undisturbed.stats["validation"], abs=1e-3)


@pytest.mark.parametrize("max_failures", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_an_error_of_one_worker_reaches_the_caller_as_it_was_raised(
    ray_local: None, tmp_path: Path, max_failures: int
) -> None:
    """Worker 1 fails while worker 0 waits for it; the work is not tried again although restarts are allowed."""
    scaling = TWO.model_copy(update={"max_failures": max_failures})
    attempts = tmp_path / "attempts"
    attempts.mkdir()

    def work(payload: dict[str, Any], group: WorkerGroup) -> dict[str, Any]:
        if group.rank == 1:
            (Path(payload["attempts"]) / str(len(list(Path(payload["attempts"]).iterdir())))).touch()
            raise InputError("item 17 is broken; mend it")
        group.barrier()
        return {}

    with pytest.raises(InputError, match=r"^item 17 is broken; mend it$"):
        launcher.run_on_workers(work, scaling, lambda: None, {"attempts": str(attempts)})
    assert len(list(attempts.iterdir())) == 1


def nothing(payload: dict[str, Any], group: WorkerGroup) -> dict[str, Any]:
    return {"size": group.size}


@pytest.mark.parametrize("count", [9, (9, 12)])
def test_more_workers_than_the_cluster_can_hold_are_refused_at_once(ray_local: None, count: Any) -> None:
    scaling = ScalingConfig(num_workers=count)
    with pytest.raises(
        ConfigError, match=r"needs 9 workers of 1 CPU each.*1 machine\(s\) have room for 8 in all"
    ):
        launcher.run_on_workers(nothing, scaling, lambda: None, {})


def test_workers_that_need_a_gpu_are_refused_where_there_is_none(ray_local: None) -> None:
    scaling = ScalingConfig(num_workers=2, gpus_per_worker=1)
    with pytest.raises(ConfigError, match=r"2 workers of 1 CPU and 1 GPU each.*room for 0"):
        launcher.run_on_workers(nothing, scaling, lambda: None, {})


def test_machines_that_do_not_come_end_the_wait_with_what_there_is(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(elastic, "REMIND_S", 1.0)
    scaling = ScalingConfig(num_workers=9, autoscaling=True, start_timeout_s=3)
    with pytest.raises(
        StageError, match=r"no room for 9 worker\(s\) within .* 3 s; there is room for 8. Nothing is"
    ):
        launcher.run_on_workers(nothing, scaling, lambda: None, {})
    assert "waiting for room for 9 worker(s); the cluster has it for 8" in caplog.text
    # what was wanted is given back: fewer workers start
    assert elastic.wait_for_room(ScalingConfig(num_workers=8), deadline=time.monotonic() + 30) == 8


def test_room_is_what_the_least_need_when_the_most_do_not_fit(ray_local: None) -> None:
    scaling = ScalingConfig(num_workers=(2, 12))
    assert elastic.wait_for_room(scaling, deadline=time.monotonic() + 30) == 8
