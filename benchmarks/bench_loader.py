"""The loader alone against the step that it feeds: REMI on real sequences, 128 users a step, one thread each.

    $ distributed-mi prepare jobs/configs/beauty-remi.toml data.interactions=... data.items=... workspace=WORKSPACE
    $ python -m benchmarks.bench_loader --workspace WORKSPACE

Sides:
    loader             batches of one target per user: sampling, padding, negatives
    every position     batches of a target at every position
    step               what `distributed-mi train` runs, its batches made in blocks between the steps
    step, one by one   the same with each batch made before its step

The bar is a loader that outruns the step by 5 times.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from benchmarks import harness
from distributed_mi.core.artifacts import Workspace
from distributed_mi.data.batches import EveryPositionSampler
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.training.batching import StepBatches
from distributed_mi.training.config import ModelChoice, TrainConfig
from distributed_mi.training.loop import Run, Trainer
from distributed_mi.training.worker import assemble


def make(workspace: Workspace, folder: str, prefetch: int, users: int) -> tuple[Trainer, Run]:
    """A trainer of REMI."""
    config = TrainConfig(
        model=ModelChoice(name="remi"), log_every=10**9, prefetch=prefetch, num_users_per_step=users
    )
    run = assemble(config, workspace, folder, WorkerGroup.alone(), lambda model, group: {}, harness.NoBar())
    return Trainer(config, run, fs=workspace.fs, metrics_path=f"{folder}/metrics.jsonl"), run


def loading(source: StepBatches) -> Callable[[], None]:
    """A call that makes the batches of the next step."""
    steps = count()
    return lambda: source(next(steps)) and None


def main() -> int:
    """Measure the sides in turn and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", required=True, help="a workspace whose prepare stage is complete")
    parser.add_argument("--users", type=int, default=128, help="users of a step")
    parser.add_argument("--repeats", type=int, default=9, help="measured calls of each side")
    parser.add_argument("--steps", type=int, default=20, help="steps in one call")
    parser.add_argument("--folder", type=Path, default=harness.RESULTS, help="where the result goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    workspace = Workspace(args.workspace)
    with tempfile.TemporaryDirectory() as folder:
        blocks, run = make(workspace, folder, 8, args.users)
        alone, _ = make(workspace, folder, 0, args.users)
        source = run.batches
        assert isinstance(source, StepBatches)
        every = EveryPositionSampler(
            source.sampler.sequences, num_users_per_step=args.users, max_history=20, min_position=1
        )
        sides = {
            "loader": loading(source),
            "every position": loading(StepBatches(every, source.negatives, run.group)),
            "step": blocks.step,
            "step, one by one": alone.step,
        }
        result = harness.compare(
            {name: harness.repeated(call, args.steps) for name, call in sides.items()},
            unit=f"{args.steps} steps of {args.users} users",
            repeats=args.repeats,
            warmup=2,
        )
        blocks.close()
    for name in result.sides:
        seconds = result.seconds(name).median
        result.extra[f"users/s, {name}"] = f"{args.steps * args.users / seconds:,.0f}"
    notes = "One thread. The loader has the caches to itself here; between steps its batches take longer."
    print(harness.write("loader", result, notes=notes, folder=args.folder).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
