"""The pipeline holds the workspace while a stage runs, however the stage was started."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from distributed_mi.cli import main
from distributed_mi.core.artifacts import Manifest, StageKey, Workspace
from distributed_mi.core.errors import WorkspaceLockedError
from distributed_mi.experiment import Experiment
from distributed_mi.pipeline import Pipeline


def pipeline(folder: Path) -> Pipeline:
    return Pipeline(Experiment(workspace=str(folder)))


def write_stage(config: Any, workspace: Workspace, **_: Any) -> Manifest:
    """A stage without work."""
    run = workspace.stage("prepare").open(StageKey("prepare", {}, {}))
    return run.manifest or run.commit(rows={})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """`prepare` without Ray."""
    monkeypatch.setattr("distributed_mi.data.stage.run", write_stage)
    return monkeypatch


HOLDER = """
import sys
from distributed_mi.data import stage
from distributed_mi.experiment import Experiment
from distributed_mi.pipeline import Pipeline

def wait(*_, **__):
    print("running", flush=True)
    sys.stdin.readline()
    raise SystemExit

stage.run = wait
Pipeline(Experiment(workspace=sys.argv[1])).prepare()
"""


def test_a_stage_is_refused_while_another_process_runs_one(
    tmp_path: Path, quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "running\n"
        second = pipeline(tmp_path)
        for run in (second.prepare, lambda: second.run(["prepare"])):
            with pytest.raises(WorkspaceLockedError, match=rf"in use by prepare \(process {holder.pid} on "):
                run()
        assert main(["prepare", "quickstart", f"workspace={tmp_path}"]) == 1
        assert f"process {holder.pid}" in capsys.readouterr().err
    finally:
        holder.communicate("go\n")
    assert second.prepare().stage == "prepare"


def test_the_lock_is_held_once_and_given_back(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    own, other = pipeline(tmp_path), pipeline(tmp_path)
    with own.lock("a run"):
        own.prepare()
        own.run(["prepare"])
        with pytest.raises(
            WorkspaceLockedError, match="in use by a run"
        ):  # still held after the stages inside
            other.prepare()
    assert [o.stage for o in own.outcomes] == ["prepare", "prepare"]
    assert not other.prepare().rows
    with own.lock("again"):
        pass


def test_a_failed_stage_gives_the_lock_back(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Manifest:
        raise RuntimeError("inside")

    own = pipeline(tmp_path)
    with quick.context() as patch:
        patch.setattr("distributed_mi.data.stage.run", fail)
        with pytest.raises(RuntimeError, match="inside"):
            own.prepare()
    assert pipeline(tmp_path).prepare().stage == "prepare"


def test_another_thread_does_not_share_the_lock(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    own = pipeline(tmp_path)
    caught: list[BaseException] = []

    def stage() -> None:
        try:
            own.prepare()
        except WorkspaceLockedError as error:
            caught.append(error)

    with own.lock("a run"):
        thread = threading.Thread(target=stage)
        thread.start()
        thread.join()
    assert len(caught) == 1
