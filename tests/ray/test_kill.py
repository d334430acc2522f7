"""`kill -9` of workers, the driver, a machine, at bad moments: the run ends with the numbers of an undisturbed one.

Each case is a process that trains on a cluster of three raylets, and a victim that dies once. What is asked: the
metric and the losses of every step are those of the undisturbed run, so the order of the data is the same, and no
more than one interval between checkpoints is done again (and the steps taken while one was being written).

A case takes half a minute to a minute and a half; `DMI_KILL_SEEDS=3` runs each with three seeds instead of one.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray.cluster_utils import Cluster

from distributed_mi.core.artifacts import Workspace
from distributed_mi.training import launcher
from distributed_mi.training.config import ScalingConfig
from tests.ray.train_driver import CONFIG
from tests.unit.training.workspaces import HitsOfLastItem, make_prepared

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The run that nobody kills, by one worker in this process."""
    workspace = make_prepared(tmp_path_factory.mktemp("whole"))
    validate = HitsOfLastItem(workspace, CONFIG.max_history)
    one = ScalingConfig(num_workers=1, threads_per_worker=1)
    launcher.run(CONFIG, one, workspace, validate=validate, start_ray=lambda: None)
    return workspace


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three raylets of one logical CPU each; a test that takes one away leaves it to `full` to add another."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def full(cluster: Cluster) -> Cluster:
    while len(cluster.list_all_nodes()) < 3:
        cluster.add_node(**NODE)
    return cluster


@pytest.fixture(autouse=True)
def no_driver_is_left() -> Iterator[None]:
    yield
    for case in Case.started:
        if case.process is not None:
            case.process.kill()
            case.process.wait()
    Case.started.clear()


class Case:
    """A training run in another process, and what can be seen of it from outside."""

    started: ClassVar[list["Case"]] = []

    def __init__(self, folder: Path, address: str, least: int, most: int, pace: float = 0.02) -> None:
        self.folder, self.address, self.counts = folder, address, [str(least), str(most)]
        self.workspace = make_prepared(folder / "workspace")
        self.pace(pace)
        Case.started.append(self)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the driver."""
        command = [sys.executable, "-m", "tests.ray.train_driver", self.workspace.root, self.address]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(self.folder / "driver.log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, str(self.folder), *self.counts], env=environment, cwd=ROOT, stdout=log, stderr=log
            )

    def pace(self, seconds: float) -> None:
        """How much longer each step takes from now on."""
        (self.folder / "pace").write_text(str(seconds))

    def wait_until(self, happened: Callable[[], Any], pause_s: float = 0.0) -> None:
        """Look again and again; an ended driver or too long a wait is a failure."""
        limit = time.monotonic() + LIMIT_S
        while not happened():
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "driver.log").read_text()[-3000:]
            assert time.monotonic() < limit, (self.folder / "driver.log").read_text()[-3000:]
            time.sleep(pause_s)

    def end(self) -> None:
        """Wait for the driver to end well."""
        assert self.process is not None
        code = self.process.wait(timeout=LIMIT_S)
        assert code == 0, (self.folder / "driver.log").read_text()[-3000:]

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a worker wrote down, over all attempts."""
        path = self.folder / "steps.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be half written when it is read
        return [x for x in map(json.loads, whole.splitlines()) if x["rank"] == rank]

    def checkpoint(self, step: int) -> Path | None:
        """Directory of a checkpoint, once it has been begun."""
        found = list(Path(self.workspace.root).glob(f"train/remi/*/checkpoints/step-{step:09d}"))
        return found[0] if found else None


def losses(workspace: Workspace) -> list[float]:
    text = Path(workspace.stage("train/remi").path("metrics.jsonl")).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [x["loss"] for x in lines if x["kind"] == "train"]


def assert_equals_undisturbed(case: Case, undisturbed: Workspace) -> None:
    ours, theirs = (w.stage("train/remi").require().stats for w in (case.workspace, undisturbed))
    assert ours["steps"] == 60
    assert ours["validation"] == pytest.approx(theirs["validation"], abs=1e-3)
    assert losses(case.workspace) == pytest.approx(losses(undisturbed), abs=1e-4)


def attempts(case: Case) -> list[list[dict[str, Any]]]:
    """The steps of worker 0 by the process that took them."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in case.steps():
        found.setdefault(line["pid"], []).append(line)
    return list(found.values())


def assert_little_is_repeated(case: Case) -> None:
    """From attempt to attempt: steps follow each other, and go back by an interval at most."""
    every = attempts(case)
    for steps in every:
        assert [x["step"] for x in steps] == list(range(steps[0]["step"], steps[-1]["step"] + 1))
    for before, after in pairwise(every):
        resumed = after[0]["step"] - 1
        assert resumed % CONFIG.checkpoint_every == 0
        repeated = [x for x in before if x["step"] > resumed and not x["writing"]]
        assert len(repeated) <= CONFIG.checkpoint_every
    assert every[-1][-1]["step"] == CONFIG.max_steps


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def kill_worker(case: Case, cluster: Cluster, chance: random.Random) -> None:
    kill(case.steps(rank=chance.choice([0, 1]))[-1]["pid"])


def kill_workers(case: Case, cluster: Cluster, chance: random.Random) -> None:
    for rank in (0, 1):
        kill(case.steps(rank)[-1]["pid"])


def kill_driver(case: Case, cluster: Cluster, chance: random.Random) -> None:
    assert case.process is not None
    case.process.kill()
    case.process.wait()
    assert case.workspace.stage("train/remi").manifest() is None
    case.start()


def kill_node(case: Case, cluster: Cluster, chance: random.Random) -> None:
    """A machine with a worker on it, but not the one of the driver."""
    workers = [case.steps(rank)[-1] for rank in (0, 1)]
    nodes = {n.node_id: n for n in cluster.list_all_nodes() if n is not cluster.head_node}
    victim = chance.choice([w for w in workers if w["node"] in nodes])
    kill(victim["pid"])
    cluster.remove_node(nodes[victim["node"]], allow_graceful=False)


def at_a_step(case: Case, seed: int) -> Callable[[], bool]:
    step = random.Random(seed).randint(12, 50)
    return lambda: any(x["step"] >= step for x in case.steps())


def after_a_report(case: Case, seed: int) -> Callable[[], bool]:
    step = 10 * (2 + seed)
    return lambda: (d := case.checkpoint(step)) is not None and (d / "manifest.json").exists()


def during_a_write(case: Case, seed: int) -> Callable[[], bool]:
    step = 10 * (2 + seed)

    def begun() -> bool:
        directory = case.checkpoint(step)
        if directory is None or not list(directory.glob("*.safetensors")):
            return False
        assert not (directory / "manifest.json").exists(), "seen too late"
        return True

    return begun


@pytest.mark.parametrize("seed", range(int(os.environ.get("DMI_KILL_SEEDS", "1"))))
@pytest.mark.parametrize("moment", [at_a_step, after_a_report, during_a_write], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "victim", [kill_worker, kill_workers, kill_driver, kill_node], ids=lambda f: f.__name__
)
def test_a_killed_run_ends_like_the_undisturbed_one(
    full: Cluster, tmp_path: Path, undisturbed: Workspace, victim: Any, moment: Any, seed: int
) -> None:
    case = Case(tmp_path, full.address, 2, 2)
    case.start()
    case.wait_until(lambda: len(case.steps(1)), pause_s=0.05)
    case.wait_until(moment(case, seed))
    victim(case, full, random.Random(seed))
    case.end()
    assert len(attempts(case)) == 2
    assert_little_is_repeated(case)
    assert_equals_undisturbed(case, undisturbed)
    assert not list(Path(case.workspace.root).rglob("written-*"))


def test_workers_leave_and_come_back(tmp_path: Path, undisturbed: Workspace) -> None:
    """Two workers, then one because a machine is gone, then two because another has come, and nothing can be told."""
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(**NODE) for _ in range(2)]
        case = Case(tmp_path, cluster.address, 1, 2, pace=0.1)
        case.start()
        case.wait_until(lambda: any(x["step"] >= 15 for x in case.steps()), pause_s=0.02)
        gone = case.steps(1)[-1]
        kill(gone["pid"])
        cluster.remove_node(next(n for n in nodes if n.node_id == gone["node"]), allow_graceful=False)
        case.wait_until(lambda: case.steps()[-1]["world"] == 1, pause_s=0.02)
        case.pace(1.0)  # a new machine takes seconds
        cluster.add_node(**NODE)
        case.wait_until(lambda: case.steps()[-1]["world"] == 2, pause_s=0.02)
        case.pace(0.0)
        case.end()
    finally:
        cluster.shutdown()
    every = attempts(case)
    assert [steps[0]["world"] for steps in every] == [2, 1, 2]
    assert every[2][0]["step"] == every[1][-1]["step"] + 1  # it grew at a checkpoint: no step is done twice
    assert_little_is_repeated(case)
    assert_equals_undisturbed(case, undisturbed)
