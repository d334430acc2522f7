"""A training run in a process of its own whose every step is written down, for tests that kill parts of it.

    python -m tests.ray.train_driver WORKSPACE ADDRESS FOLDER LEAST MOST

FOLDER gets `steps.jsonl`, a line for each step of each worker, and may hold `pace`: seconds that a step takes longer.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from distributed_mi.core.artifacts import Workspace
from distributed_mi.training import checkpoint_writer, launcher
from distributed_mi.training.config import ScalingConfig
from distributed_mi.training.loop import Trainer
from tests.unit.training.workspaces import HitsOfLastItem, tiny_config

CONFIG = tiny_config(max_steps=60, checkpoint_every=10, validate_every=20)
WRITE_S = 0.15
"""How much longer a checkpoint takes to write, so that it can be caught in the middle."""


class Recorded(HitsOfLastItem):
    """A validation that has its worker write down each step, from the moment it arrives there."""

    def __init__(self, workspace: Workspace, max_history: int, folder: Path) -> None:
        super().__init__(workspace, max_history)
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _record_steps(self.folder)
        _write_slowly()


def _record_steps(folder: Path) -> None:
    import ray

    original = Trainer.step

    def step(trainer: Trainer) -> None:
        writing = trainer.run.store.writer.busy
        original(trainer)
        group = trainer.run.group
        line = {
            "step": trainer.state.step,
            "rank": group.rank,
            "world": group.size,
            "writing": writing,
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
        }
        with open(folder / "steps.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        pace = folder / "pace"
        time.sleep(float(pace.read_text() or 0) if pace.exists() else 0.0)

    Trainer.step = step  # type: ignore[method-assign]


def _write_slowly() -> None:
    original = checkpoint_writer.write_tensors

    def write_tensors(*given: Any) -> str:
        time.sleep(WRITE_S / 2)  # worker 0 writes two dense files after its table
        return original(*given)

    checkpoint_writer.write_tensors = write_tensors


def main(url: str, address: str, folder: str, least: str, most: str) -> None:
    """Train."""
    import ray

    def start_ray() -> None:
        if not ray.is_initialized():
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)

    workspace = Workspace(url)
    launcher.run(
        CONFIG,
        ScalingConfig(num_workers=(int(least), int(most)), threads_per_worker=1),
        workspace,
        validate=Recorded(workspace, CONFIG.max_history, Path(folder)),
        start_ray=start_ray,
    )


if __name__ == "__main__":
    from tests.ray import train_driver  # by its name, so that workers find what is pickled

    train_driver.main(*sys.argv[1:])
