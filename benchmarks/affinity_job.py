"""What a side of `bench_affinity` is asked and what it answers: one clustering, alone in a fresh process.

    found = measure(Job("lists", "vectors.npy", users=10_000))
    found.seconds, found.peak_bytes, found.exemplars_E

`measure` starts `bench_affinity _side JOB`, whose work is `affinity_sides.run_side`.

Shapes:  U users, D width of the vectors, E exemplars.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness


@dataclass(frozen=True)
class Job:
    """What a side does."""

    method: str
    """A name in `METHODS`."""
    vectors: str
    """A .npy file, float32 `[at least U, D]`."""
    users: int
    """U, rows taken from its start."""
    preference: float = -10.0
    damping: float = 0.5
    max_iter: int = 200
    seed: int = 0
    threads: int = 2
    baseline: bool = False
    """Only import and load."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the method."""


@dataclass
class Outcome:
    """What a method found."""

    exemplars_E: np.ndarray | None = None
    """Ascending."""
    labels_U: np.ndarray | None = None
    """Positions in E."""
    facts: dict[str, Any] = field(default_factory=dict)
    later: Callable[[], dict[str, Any]] = dict
    """Further facts, found after time and memory have been taken."""


Run = Callable[[np.ndarray, bool], Outcome]
"""Clusters the vectors; the flag says that it is the warm-up."""


@dataclass
class Measured:
    """What a side's process reported."""

    job: Job
    facts: dict[str, Any]
    """`seconds`, `peak_bytes` and the method's own."""
    exemplars_E: np.ndarray
    labels_U: np.ndarray

    @property
    def seconds(self) -> float:
        """Of the clustering."""
        return float(self.facts["seconds"])

    @property
    def peak_bytes(self) -> int:
        """Of the process."""
        return int(self.facts["peak_bytes"])

    @property
    def own_exemplars(self) -> np.ndarray:
        """Position in U of each user's exemplar."""
        return self.exemplars_E[self.labels_U]

    def sample(self) -> dict[str, Any]:
        """For the JSON of a result."""
        job = {k: v for k, v in asdict(self.job).items() if k != "vectors"}
        return {"job": job, **self.facts}


def measure(job: Job) -> Measured:
    """Run a job in a process of its own; its progress goes to our standard error.

    Raises:
        RuntimeError: the process failed.
    """
    print(f"{job.method}{' (baseline)' if job.baseline else ''}, {job.users:,} users ...", file=sys.stderr)
    threads = {name: str(job.threads) for name in (*harness.THREAD_VARIABLES, "NUMBA_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.npz"
        command = [
            sys.executable,
            "-m",
            "benchmarks.bench_affinity",
            "_side",
            json.dumps(asdict(job)),
            str(out),
        ]
        use = harness.measure_command(
            command, env={**threads, "PYTHONPATH": ":".join(dict.fromkeys(_search_path()))}, show_errors=True
        )
        if use.returncode:
            raise RuntimeError(f"{job.method}: exit status {use.returncode}: {use.output[-2000:]}")
        lines = [line for line in use.output.splitlines() if line.startswith('{"seconds"')]
        facts = json.loads(lines[-1])
        found = np.load(out)
        return Measured(job, facts, found["exemplars"], found["labels"])


def _search_path() -> list[str]:
    """This checkout first, then what this process was given."""
    return [str(harness.ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]


def read_vectors(path: Path, users: int) -> np.ndarray:
    """The first `users` rows of a .npy file; nothing else of it comes into memory.

    Raises:
        ValueError: not a float32 matrix in row order, or too few rows.
    """
    with open(path, "rb") as stream:
        rows, width = read_shape(stream, path)
        if users > rows:
            raise ValueError(f"{path}: {users:,} users wanted, {rows:,} rows there")
        return np.fromfile(stream, dtype=np.float32, count=users * width).reshape(users, width)


def read_shape(stream: Any, path: Path) -> tuple[int, int]:
    """Rows and width in the header of a .npy file, which is left behind.

    Raises:
        ValueError: not a float32 matrix in row order.
    """
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(stream)
    if dtype != np.float32 or len(shape) != 2 or by_column:
        raise ValueError(f"{path}: needs float32 [users, width] in row order, got {dtype} {list(shape)}")
    return shape
