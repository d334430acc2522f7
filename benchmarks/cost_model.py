"""What a training step costs on W workers: bytes, operations and seconds, from sizes alone.

REMI (or any model with attentive pooling and shared negatives) whose table is spread over the workers:

    distinct ids of a worker      n = sum_v 1 - (1 - p_v)^h  (history and targets)  +  distinct negatives
    exchange, bytes out           (8 n + 4 D n + 4 D n) (W - 1) / W      ids, rows served, gradients
    dense gradients, bytes out    2 * 4 P (W - 1) / W                    ring all-reduce
    operations                    3 * 2 (h D A + h A K + B N D)          forward and backward
    table, bytes                  n W / W rows: (read and write) (D + s) numbers, and n rows read to be sent
    seconds                       operations / rate + bytes / bandwidth + collectives * latency + what a user costs
                                  beside matrix products; nothing overlapped

h real history items and targets of a worker, B its users, N negatives, D width, A attention width, K interests, P dense
parameters, s numbers of optimizer state a row. `bench_scaling` holds ids and bytes against the table's counters, and
seconds against the clock. The last table, of 10^9 rows on 1,024 GPUs, is arithmetic: nothing of it was run.
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Law:
    """How often rows occur: groups of rows with one probability each.

    Args:
        sizes: rows of each group.
        probabilities: of one row of each group; `sum(sizes * probabilities) = 1`.
    """

    sizes: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> "Law":
        """From how often each row was seen."""
        values, sizes = np.unique(np.asarray(counts, dtype=np.float64), return_counts=True)
        return cls(sizes.astype(np.float64), values / max(float((values * sizes).sum()), 1.0))

    @classmethod
    def zipf(cls, rows: int, exponent: float) -> "Law":
        """Probability proportional to rank ** -exponent; ranks beyond 1,000 in groups of a hundredth of their rank."""
        edges = [*range(1, 1_001)]
        while edges[-1] < rows + 1:
            edges.append(min(rows + 1, edges[-1] + max(1, edges[-1] // 100)))
        bounds = np.array(edges, dtype=np.float64)
        sizes = np.diff(bounds)
        middle = (bounds[:-1] + bounds[1:] - 1) / 2
        weight = middle**-exponent
        return cls(sizes, weight / (sizes * weight).sum())

    @classmethod
    def uniform(cls, rows: int) -> "Law":
        """All alike."""
        return cls(np.array([float(rows)]), np.array([1.0 / rows]))

    def distinct(self, draws: float) -> float:
        """Expected distinct rows of so many independent draws."""
        inside = np.minimum(self.probabilities, 1 - 1e-12)
        return float((self.sizes * -np.expm1(draws * np.log1p(-inside))).sum())


@dataclass(frozen=True)
class Job:
    """Sizes of a training, over all workers."""

    rows: int
    law: Law
    """Of histories and targets; negatives are uniform."""
    users: int
    """Of a step."""
    history: float
    """Mean real items of a user's window."""
    negatives: int
    width: int = 64
    attention: int = 256
    interests: int = 4
    state: int = 128
    """Numbers of optimizer state a row: 2 D for Adam, 1 for row-wise Adagrad."""
    dense: int = 18_944
    """Parameters outside of the table."""
    number_bytes: int = 4
    """Of a number that travels: 4, or 2 for bfloat16."""


@dataclass(frozen=True)
class Machine:
    """What one worker has."""

    flops: float
    """Matrix products, operations a second."""
    memory: float
    """Bytes a second of scattered rows."""
    link: float
    """Bytes a second out of one worker to the others."""
    latency: float
    """Seconds of a collective that carries nothing."""
    per_user: float = 0.0
    """Seconds of a user that are not matrix products: passes over scores and activations, the batch."""
    fixed: float = 0.0
    """Seconds of a step whatever its size: interpreter, launches."""


@dataclass(frozen=True)
class Cost:
    """Of one worker and step."""

    unique_ids: float
    exchanged_bytes: float
    dense_bytes: float
    operations: float
    table_bytes: float
    table_resident_bytes: float
    compute_s: float
    exchange_s: float
    update_s: float
    latency_s: float
    other_s: float

    @property
    def seconds(self) -> float:
        """Of the step, nothing overlapped."""
        return self.compute_s + self.exchange_s + self.update_s + self.latency_s + self.other_s

    @property
    def exchange_share(self) -> float:
        """Exchanges and their latency in the step."""
        return (self.exchange_s + self.latency_s) / self.seconds


COLLECTIVES = 5
"""Of a step: counts, ids, rows, gradients, dense gradients."""


def predict(job: Job, machine: Machine, workers: int) -> Cost:
    """Cost of a step on so many workers."""
    users = job.users / workers
    places = users * (job.history + 1)
    unique = job.law.distinct(places)
    negative = Law.uniform(job.rows).distinct(job.negatives)
    unique += negative * (1 - unique / job.rows)
    away = (workers - 1) / workers
    row = job.width * job.number_bytes
    exchanged = unique * (8 + 2 * row) * away
    dense = 2 * 4 * job.dense * away
    hidden = users * job.history * job.attention * (job.width + job.interests)
    operations = 3 * 2 * (hidden + users * job.negatives * job.width)
    touched = min(job.law.distinct(places * workers) + negative, job.rows) / workers
    table = 4 * (2 * touched * (job.width + job.state) + unique * job.width)
    return Cost(
        unique_ids=unique,
        exchanged_bytes=exchanged,
        dense_bytes=dense,
        operations=operations,
        table_bytes=table,
        table_resident_bytes=4.0 * job.rows * (job.width + job.state) / workers,
        compute_s=operations / machine.flops,
        exchange_s=(exchanged + dense) / machine.link,
        update_s=table / machine.memory,
        latency_s=COLLECTIVES * machine.latency if workers > 1 else 0.0,
        other_s=machine.fixed + users * machine.per_user,
    )


H100 = Machine(flops=200e12, memory=1.5e12, link=40e9, latency=60e-6, fixed=1e-3)
"""An assumption, not a measurement: half the dense bf16 rate, half the memory bandwidth for scattered rows, one 400
Gbit/s port a GPU at 80 %, 60 microseconds a collective over many nodes, 1 ms of launches."""


def billion_rows() -> list[tuple[int, Job, Cost]]:
    """10^9 rows x 128 with row-wise Adagrad, 1,024 users of 100 items a GPU, 8,192 negatives, on 64 to 1,024 GPUs."""
    law = Law.zipf(1_000_000_000, 1.05)
    base = Job(
        rows=1_000_000_000,
        law=law,
        users=0,
        history=100,
        negatives=8_192,
        width=128,
        attention=512,
        state=1,
        dense=70_000,
        number_bytes=2,
    )
    found = []
    for workers in (64, 256, 1_024):
        job = replace(base, users=1_024 * workers)
        found.append((workers, job, predict(job, H100, workers)))
    return found
