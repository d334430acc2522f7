"""Lookup and update of a sharded table: ours, TorchRec's, and a replicated one, on two processes of this machine.

    $ python -m benchmarks.bench_embedding speed       # 10M x 64, 1,024 users x 50 ids; uniform and zipf
    $ python -m benchmarks.bench_embedding memory      # 50M x 64 over two workers: does it fit in 1.15 of its bytes?
    $ python -m benchmarks.bench_embedding placement   # how uneven rows and load are on 2 to 64 workers

A step looks ids up, gives each row a gradient and updates the rows. All sides of `speed` live in the same processes
and take turns batch by batch. TorchRec needs `pip install --no-deps -r cluster/locks/cpu-torchrec.txt`;
without it that side is left out and the result says so.
"""

import argparse
import importlib
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import embedding_sides, harness
from benchmarks.processes import on_processes
from distributed_mi.embeddings.placement import expected_load, make_placement


def draw_ids(kind: str, rows: int, shape: tuple[int, int], seed: int) -> Tensor:
    """Ids in 1 .. rows - 1: `uniform`, or `zipf`, with probability proportional to rank ** -1.05."""
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        return torch.from_numpy(rng.integers(1, rows, size=shape))
    power = 0.05  # inverse of the distribution function of the continuous law
    uniform = rng.random(shape)
    ids = (1 - uniform * (1 - float(rows) ** -power)) ** (-1 / power)
    return torch.from_numpy(np.minimum(ids.astype(np.int64), rows - 1))


# ---- what each process runs -----------------------------------------------------------------------------------------


def run_speed(args: dict[str, Any]) -> dict[str, Any]:
    """Samples of every side, in the same order in all processes."""
    rank = dist.get_rank()
    difference = same_rows(args["sides"])
    steps = {name: embedding_sides.MAKE[name](args["rows"], args["width"]) for name in args["sides"]}
    out: dict[str, Any] = {"difference": difference}
    shuffle = random.Random(0).shuffle
    for kind in ("uniform", "zipf"):
        batches = [
            draw_ids(kind, args["rows"], (args["users"], args["length"]), 100 * i + rank) for i in range(8)
        ]
        samples: dict[str, list[float]] = {name: [] for name in steps}
        order = list(steps)
        for repeat in range(args["warmup"] + args["repeats"]):
            shuffle(order)
            for name in order:
                if repeat == args["warmup"] and hasattr(steps[name], "counters"):
                    steps[name].counters()
                dist.barrier()
                started = time.perf_counter()
                for step in range(args["steps"]):
                    steps[name](batches[(repeat * args["steps"] + step) % 8])
                dist.barrier()
                if repeat >= args["warmup"]:
                    samples[name].append(time.perf_counter() - started)
        done = args["repeats"] * args["steps"]
        out[kind] = {
            "samples": samples,
            "bytes": _bytes_moved(steps["ours"], done, args["width"]),
            "unique_share": float(np.mean([len(torch.unique(b)) / b.numel() for b in batches])),
        }
    return out


def same_rows(sides: list[str]) -> float | None:
    """Largest difference between ours and TorchRec after 5 steps of a small table; None without TorchRec.

    Raises:
        AssertionError: they do not compute the same, so that their seconds mean nothing.
    """
    other = "TorchRec row-wise fused"
    if other not in sides:
        return None
    ours, theirs = (embedding_sides.MAKE[name](1_000, 16) for name in ("ours", other))
    everything = torch.arange(1_000)
    theirs.fill(ours.weight(everything))
    for step in range(5):
        ids = draw_ids("zipf", 1_000, (20, 10), 10 * step + dist.get_rank())
        ours(ids)
        theirs(ids)
    difference = float((ours.weight(everything) - theirs.weight(everything)).abs().max())
    moved = float(
        (ours.weight(everything) - embedding_sides.MAKE["ours"](1_000, 16).weight(everything)).abs().max()
    )
    assert 100 * difference < moved, (difference, moved)
    return difference


def _bytes_moved(ours: embedding_sides.Ours, steps: int, width: int) -> dict[str, float]:
    """Bytes of a step of this process, and the least: unique rows in, their gradients out, rows read and written once.

    Rows that this process serves are as many as it asks for, up to chance, so its own lookups stand for them.
    """
    found = ours.counters()
    unique = found.unique_ids / steps
    row = 4 * width
    exchanged = found.exchanged_bytes / steps
    # In the table: rows are read to be sent, then read and written by the update with 8 bytes of state.
    table = unique * (row + 2 * row + 8)
    least = unique * (row + row) / 2 + unique * 2 * row  # half of the rows are at home
    return {"unique_ids": unique, "exchanged": exchanged, "moved": exchanged + table, "least": least}


def run_memory(args: dict[str, Any]) -> dict[str, Any]:
    """Resident memory of one worker that trains its half of the table."""
    rank, size = dist.get_rank(), dist.get_world_size()
    started = time.perf_counter()
    ours = embedding_sides.MAKE["ours"](args["rows"], args["width"])
    made = time.perf_counter() - started
    seconds = []
    for step in range(args["steps"]):
        ids = draw_ids(
            "zipf" if step % 2 else "uniform", args["rows"], (args["users"], args["length"]), step + rank
        )
        dist.barrier()
        started = time.perf_counter()
        ours(ids)
        seconds.append(time.perf_counter() - started)
    tensors = ours.table.state()[1].values()
    return {
        "seconds_to_make": made,
        "seconds_per_step": float(np.median(seconds)),
        "table_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "size": size,
    }


# ---- results --------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> None:
    """Seconds of a step, side by side, and bytes against the least possible."""
    sides, notes = _available(args.sides)
    payload = {
        k: getattr(args, k) for k in ("rows", "width", "users", "length", "steps", "repeats", "warmup")
    }
    found = on_processes("benchmarks.bench_embedding:run_speed", args.processes, payload | {"sides": sides})
    difference = found.pop("difference")
    for kind, result in found.items():
        moved = result["bytes"]
        extra = {
            "rows": args.rows,
            "width": args.width,
            "processes": args.processes,
            "ids of a process": args.users * args.length,
            "largest difference of ours and TorchRec's rows after 5 steps (1,000 x 16)": difference,
            "share of distinct ids": round(result["unique_share"], 3),
            "MB exchanged by a process (ours)": round(moved["exchanged"] / 1e6, 2),
            "MB moved (ours)": round(moved["moved"] / 1e6, 2),
            "MB moved at least": round(moved["least"] / 1e6, 2),
            "moved / least": round(moved["moved"] / moved["least"], 3),
        }
        unit = f"{args.steps} steps of {args.users} x {args.length} {kind} ids"
        comparison = harness.Comparison(unit, args.warmup, result["samples"], extra)
        print(harness.write(f"embedding_{kind}", comparison, notes=notes, folder=args.results).read_text())


def _available(sides: list[str]) -> tuple[list[str], str]:
    notes = (
        "Two processes, one thread each, gloo over loopback. Row-wise Adagrad, but for DDP, which "
        "has SGD, less work, and whose table stands whole in each process."
    )
    missing = []
    try:
        importlib.import_module("fbgemm_gpu")
        importlib.import_module("torchrec")
    except ImportError as error:
        missing = ["TorchRec row-wise fused"]
        notes += f" TorchRec was not installed ({error.name})."
    return [s for s in sides if s not in missing], notes


def memory(args: argparse.Namespace) -> None:
    """Resident memory of each worker against the bytes of its rows and their state."""
    rows = args.rows
    payload = {
        "rows": rows,
        "width": args.width,
        "users": args.users,
        "length": args.length,
        "steps": args.steps,
    }
    found = on_processes("benchmarks.bench_embedding:run_memory", args.processes, payload)
    ratio = found["resident_bytes"] / found["table_bytes"]
    line = {
        "rows x width": f"{rows:,} x {args.width}",
        "workers": str(found["size"]),
        "table + state, GiB a worker": f"{found['table_bytes'] / 2**30:.3f}",
        "resident, GiB": f"{found['resident_bytes'] / 2**30:.3f}",
        "peak, GiB": f"{found['peak_bytes'] / 2**30:.3f}",
        "resident / table": f"{ratio:.3f}",
        "s to make": f"{found['seconds_to_make']:.1f}",
        "ms a step": f"{1000 * found['seconds_per_step']:.1f}",
    }
    table = harness.Table(list(line), [list(line.values())], [found])
    print(harness.write_table("embedding_memory", table, folder=args.results).read_text())


def placement(args: argparse.Namespace) -> None:
    """Largest shard over the mean, in rows and in expected distinct lookups of a step, under a zipf law."""
    counts = 1.0 / np.arange(1, args.rows + 1) ** 1.05
    load = expected_load(counts, args.users * args.length)
    lines, data = [], []
    for workers in (2, 4, 16, 64):
        for name in ("modulo", "hashed", "ranges"):
            chosen = make_placement(name, args.rows, workers, load)
            owner = chosen.owner(torch.arange(args.rows)).numpy()
            rows_W = np.bincount(owner, minlength=workers)
            load_W = np.bincount(owner, weights=load, minlength=workers)
            traffic_W = np.bincount(owner, weights=counts, minlength=workers)
            uneven = [float(x.max() / x.mean()) for x in (rows_W, load_W, traffic_W)]
            lines.append([str(workers), name, *(f"{x:.4g}" for x in uneven)])
            data.append(
                dict(
                    zip(
                        ("workers", "placement", "rows", "distinct", "all"),
                        (workers, name, *uneven),
                        strict=True,
                    )
                )
            )
    header = ["workers", "placement", "rows, largest / mean", "distinct lookups", "lookups with repeats"]
    extra = {"rows": args.rows, "ids of a worker and step": args.users * args.length, "law": "zipf 1.05"}
    table = harness.Table(header, lines, data, extra)
    print(harness.write_table("embedding_placement", table, folder=args.results).read_text())


def main() -> int:
    """Run one measurement and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rows, steps in (
        ("speed", 10_000_000, 4),
        ("memory", 50_000_000, 10),
        ("placement", 10_000_000, 0),
    ):
        command = commands.add_parser(name)
        command.add_argument("--rows", type=int, default=rows, help="V")
        command.add_argument("--width", type=int, default=64, help="D")
        command.add_argument("--users", type=int, default=1_024, help="of a process and step")
        command.add_argument("--length", type=int, default=50, help="ids of a user")
        command.add_argument("--steps", type=int, default=steps, help="in one measured call")
        command.add_argument("--processes", type=int, default=2)
        command.add_argument("--repeats", type=int, default=7)
        command.add_argument("--warmup", type=int, default=2)
        command.add_argument(
            "--sides", nargs="+", default=list(embedding_sides.MAKE), choices=list(embedding_sides.MAKE)
        )
        command.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the result")
    args = parser.parse_args()
    {"speed": speed, "memory": memory, "placement": placement}[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
