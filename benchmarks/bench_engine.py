"""Step of the dense part under each engine: plain torch and DeepSpeed's ZeRO 0 to 3, one worker and two.

    $ python -m benchmarks.bench_engine
    $ python -m benchmarks.bench_engine --repeats 3 --steps 5 --wide 256 --workers 1     # to see that it runs

A step is forward, backward, gradient exchange and Adam of ComiRec-SA's attention on rows that are given (no table, no
batch), one thread a worker, in two sizes: REMI's (width 64, hidden 256, 128 users) and a wide one (hidden `--wide`,
`--wide-users`), whose parameters outweigh its activations. Workers are processes of this machine that talk through gloo
and take turns with the engines in one order, so a busy machine slows all. The table gives the median of the repeats in
milliseconds a step, the processor time that worker 0 used, which other programs hardly change, and the bytes of values,
gradients and optimizer state that one worker holds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import harness
from distributed_mi.core.registry import resolve
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.table import LocalItemTable
from distributed_mi.models.base import HistoryBatch, LossTerms, TrainBatch
from distributed_mi.training.config import EngineConfig
from distributed_mi.training.engine import Engine, build_engine
from distributed_mi.training.preflight import dense_bytes

HISTORY, DIM = 20, 64
ENGINES = {
    "ddp": EngineConfig(name="ddp"),
    "ZeRO 0": EngineConfig(name="deepspeed"),
    "ZeRO 1": EngineConfig(name="deepspeed", zero_stage=1),
    "ZeRO 2": EngineConfig(name="deepspeed", zero_stage=2),
    "ZeRO 3": EngineConfig(name="deepspeed", zero_stage=3),
}


class DenseOnly(resolve("model", "comirec_sa")):  # type: ignore[misc]
    """The attention of ComiRec-SA with the squared length of its interests as loss, on rows made up once."""

    rows_BLD: torch.Tensor

    def loss(self, batch: TrainBatch) -> LossTerms:
        """See `Recommender.loss`; no table is asked."""
        state = self.encode_rows(batch.history, self.rows_BLD)
        return LossTerms(mean={"length": state.interests_BKD.square().sum(dim=(1, 2))})


def make(
    config: EngineConfig, hidden: int, users: int, group: WorkerGroup
) -> tuple[Engine, Callable[[], Any]]:
    """An engine around a net of `hidden` units, and its step."""
    torch.manual_seed(0)
    model = DenseOnly(
        DenseOnly.Config(attention_dim=hidden), items=LocalItemTable(2, DIM), max_history=HISTORY
    )
    share = users // group.size
    model.rows_BLD = torch.randn(share, HISTORY, DIM)
    ids = torch.ones(share, HISTORY, dtype=torch.int64)
    batch = TrainBatch(HistoryBatch(ids, ids > 0), ids[:, 0], ids[0])
    engine = build_engine(model, config, learning_rate=1e-3, group=group)
    return engine, lambda: engine.step([batch], users)


def measure(
    group: WorkerGroup, hidden: int, users: int, repeats: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds a step of every engine, repeat by repeat; workers stay in step by the exchange itself."""
    made = {name: make(config, hidden, users, group) for name, config in ENGINES.items()}
    out: dict[str, dict[str, Any]] = {}
    for name, (engine, step) in made.items():
        for _ in range(3):
            step()
        held = dense_bytes(ENGINES[name], engine.num_parameters, group.size)
        out[name] = {"ms": [], "cpu_ms": [], "parameters": engine.num_parameters, "bytes": held}
    for _ in range(repeats):
        for name, (_, step) in made.items():
            group.barrier()
            started, used = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            used = time.process_time() - used
            group.barrier()
            out[name]["ms"].append(1000 * (time.perf_counter() - started) / steps)
            out[name]["cpu_ms"].append(1000 * used / steps)
    return out


def run_workers(workers: int, hidden: int, users: int, repeats: int, steps: int) -> dict[str, dict[str, Any]]:
    """`measure` in so many processes; what worker 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        arguments = [str(x) for x in (workers, hidden, users, repeats, steps)]
        command = [sys.executable, "-m", "benchmarks.bench_engine", "--child", folder]
        processes = [
            subprocess.Popen([*command, str(rank), *arguments], env=environment, cwd=harness.ROOT)
            for rank in range(workers)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"a worker failed: exit codes {codes}")
        found: dict[str, dict[str, Any]] = json.loads((Path(folder) / "result.json").read_text())
        return found


def child(folder: str, rank: int, workers: int, hidden: int, users: int, repeats: int, steps: int) -> None:
    """One worker."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    found = measure(WorkerGroup.from_torch(), hidden, users, repeats, steps)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Measure every size with every number of workers and write the table."""
    if len(sys.argv) > 2 and sys.argv[1] == "--child":
        child(sys.argv[2], *(int(x) for x in sys.argv[3:]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="measured calls of each engine")
    parser.add_argument("--steps", type=int, default=20, help="steps in one call")
    parser.add_argument("--users", type=int, default=128, help="users of a step")
    parser.add_argument("--wide", type=int, default=65_536, help="hidden units of the wide net")
    parser.add_argument("--wide-users", type=int, default=4, help="users of a step of the wide net")
    parser.add_argument("--wide-steps", type=int, default=2, help="steps in one call of the wide net")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers")
    parser.add_argument("--folder", type=Path, default=harness.RESULTS, help="where the result goes")
    args = parser.parse_args()
    rows, samples = [], []
    nets = [(4 * DIM, args.users, args.steps), (args.wide, args.wide_users, args.wide_steps)]
    for hidden, users, steps in nets:
        for workers in args.workers:
            found = run_workers(workers, hidden, users, args.repeats, steps)
            best = min(found, key=lambda name: harness.Spread.of(found[name]["ms"]).median)
            for name, facts in found.items():
                spread = harness.Spread.of(facts["ms"])
                size = f"hidden {hidden:,} ({facts['parameters']:,} parameters), {users} users"
                mark = " (fastest)" if name == best else ""
                held = f"{facts['bytes'] / 1e6:,.1f}"
                cpu = harness.Spread.of(facts["cpu_ms"]).text()
                rows.append([size, str(workers), f"{name}{mark}", spread.text(), cpu, held])
                samples.append(
                    {"hidden": hidden, "users": users, "workers": workers, "engine": name, **facts}
                )
    header = [
        "dense net",
        "workers",
        "engine",
        "ms a step: median (range)",
        "CPU ms of worker 0",
        "MB of dense state a worker",
    ]
    notes = (
        f"Users of a step over all workers, {HISTORY} rows of width {DIM} each, one thread a worker, gloo on one "
        "machine. No table and no batch: a real step adds the same to every engine."
    )
    table = harness.Table(header, rows, samples)
    print(harness.write_table("engine", table, notes=notes, folder=args.folder).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
