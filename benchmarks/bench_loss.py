"""Losses over the catalogue: memory and seconds of the tiled full softmax, speed of every loss beside plain torch.

    $ python -m benchmarks.bench_loss memory
    $ python -m benchmarks.bench_loss memory --items 50000 --dense-items 20000 --users 256 --choices argmax
    $ python -m benchmarks.bench_loss speed --users 128 1024

`memory` runs each side in a process of its own and takes from the kernel by how much its resident memory rose in one
forward and backward pass, above what it held before: table, interests, and libraries woken up by a pass of two users.
For ours that includes the gradient of every row (items x width x 4 bytes). Dense torch, which holds scores of all
users, interests and items, is measured at a smaller catalogue, beside ours at the same.

`speed` times forward and backward of each loss on the interests of a batch, rows looked up, in this process, the sides
in turn. Plain torch is what one would write: an `nn.Embedding`, explicit scores, torch's losses. Its backward pass
makes a dense gradient of the table; ours collects those of the rows that were read (of all rows for the full softmax),
and an update, not timed, then costs those rows. Both sides' losses are compared before.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import harness
from benchmarks.harness import Spread, Table
from distributed_mi.embeddings.table import LocalItemTable
from distributed_mi.losses.config import LossConfig, ObjectiveConfig
from distributed_mi.models.base import HistoryBatch, StepRows, TrainBatch
from distributed_mi.models.objective import Objective

LOSSES: dict[str, LossConfig] = {
    "sampled_softmax": LossConfig(),
    "hard_negatives": LossConfig(name="hard_negatives"),
    "in_batch": LossConfig(name="in_batch"),
    "bpr": LossConfig(name="bpr"),
    "gbce": LossConfig(name="gbce"),
    "full_softmax, target": LossConfig(name="full_softmax"),
    "full_softmax, argmax": LossConfig(name="full_softmax", choice="argmax"),
    "full_softmax, label_aware": LossConfig(name="full_softmax", choice="label_aware"),
}


# ---- plain torch ----------------------------------------------------------------------------------------------------


def plain_torch(
    config: LossConfig, interests_BKD: Tensor, table: nn.Embedding, targets_B: Tensor, negatives_N: Tensor
) -> Tensor:
    """Loss of each user as one would write it without this project."""
    users = torch.arange(len(targets_B))
    target_BD = table(targets_B)
    nearest_B = (interests_BKD.detach() @ target_BD.detach()[:, :, None]).squeeze(2).argmax(1)
    query_BD = interests_BKD[users, nearest_B]
    if config.name == "full_softmax":
        scores_BV = _scores_of_all(config, interests_BKD, query_BD, table.weight)
        return functional.cross_entropy(scores_BV[:, 1:], targets_B - 1, reduction="none")
    if config.name == "in_batch":
        scores = query_BD @ target_BD.T
        same = (targets_B[:, None] == targets_B) & ~torch.eye(len(users), dtype=torch.bool)
        return functional.cross_entropy(scores.masked_fill(same, -torch.inf), users, reduction="none")
    target_B = (query_BD * target_BD).sum(1)
    scores = query_BD @ table(negatives_N).T
    hits = targets_B[:, None] == negatives_N
    real = (~hits).sum(1)
    if config.name == "bpr":
        losses = -functional.logsigmoid(target_B[:, None] - scores)
        return losses.masked_fill(hits, 0).sum(1) / real
    if config.name == "gbce":
        alpha = len(negatives_N) / (table.num_embeddings - 2)
        beta = alpha * (config.calibration * (1 - 1 / alpha) + 1 / alpha)
        zeros = torch.zeros_like(scores)
        losses = functional.binary_cross_entropy_with_logits(scores, zeros, reduction="none")
        positive = -beta * functional.logsigmoid(target_B)
        return (positive + losses.masked_fill(hits, 0).sum(1)) / (real + 1)
    scores = scores.masked_fill(hits, -torch.inf)
    if config.name == "hard_negatives":
        weights = torch.softmax(config.beta * scores, 1) * real[:, None]
        scores = scores + weights.clamp(min=1e-38).log()
    logits = torch.cat([target_B[:, None], scores], 1)
    return functional.cross_entropy(logits, torch.zeros_like(targets_B), reduction="none")


def _scores_of_all(config: LossConfig, interests_BKD: Tensor, query_BD: Tensor, weight_VD: Tensor) -> Tensor:
    if config.choice == "target":
        return query_BD @ weight_VD.T
    scores_BKV = interests_BKD @ weight_VD.T
    if config.choice == "argmax":
        return scores_BKV.max(dim=1).values
    return (torch.softmax(config.power * scores_BKV, dim=1) * scores_BKV).sum(dim=1)


# ---- speed ----------------------------------------------------------------------------------------------------------


class Sides:
    """One loss on one batch, ours and in plain torch."""

    def __init__(self, config: LossConfig, args: argparse.Namespace, num_users: int) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        rows = args.items + 1
        self.config = config
        self.interests = torch.randn(num_users, args.interests, args.dim, generator=generator)
        self.interests.requires_grad_()
        self.targets = torch.randint(1, rows, (num_users,), generator=generator)
        self.negatives = torch.randint(1, rows, (args.negatives,), generator=generator)
        self.items = LocalItemTable(rows, args.dim, seed=args.seed)
        self.table = nn.Embedding(rows, args.dim)
        self.table.weight.data.copy_(self.items.state()[1]["weight"])
        self.objective = Objective(ObjectiveConfig(loss=config), items=self.items)
        seen = HistoryBatch(self.targets[:, None], torch.ones(num_users, 1, dtype=torch.bool))
        self.batch = TrainBatch(seen, self.targets, self.negatives)

    def our_loss(self) -> Tensor:
        """Mean over users."""
        read = self.negatives if self.objective.reads_negatives else self.negatives[:0]
        target_BD, negative_ND = self.items.lookup(self.targets, read)
        rows = StepRows(target_BD[:, None], target_BD, negative_ND)
        return self.objective(self.interests, self.batch, rows, self.objective.default_read_out).mean()

    def torch_loss(self) -> Tensor:
        """Mean over users."""
        return plain_torch(self.config, self.interests, self.table, self.targets, self.negatives).mean()

    def ours(self) -> None:
        """Forward and backward."""
        self.our_loss().backward()
        self.items.zero_grad()
        self.interests.grad = None

    def torch(self) -> None:
        """Forward and backward."""
        self.torch_loss().backward()
        self.table.weight.grad = None
        self.interests.grad = None

    def check(self) -> None:
        """Refuse to time two things that are not the same."""
        torch.testing.assert_close(self.our_loss(), self.torch_loss(), rtol=1e-4, atol=1e-5)


def speed(args: argparse.Namespace) -> None:
    """Forward and backward of each loss beside plain torch."""
    torch.set_num_threads(args.threads)
    rows, samples = [], []
    for num_users in args.users:
        for name in args.losses or LOSSES:
            sides = Sides(LOSSES[name], args, num_users)
            sides.check()
            found = harness.compare(
                {"ours": sides.ours, "torch": sides.torch},
                unit="forward and backward",
                repeats=args.repeats,
                warmup=args.warmup,
            )
            times = [found.seconds(side).text(1000) for side in found.sides]
            rows.append([f"{name}, {num_users:,} users", *times, found.ratio("ours", "torch").text()])
            samples.append({"loss": name, "users": num_users, "seconds": found.samples_s})
    table = Table(["loss", "ours, ms", "torch, ms", "ours / torch"], rows, samples)
    notes = (
        f"{args.items:,} items, width {args.dim}, {args.interests} interests, {args.negatives:,} shared negatives, "
        f"threads: {args.threads}. Forward and backward, without the update. Median (smallest to largest) of "
        f"{args.repeats} repeats; favours ours where few rows are read, since torch's gradient of the table is dense."
    )
    print(harness.write_table("loss_speed", table, notes=notes, folder=args.results).read_text())


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace) -> None:
    """Seconds and extra memory of a full softmax, each side in a process of its own."""
    jobs = [("ours", choice, args.items) for choice in args.choices]
    jobs += [(side, choice, args.dense_items) for choice in args.choices for side in ("ours", "torch")]
    rows, samples = [], []
    for side, choice, items in jobs if args.dense_items else jobs[: len(args.choices)]:
        runs = [_run_side(args, side, choice, items) for _ in range(args.repeats)]
        samples += runs
        spreads = [
            Spread.of([run[key] for run in runs]) for key in ("forward_s", "backward_s", "extra_bytes")
        ]
        cells = [spreads[0].text(), spreads[1].text(), spreads[2].text(1e-6, 4)]
        rows.append([f"{side}, {choice}, {items:,} items", *cells, f"{runs[0]['loss']:.5f}"])
        print(" | ".join(rows[-1]), flush=True)
    header = ["side", "forward, s", "backward, s", "extra memory, MB", "loss"]
    notes = (
        f"{args.users:,} users, {args.interests} interests, width {args.dim}, threads: {args.threads}. Extra memory: "
        "rise of the peak of resident memory in one forward and backward pass; the gradient of "
        f"{args.items:,} rows is {(args.items + 1) * args.dim * 4e-6:,.0f} MB of it. Median (smallest to largest) of "
        f"{args.repeats} processes."
    )
    table = Table(header, rows, samples)
    print(harness.write_table("loss_memory", table, notes=notes, folder=args.results).read_text())


def _run_side(args: argparse.Namespace, side: str, choice: str, items: int) -> dict[str, Any]:
    sizes = {"items": items, "dim": args.dim, "interests": args.interests, "users": args.users}
    job = {"side": side, "choice": choice, "threads": args.threads, "seed": args.seed, **sizes}
    command = [sys.executable, "-m", "benchmarks.bench_loss", "side", json.dumps(job)]
    use = harness.measure_command(command)
    if use.returncode:
        raise RuntimeError(f"{job} failed:\n{use.output[-3000:]}")
    return {**job, **json.loads(use.output.splitlines()[-1])}


def side(args: argparse.Namespace) -> None:
    """One side of `memory`, in this process; prints what it took as JSON."""
    job = json.loads(args.job)
    torch.set_num_threads(job["threads"])
    config = LossConfig(name="full_softmax", choice=job["choice"])
    _pass(Sides(config, argparse.Namespace(**{**job, "items": 2_000}, negatives=1), 2), job["side"])
    sides = Sides(config, argparse.Namespace(**job, negatives=1), job["users"])
    if job["side"] == "ours":
        del sides.table
    else:
        del sides.items, sides.objective
    before = _reset_peak_bytes()
    facts = _pass(sides, job["side"])
    print(json.dumps({**facts, "before_bytes": before, "extra_bytes": _status_bytes("VmHWM") - before}))


def _pass(sides: Sides, name: str) -> dict[str, float]:
    """Forward and backward once; gradients stay where they are until the end, as before an update."""
    started = time.perf_counter()
    loss = sides.our_loss() if name == "ours" else sides.torch_loss()
    between = time.perf_counter()
    loss.backward()
    ended = time.perf_counter()
    return {"loss": loss.item(), "forward_s": between - started, "backward_s": ended - between}


def _reset_peak_bytes() -> int:
    """Set the peak of this process's resident memory to what it holds now; Linux with glibc.

    Freed memory goes back to the kernel first, so that none is used again unseen.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


# ---- command line ---------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Arguments of all commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, run, users, items, threads, repeats in (
        ("memory", memory, 1_024, 1_000_000, 2, 3),
        ("speed", speed, [128, 1_024], 12_101, 1, 9),
    ):
        command = commands.add_parser(name, help=str(run.__doc__))
        command.set_defaults(run=run)
        command.add_argument("--users", type=int, nargs="+" if name == "speed" else None, default=users)
        command.add_argument("--items", type=int, default=items, help="items of the catalogue")
        command.add_argument("--dim", type=int, default=64, help="width")
        command.add_argument("--interests", type=int, default=4, help="interests of a user")
        command.add_argument("--threads", type=int, default=threads, help="threads of torch")
        command.add_argument("--repeats", type=int, default=repeats, help="measured runs of each side")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the result")
        if name == "speed":
            command.add_argument("--negatives", type=int, default=1_280, help="shared negatives")
            command.add_argument("--warmup", type=int, default=2, help="calls that do not count")
            command.add_argument("--losses", nargs="+", choices=list(LOSSES), help="default: all")
        else:
            command.add_argument(
                "--dense-items", type=int, default=50_000, help="catalogue for dense torch; 0: leave it out"
            )
            choices = ["target", "argmax", "label_aware"]
            command.add_argument("--choices", nargs="+", choices=choices, default=choices)
    alone = commands.add_parser("side", help="one side of memory; the other command starts it")
    alone.add_argument("job", help="JSON")
    alone.set_defaults(run=side)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the result."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = args.run
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
