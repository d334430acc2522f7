"""Evaluation on the whole catalogue: memory at a million items, and seconds against the public REMI loop.

    $ python -m benchmarks.bench_evaluate memory
    $ distributed-mi prepare jobs/configs/beauty-remi.toml data.interactions=... data.items=... workspace=WORKSPACE
    $ python -m benchmarks.bench_evaluate beauty --source CHECKOUT/src --workspace WORKSPACE

`memory` evaluates random users with a REMI model of random weights in a process of its own and reports seconds and
how far its resident memory rose above what table, model and users take.

`beauty` evaluates the test users with the same random weights in our REMI and in that of the public code
(github.com/Tokkiu/REMI), each side in a process of its own; that they agree in Recall@50 is checked. Vectors of
positions are zero, because the public model counts positions from the other end. Sides:
    ours               `rank_share` and the metrics
    public, stubbed    its `evaluate` without two matrices that its loader builds for every user and no model reads
    public, published  its `evaluate` as it is

No line of the public code is changed; a checkout of it is needed and nothing of it is kept here. From outside come the
GPU classes of `faiss` (on faiss's own CPU index) and a `Tensor.cuda` that returns the tensor.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks import harness
from benchmarks.bench_train_step import load_public_code
from benchmarks.processes import OwnProcess
from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.registry import resolve
from distributed_mi.data.batches import Sequences
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.optimizer import SGD
from distributed_mi.embeddings.table import LocalItemTable
from distributed_mi.evaluation import scoring
from distributed_mi.evaluation.metrics.base import CatalogueInfo, RankedLists
from distributed_mi.evaluation.protocol import Cases, load_cases
from distributed_mi.evaluation.topk import rank_share
from distributed_mi.models.base import Recommender

METRICS = ("recall@50", "hit_rate@50", "ndcg_hits@50")
"""What the public loop computes, in our names."""


def evaluate(model: Recommender, cases: Cases, length: int = 50) -> dict[str, float | None]:
    """Lists and metrics of all users in this process."""
    ranked = rank_share(model, cases, WorkerGroup.alone(), length=length, users_per_batch=4096)
    num_items = model.items.num_rows - 1
    catalogue = CatalogueInfo(num_items, np.full(num_items + 1, -1, dtype=np.int64))
    return scoring.score(RankedLists(ranked, *cases.labels, catalogue), METRICS).values


# ---- memory ---------------------------------------------------------------------------------------------------------


def random_cases(users: int, items: int, length: int = 25) -> Cases:
    """Users with random events, of which the last fifth are labels."""
    events = np.random.default_rng(0).integers(1, items + 1, users * length)
    index = np.arange(users)
    sequences = Sequences(
        user_index_U=index,
        user_id_U=pa.array([str(u) for u in index], pa.large_string()),
        items=events,
        offsets=np.arange(users + 1) * length,
        num_history_U=np.full(users, int(0.8 * length)),
    )
    return Cases(sequences, index)


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in bytes; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(args: argparse.Namespace) -> None:
    """Evaluate once and print what it took as JSON; runs in a process of its own."""
    torch.set_num_threads(args.threads)
    items = LocalItemTable(args.items + 1, args.dim, optimizer=SGD())
    owner = resolve("model", "remi")
    model = owner(owner.Config(num_interests=args.interests), items=items, max_history=20)
    cases = random_cases(args.users, args.items)
    few = Cases(cases.sequences, cases.rows[: min(64, args.users)])
    evaluate(model, few, args.length)  # libraries and compiled code are loaded now
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak of this process
    before, started = resident("VmRSS"), time.perf_counter()
    evaluate(model, cases, args.length)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "before": before, "extra": resident("VmHWM") - before}))


def memory(args: argparse.Namespace) -> int:
    """Measure in a fresh process, `--repeats` times, and write the result."""
    sizes = ["users", "items", "dim", "interests", "length", "threads"]
    options = [text for name in sizes for text in (f"--{name}", str(getattr(args, name)))]
    samples = []
    for _ in range(args.repeats):
        command = [sys.executable, "-m", "benchmarks.bench_evaluate", "_memory", *options]
        use = harness.measure_command(command)
        if use.returncode:
            raise RuntimeError(f"the measured process failed:\n{use.output}")
        samples.append(json.loads(use.output.splitlines()[-1]))
    seconds = harness.Spread.of([s["seconds"] for s in samples])
    extra = harness.Spread.of([s["extra"] / 1e6 for s in samples])
    before = harness.Spread.of([s["before"] / 1e6 for s in samples])
    flops = 2.0 * args.users * args.interests * args.items * args.dim
    table = harness.Table(
        header=["", "median (smallest to largest)"],
        rows=[
            ["seconds", seconds.text()],
            ["peak extra memory, MB", extra.text()],
            ["resident before (table, model, users, libraries), MB", before.text()],
            ["GFLOP/s of the inner products", f"{flops / seconds.median / 1e9:.3g}"],
        ],
        samples=samples,
        extra={name: getattr(args, name) for name in sizes},
    )
    notes = "Whole evaluation of random users by a REMI model of random weights: encode, rank every item, metrics."
    path = harness.write_table(
        "evaluate_memory", table, notes=notes, hardware=args.hardware, folder=args.results
    )
    print(path.read_text())
    return 0


# ---- beauty ---------------------------------------------------------------------------------------------------------


def cpu_faiss(threads: int) -> types.ModuleType:
    """A module `faiss` whose GPU classes stand on the CPU's exact index."""
    import faiss

    faiss.omp_set_num_threads(threads)
    module = types.ModuleType("faiss")
    module.StandardGpuResources = lambda: None  # type: ignore[attr-defined]
    module.GpuIndexFlatConfig = types.SimpleNamespace  # type: ignore[attr-defined]
    module.GpuIndexFlatIP = lambda resources, width, config: faiss.IndexFlatIP(width)  # type: ignore[attr-defined]
    return module


def write_users(cases: Cases, path: Path) -> None:
    """Write the users in the public loader's format; the last column, by which it sorts, carries the position."""
    with open(path, "w", encoding="utf-8") as stream:
        for user, row in enumerate(cases.rows):
            events = cases.sequences.items[cases.sequences.offsets[row] : cases.sequences.offsets[row + 1]]
            stream.writelines(f"{user},{item},{n},{n}\n" for n, item in enumerate(events.tolist()))


def public_model(payload: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The public model with random weights, its options and its `utils`."""
    sys.modules["faiss"] = cpu_faiss(payload["threads"])
    utils = load_public_code(Path(payload["source"]))
    options = utils.get_parser().parse_args(
        ["--model_type", "REMI", "--rlambda", "100", "--rbeta", "1", "--dataset", "beauty"]
    )
    utils.setup_seed(2021)
    device = torch.device("cpu")
    model = utils.get_model(
        "beauty", "REMI", payload["items"] + 1, 128, 64, 4, 20, args=options, device=device
    )
    model.set_device(device)
    model.eval()
    with torch.no_grad():
        model.embeddings.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.embeddings.weight[0] = 0.0
        model.position_embedding.zero_()
    return model, options, utils


def our_model(public: Any) -> Recommender:
    """Our REMI with the weights of the public one."""
    rows = public.embeddings.weight.detach()
    items = LocalItemTable(*rows.shape, optimizer=SGD())
    items.assign(torch.arange(len(rows)), {"weight": rows})
    owner = resolve("model", "remi")
    model: Recommender = owner(owner.Config(num_interests=4, bias=False), items=items, max_history=20)
    model.load_state_dict(
        {
            "pooling.inner_DA": public.linear1[0].weight.T,
            "pooling.outer_AK": public.linear2.weight.T,
            "pooling.positions.by_distance_LD": public.position_embedding[0],
        }
    )
    return model


def make_side(payload: dict[str, Any]) -> Callable[[], float | None]:
    """One evaluation by a side; returns Recall@50."""
    torch.set_num_threads(payload["threads"])
    public, options, utils = public_model(payload)
    if payload["side"] == "ours":
        model, cases = our_model(public), load_cases(Workspace(payload["workspace"]), "test")
        return lambda: evaluate(model, Cases(cases.sequences, cases.rows))["recall@50"]
    loader = utils.get_DataLoader(payload["data"], 128, 20, train_flag=0, args=options)
    if payload["side"] == "public, stubbed":
        loader.dataset.compute_time_matrix = lambda times, n: 0
        loader.dataset.compute_adj_matrix = lambda mask, n: 0
    loop = importlib.import_module("evalution").evaluate
    return lambda: float(loop(public, loader, 64, torch.device("cpu"), 50, args=options)["recall"])


def beauty(args: argparse.Namespace) -> int:
    """Measure the sides in turn and write the result."""
    workspace = Workspace(args.workspace)
    cases = load_cases(workspace, "test")
    num_items = workspace.stage("prepare").require().rows["items"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        data = Path(folder) / "test.txt"
        write_users(cases, data)
        payload = {"source": str(args.source), "workspace": args.workspace, "data": str(data)}
        payload |= {"items": num_items, "threads": args.threads}
        sides = {}
        for name in ("ours", "public, stubbed", "public, published"):
            side = OwnProcess("benchmarks.bench_evaluate:make_side", payload | {"side": name})
            sides[name] = processes.enter_context(side)
        recalls = {name: side() for name, side in sides.items()}
        print(f"Recall@50: {recalls}")
        if max(recalls.values()) - min(recalls.values()) > 1e-9:
            raise RuntimeError(f"the sides do not agree: {recalls}")
        result = harness.compare(
            sides,
            unit="evaluation",
            repeats=args.repeats,
            warmup=1,
            extra={
                "users": cases.num_users,
                "items": num_items,
                "threads": args.threads,
                "recall@50": recalls,
            },
        )
    notes = (
        "All test users of the workspace against all items, width 64, 4 interests, top 50, the same weights on all "
        "sides, each in a process of its own. The index of the public side is faiss's, compiled."
    )
    path = harness.write("evaluate_beauty", result, notes=notes, hardware=args.hardware, folder=args.results)
    print(path.read_text())
    return 0


def main() -> int:
    """Choose what to measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("memory", "seconds and memory at a million items"), ("_memory", argparse.SUPPRESS)):
        part = commands.add_parser(name, help=text)
        part.add_argument("--users", type=int, default=20_000)
        part.add_argument("--items", type=int, default=1_000_000)
        part.add_argument("--dim", type=int, default=64, help="width")
        part.add_argument("--interests", type=int, default=4, help="interests of a user")
        part.add_argument("--length", type=int, default=50, help="length of a list")
        part.set_defaults(repeats=3)
    part = commands.add_parser("beauty", help="seconds against the public REMI loop")
    part.add_argument(
        "--source", type=Path, required=True, help="the src folder of a checkout of Tokkiu/REMI"
    )
    part.add_argument("--workspace", required=True, help="a workspace whose prepare stage is complete")
    part.set_defaults(repeats=5)
    for name, part in commands.choices.items():
        part.add_argument(
            "--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of torch and faiss"
        )
        if name != "_memory":
            part.add_argument(
                "--repeats", type=int, default=part.get_default("repeats"), help="measured calls"
            )
            part.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the results")
            part.add_argument("--hardware", help="name of the hardware in the file names; default: found out")
    args = parser.parse_args()
    return {"memory": memory, "beauty": beauty, "_memory": lambda a: measure_memory(a) or 0}[args.command](
        args
    )


if __name__ == "__main__":
    sys.exit(main())
