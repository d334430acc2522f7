"""`kill -9` of a training worker and of the driver: the run finishes with the numbers of an undisturbed one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from distributed_mi.core.artifacts import Workspace
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.models.base import Recommender
from distributed_mi.training import launcher
from distributed_mi.training.config import ScalingConfig
from tests.unit.training.workspaces import HitsOfLastItem, make_prepared, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CONFIG = tiny_config(max_steps=80, checkpoint_every=10, validate_every=20)
ONE = ScalingConfig(num_workers=1, threads_per_worker=1)
TWO = ScalingConfig(num_workers=2, threads_per_worker=1)
ROOT = Path(__file__).resolve().parents[2]


class KillsWorkerOnce(HitsOfLastItem):
    """A validation in which one worker kills itself at its third call, the first time that the run gets there."""

    def __init__(self, workspace: Workspace, max_history: int, marker: Path, rank: int) -> None:
        super().__init__(workspace, max_history)
        self.marker, self.rank, self.calls = marker, rank, 0

    def __call__(self, model: Recommender, group: WorkerGroup) -> dict[str, float]:
        self.calls += 1
        if self.calls == 3 and group.rank == self.rank and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, group)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Validation metrics of the run that nobody kills."""
    workspace = make_prepared(tmp_path_factory.mktemp("whole"))
    validate = HitsOfLastItem(workspace, CONFIG.max_history)
    manifest = launcher.run(CONFIG, ONE, workspace, validate=validate, start_ray=lambda: None)
    return dict(manifest.stats["validation"])


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker(ray_local: None, tmp_path: Path, undisturbed: dict[str, float], rank: int) -> None:
    workspace = make_prepared(tmp_path / "workspace")
    marker = tmp_path / "killed"
    validate = KillsWorkerOnce(workspace, CONFIG.max_history, marker, rank)
    manifest = launcher.run(CONFIG, TWO, workspace, validate=validate, start_ray=lambda: None)
    assert marker.exists()
    assert manifest.stats["steps"] == 80
    assert manifest.stats["validation"] == pytest.approx(undisturbed, abs=1e-3)


DRIVER = """
import sys
import ray
from distributed_mi.core.artifacts import Workspace
from distributed_mi.training import launcher
from tests.ray.test_kill import CONFIG, TWO
from tests.unit.training.workspaces import HitsOfLastItem

workspace = Workspace(sys.argv[1])
validate = HitsOfLastItem(workspace, CONFIG.max_history)
start = lambda: ray.init(address=sys.argv[2], logging_level="ERROR")
launcher.run(CONFIG, TWO, workspace, validate=validate, start_ray=start)
"""


def start_driver(workspace: Workspace) -> subprocess.Popen[bytes]:
    address = ray.get_runtime_context().gcs_address
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, workspace.root, address]
    return subprocess.Popen(command, env=environment, cwd=ROOT)


def test_killed_driver(ray_local: None, tmp_path: Path, undisturbed: dict[str, float]) -> None:
    workspace = make_prepared(tmp_path)
    driver = start_driver(workspace)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("train/remi/*/checkpoints/*/manifest.json")):
        assert time.monotonic() < limit
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert workspace.stage("train/remi").manifest() is None
    assert start_driver(workspace).wait(timeout=200) == 0
    manifest = workspace.stage("train/remi").require()
    assert manifest.stats["steps"] == 80
    assert manifest.stats["validation"] == pytest.approx(undisturbed, abs=1e-3)
