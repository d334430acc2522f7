"""What the commands of `bench_affinity` have in common: arguments, vectors, the words of a result."""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.affinity_data import net_similarity, write_blobs
from benchmarks.affinity_job import Job, Measured, measure, read_shape, read_vectors
from benchmarks.harness import Table

GENERATED_USERS = 22_363
"""Users drawn for `--users all` without a file: as many as Beauty has."""


@dataclass
class Setup:
    """Arguments and the vectors they ask for."""

    args: argparse.Namespace
    path: Path
    users: int
    facts: dict[str, Any]
    """What the result states about the input."""

    def job(self, method: str, **changes: Any) -> Job:
        """A job on these vectors with the settings of the command line."""
        a = self.args
        known = {
            "users": self.users,
            "preference": a.preference,
            "damping": a.damping,
            "max_iter": a.max_iter,
        }
        return Job(method, str(self.path), **{**known, "seed": a.seed, "threads": a.threads, **changes})

    def run(self, method: str, **changes: Any) -> Measured:
        """Measure such a job."""
        return measure(self.job(method, **changes))

    def net(self, found: Measured) -> float:
        """Net similarity, the same sum for every method; NaN where nothing was found."""
        if not len(found.exemplars_E):
            return float("nan")
        vectors = read_vectors(self.path, found.job.users)
        return net_similarity(vectors, found.exemplars_E, found.labels_U, self.args.preference)

    def write(
        self, table: Table, notes: str, plot: Callable[[Path], None] | None = None, **facts: Any
    ) -> None:
        """Write and print a result."""
        a = self.args
        settings = f"preference {a.preference:g}, damping {a.damping:g}, at most {a.max_iter} rounds, "
        settings += f"{a.threads} threads, seed {a.seed}"
        table.extra.update({**facts, **self.facts, "settings": settings})
        path = harness.write_table(
            a.name or f"affinity_{a.command}",
            table,
            notes=notes,
            folder=a.results,
            hardware=a.hardware,
            plot=plot,
        )
        print(path.read_text())


def verdict(value: float, limit: float, *, at_least: bool = False, unit: str = "") -> str:
    """`12.3x, bar at least 10x: met`."""
    met = value >= limit if at_least else value <= limit
    return f"{value:.3g}{unit}, bar at {'least' if at_least else 'most'} {limit:g}{unit}: {'met' if met else 'MISSED'}"


def gb(size: float) -> str:
    """Bytes as GB with three digits."""
    return f"{size / 1e9:.3g}"


def yes(value: object) -> str:
    """For a table."""
    return "yes" if value else "NO"


def prepare(args: argparse.Namespace, folder: Path) -> Setup:
    """The vectors of a command: a file's, or drawn ones."""
    if args.vectors is None:
        users = GENERATED_USERS if args.users is None else args.users
        path = folder / "vectors.npy"
        write_blobs(path, users, args.width, args.seed)
        about = f"drawn, one blob for every 40 users, {users:,} x {args.width}"
        return Setup(args, path, users, {"vectors": about})
    with open(args.vectors, "rb") as stream:
        rows, width = read_shape(stream, args.vectors)
    with open(args.vectors, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    users = rows if args.users is None else args.users
    about = f"{args.vectors.name} (sha256 {digest}), {users:,} of {rows:,} rows, {width} wide"
    return Setup(args, args.vectors, users, {"vectors": about})


def differing(one: Measured, other: Measured) -> int:
    """Users with another exemplar; all of them where a side has none."""
    if not len(one.exemplars_E) or not len(other.exemplars_E):
        return max(len(one.labels_U), len(other.labels_U))
    return int((one.own_exemplars != other.own_exemplars).sum())


def state_cells(found: Measured) -> list[str]:
    """Rounds, whether they converged, exemplars and pairs, for a table."""
    facts = found.facts
    return [str(facts["rounds"]), yes(facts["converged"]), f"{facts['exemplars']:,}", f"{facts['pairs']:,}"]
