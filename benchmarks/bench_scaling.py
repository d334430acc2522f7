"""Training steps on 1, 2 and 4 workers, held against the cost model, and the model carried to 1,024 GPUs.

    $ distributed-mi prepare jobs/configs/beauty-remi.toml data.interactions=... data.items=... workspace=WORKSPACE
    $ python -m benchmarks.bench_scaling --workspace WORKSPACE

Workers are processes of this machine that talk through gloo, one thread each. `strong` keeps the users of a step,
`weak` the users of a worker. With more workers than cores they share the cores: what they can gain is said beside what
they did. The constants of the cost model are measured here: a matrix product, scattered rows, a gloo exchange; what a
step of one worker takes beyond them is charged to its users.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import harness
from benchmarks.cost_model import Job, Law, Machine, billion_rows, predict
from benchmarks.processes import on_processes
from distributed_mi.core.artifacts import Workspace
from distributed_mi.data.batches import Sequences
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.training.config import ModelChoice, TrainConfig
from distributed_mi.training.loop import Trainer
from distributed_mi.training.worker import assemble, train_events


def run_training(args: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step and counters of the table, of this worker."""
    workspace = Workspace(args["workspace"])
    config = TrainConfig(model=ModelChoice(name="remi"), num_users_per_step=args["users"], log_every=10**9)
    group = WorkerGroup.from_torch() if dist.is_initialized() else WorkerGroup.alone()
    folder = args["folder"]
    run = assemble(config, workspace, folder, group, lambda model, group: {}, harness.NoBar())
    trainer = Trainer(config, run, fs=workspace.fs, metrics_path=f"{folder}/metrics.jsonl")
    for _ in range(args["warmup"]):
        trainer.step()
    run.table.take_counters()
    samples = []
    for _ in range(args["repeats"]):
        group.barrier()
        started = time.perf_counter()
        for _ in range(args["steps"]):
            trainer.step()
        samples.append((time.perf_counter() - started) / args["steps"])
    counters = run.table.take_counters()
    trainer.close()
    done = args["repeats"] * args["steps"]
    return {
        "seconds": samples,
        "unique_ids": counters.unique_ids / done,
        "exchanged_bytes": counters.exchanged_bytes / done,
        "exchange_share": counters.exchange_seconds / (sum(samples) * args["steps"]),
    }


def run_link(args: dict[str, Any]) -> dict[str, Any]:
    """Bytes a second of an all-to-all, and seconds of an empty one."""
    size = dist.get_world_size()

    def median(rows: int) -> float:
        sent = torch.ones(size * rows, 64)
        received, taken = torch.empty_like(sent), []
        for _ in range(21):
            dist.barrier()
            started = time.perf_counter()
            dist.all_to_all_single(received, sent)
            taken.append(time.perf_counter() - started)
        return float(np.median(taken))

    latency, full = median(1), median(20_000)
    outside = (size - 1) * 20_000 * 256
    return {"latency": latency, "link": outside / max(full - latency, 1e-9)}


def measure_machine() -> Machine:
    """Constants of one worker of this machine."""
    torch.set_num_threads(1)

    def best(work: Any) -> float:
        taken = []
        for _ in range(30):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        return min(taken)

    a, b = torch.randn(800, 64), torch.randn(64, 256)
    rows, ids = torch.randn(100_000, 64), torch.randint(0, 100_000, (20_000,))
    flops = 2 * 800 * 64 * 256 / best(lambda: a @ b)
    memory = 2 * 20_000 * 256 / best(lambda: rows.index_select(0, ids))
    link = on_processes("benchmarks.bench_scaling:run_link", 2, {})
    return Machine(flops=flops, memory=memory, link=link["link"], latency=link["latency"])


def job_of(workspace: Workspace, users: int, max_history: int = 20) -> Job:
    """Sizes of REMI's training on a workspace."""
    counts = train_events(workspace)
    sequences = Sequences.read(workspace, "train")
    lengths = sequences.lengths[sequences.lengths > 4]
    # The target is uniform in 4 .. length - 1, the history what comes before it, at most `max_history` of it.
    history = float(np.mean([np.minimum(np.arange(4, n), max_history).mean() for n in lengths]))
    return Job(rows=len(counts), law=Law.of_counts(counts[1:]), users=users, history=history, negatives=1_280)


def main() -> int:
    """Measure and write both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", required=True, help="a workspace whose prepare stage is complete")
    parser.add_argument(
        "--users", type=int, default=1_024, help="of a step, and of a worker of the weak series"
    )
    parser.add_argument("--steps", type=int, default=20, help="in one measured call")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=10, help="steps")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the result")
    args = parser.parse_args()
    workspace = Workspace(args.workspace)
    machine = measure_machine()
    rows, samples = [], []
    alone: float | None = None
    for series in ("strong", "weak"):
        for size in args.workers:
            users = args.users * (size if series == "weak" else 1)
            payload = {
                "workspace": workspace.absolute_url,
                "users": users,
                **{k: getattr(args, k) for k in ("steps", "repeats", "warmup")},
            }
            found = on_processes("benchmarks.bench_scaling:run_training", size, payload)
            seconds = harness.Spread.of(found["seconds"])
            job = job_of(workspace, users)
            if alone is None:
                alone = seconds.median
                rest = max(0.0, alone - predict(job, machine, 1).seconds)
                machine = replace(machine, per_user=rest / users)
            cost = predict(job, machine, size)
            # Workers beyond the cores take turns.
            turns = max(1.0, size / len(os.sched_getaffinity(0)))
            expected = turns * (cost.seconds - cost.latency_s) + cost.latency_s
            ids = found["unique_ids"] / cost.unique_ids if found["unique_ids"] else float("nan")
            moved = found["exchanged_bytes"] / cost.exchanged_bytes if size > 1 else float("nan")
            rows.append(
                [
                    series,
                    str(size),
                    f"{users:,}",
                    seconds.text(1000),
                    f"{users / seconds.median:,.0f}",
                    f"{found['exchange_share']:.0%}",
                    f"{1000 * expected:.3g}",
                    f"{ids:.3f}",
                    f"{moved:.3f}",
                ]
            )
            samples.append(
                {"series": series, "workers": size, "users": users, **found, "predicted": vars(cost)}
            )
    header = [
        "series", "workers", "users a step", "ms a step", "users/s", "in exchanges",
        "ms predicted", "ids, measured / predicted", "bytes, measured / predicted",
    ]  # fmt: skip
    extra = {
        "cores": len(os.sched_getaffinity(0)),
        "what the cores allow": "two workers at once; four share two cores, so users/s cannot grow beyond two",
        "constants": f"{machine.flops / 1e9:.0f} GFLOP/s, rows at {machine.memory / 1e9:.1f} GB/s, link "
        f"{machine.link / 1e9:.2f} GB/s, latency {1e6 * machine.latency:.0f} us, other work "
        f"{1e6 * machine.per_user:.1f} us a user",
    }
    table = harness.Table(header, rows, samples, extra)
    print(harness.write_table("scaling", table, folder=args.results).read_text())
    print(_write_extrapolation(args.results).read_text())
    return 0


def _write_extrapolation(folder: Path) -> Path:
    rows, samples = [], []
    for workers, job, cost in billion_rows():
        rows.append(
            [
                f"{workers:,}",
                f"{job.users:,}",
                f"{cost.table_resident_bytes / 2**30:.1f}",
                f"{cost.unique_ids:,.0f}",
                f"{cost.exchanged_bytes / 1e6:.1f}",
                f"{1000 * cost.compute_s:.2f}",
                f"{1000 * (cost.exchange_s + cost.latency_s):.2f}",
                f"{1000 * cost.update_s:.3f}",
                f"{1000 * cost.seconds:.2f}",
                f"{job.users / cost.seconds / 1e6:.1f}",
            ]
        )
        samples.append({"workers": workers, "users": job.users, **vars(cost)})
    header = [
        "GPUs", "users a step", "table, GiB a GPU", "distinct ids a GPU", "MB out of a GPU",
        "ms compute", "ms exchange", "ms update", "ms a step", "million users/s",
    ]  # fmt: skip
    notes = (
        "Arithmetic, not a measurement: the cost model of `benchmarks/cost_model.py` with assumed constants of an H100 "
        "(stated there). 10^9 rows x 128 with row-wise Adagrad, zipf 1.05, 100 history items, 8,192 negatives, bf16 "
        "exchange, nothing overlapped."
    )
    return harness.write_table(
        "scaling_paper",
        harness.Table(header, rows, samples),
        notes=notes,
        hardware="1024-gpus-on-paper",
        folder=folder,
    )


if __name__ == "__main__":
    sys.exit(main())
