"""Evaluation on the whole catalogue: memory at a million items, and seconds against the public REMI loop.

    $ python -m benchmarks.bench_evaluate memory
    $ distributed-mi prepare jobs/configs/beauty-remi.toml data.interactions=... data.items=... workspace=WORKSPACE
    $ python -m benchmarks.bench_evaluate beauty --source CHECKOUT/src --workspace WORKSPACE

`memory` evaluates random users with a REMI model of random weights in a process of its own and reports seconds and
how far its resident memory rose above what table, model and users take.

`beauty` evaluates the test users with one model of the public code (github.com/Tokkiu/REMI, random weights), so that
all sides rank the same interests against the same items; that they agree in Recall@50 is checked. Sides:
    ours               `rank_share` and the metrics, around the public model's forward pass
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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks import harness
from benchmarks.bench_train_step import load_public_code
from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.config import ConfigModel
from distributed_mi.core.registry import resolve
from distributed_mi.data.batches import Sequences
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.optimizer import SGD
from distributed_mi.embeddings.table import ItemTable, LocalItemTable
from distributed_mi.evaluation import scoring
from distributed_mi.evaluation.metrics.base import CatalogueInfo, RankedLists
from distributed_mi.evaluation.protocol import Cases, load_cases
from distributed_mi.evaluation.topk import rank_share
from distributed_mi.models.base import HistoryBatch, Recommender, UserState

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


class PublicEncoder(Recommender):
    """The public model behind our interface: real items first, padding after them, as it was trained to read."""

    class Config(ConfigModel):
        """Nothing to choose."""

    def __init__(self, public: Any, *, items: ItemTable, max_history: int) -> None:
        super().__init__(self.Config(), items=items, max_history=max_history)
        self.public = public

    def encode_rows(self, history: HistoryBatch, history_rows_BLD: torch.Tensor) -> UserState:
        """Interests by its forward pass, which looks its rows up itself."""
        order = torch.argsort(~history.mask_BL, dim=1, stable=True)
        ids, mask = history.item_ids_BL.gather(1, order), history.mask_BL.gather(1, order).long()
        return UserState(self.public(ids, None, mask, None, torch.device("cpu"), train=False)[0])


def write_users(cases: Cases, path: Path) -> None:
    """Write the users in the public loader's format; the last column, by which it sorts, carries the position."""
    with open(path, "w", encoding="utf-8") as stream:
        for user, row in enumerate(cases.rows):
            events = cases.sequences.items[cases.sequences.offsets[row] : cases.sequences.offsets[row + 1]]
            stream.writelines(f"{user},{item},{n},{n}\n" for n, item in enumerate(events.tolist()))


def public_sides(
    source: Path, data: Path, num_items: int, threads: int
) -> tuple[Any, dict[str, Callable[[], dict[str, float]]]]:
    """The public model, and its evaluation with and without the two matrices."""
    sys.modules["faiss"] = cpu_faiss(threads)
    utils = load_public_code(source)
    public_evaluation = importlib.import_module("evalution")
    device = torch.device("cpu")
    options = utils.get_parser().parse_args(
        ["--model_type", "REMI", "--rlambda", "100", "--rbeta", "1", "--dataset", "beauty"]
    )
    utils.setup_seed(2021)
    model = utils.get_model("beauty", "REMI", num_items + 1, 128, 64, 4, 20, args=options, device=device)
    model.set_device(device)
    model.eval()
    torch.nn.init.normal_(model.embeddings.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.embeddings.weight[0] = 0.0

    def side(stub_matrices: bool) -> Callable[[], dict[str, float]]:
        loader = utils.get_DataLoader(str(data), 128, 20, train_flag=0, args=options)
        if stub_matrices:
            loader.dataset.compute_time_matrix = lambda times, n: 0
            loader.dataset.compute_adj_matrix = lambda mask, n: 0
        return lambda: public_evaluation.evaluate(model, loader, 64, device, 50, args=options)

    return model, {"public, stubbed": side(True), "public, published": side(False)}


def beauty(args: argparse.Namespace) -> int:
    """Measure the sides in turn and write the result."""
    torch.set_num_threads(args.threads)
    workspace = Workspace(args.workspace)
    cases = load_cases(workspace, "test")
    num_items = workspace.stage("prepare").require().rows["items"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "test.txt"
        write_users(cases, data)
        public, sides = public_sides(args.source, data, num_items, args.threads)
        items = LocalItemTable(num_items + 1, 64, optimizer=SGD())
        items.assign(torch.arange(num_items + 1), {"weight": public.embeddings.weight.detach()})
        model = PublicEncoder(public, items=items, max_history=20)

        def ours() -> dict[str, float | None]:
            return evaluate(model, Cases(cases.sequences, cases.rows))

        found, theirs = ours(), sides["public, stubbed"]()
        recalls = {"ours": found["recall@50"], "public": theirs["recall"]}
        print(f"Recall@50: {recalls}")
        if abs(float(found["recall@50"] or 0.0) - theirs["recall"]) > 1e-9:
            raise RuntimeError(f"the sides do not agree: {found} and {theirs}")
        result = harness.compare(
            {"ours": ours, **sides},
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
        "All test users of the workspace against all items, width 64, 4 interests, top 50, one model on all sides. "
        "Favours the public side in this: its index is faiss's, compiled; ours also counts the encoding of one padded "
        "chunk. Favours ours: nothing that we know of."
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
