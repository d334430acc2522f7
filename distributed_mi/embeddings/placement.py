"""Which worker holds which row of a sharded table, and where.

Another placement is another subclass: a table needs an owner and a slot for every id, the ids of a worker in slot
order, and the size of the largest shard. Padding (0) is slot 0 of worker 0 in all of them.

Two things want balance: the rows that each worker holds, and the rows that it is asked for at each step. A lookup asks
for an id once per worker and step however often it occurs, so the load of a row with probability p is
`1 - (1 - p)^n` for n ids of a step, not p (`expected_load`).

    modulo   rows equal to one; load equal to a few rows, because ids are sorted by popularity
    hashed   rows equal to one; load equal in expectation, whatever the order of ids
    ranges   load equal as closely as neighbours allow; popular shards hold fewer rows, and the last one holds most
"""

import itertools
import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.errors import InputError

_MAX_HASHED = 3_000_000_000
"""Rows for which `a r` still fits int64."""


class Placement(ABC):
    """A bijection between ids in [0, num_rows) and (worker, slot)."""

    def __init__(self, num_rows: int, num_workers: int) -> None:
        self.num_rows, self.num_workers = num_rows, num_workers

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Rows of the largest shard; slots lie in [0, capacity)."""

    @abstractmethod
    def owner(self, ids: Tensor) -> Tensor:
        """Worker that holds each id."""

    @abstractmethod
    def slot(self, ids: Tensor) -> Tensor:
        """Position of each id among the rows of its worker."""

    @abstractmethod
    def owned(self, worker: int) -> Tensor:
        """Ids held by a worker, int64, in slot order."""

    def key(self, ids: Tensor) -> Tensor:
        """One number per id that sorts by worker, then slot: `owner * capacity + slot`."""
        return self.owner(ids) * self.capacity + self.slot(ids)


class Modulo(Placement):
    """Row r on worker r % W. Ids are sorted by popularity, so every worker gets its share of the popular rows."""

    @property
    def capacity(self) -> int:
        """Rows of worker 0, which never has fewer than another."""
        return -(-self.num_rows // self.num_workers)

    def owner(self, ids: Tensor) -> Tensor:
        """Remainder of the id."""
        return ids.remainder(self.num_workers)

    def slot(self, ids: Tensor) -> Tensor:
        """Quotient of the id."""
        return ids.div(self.num_workers, rounding_mode="floor")

    def owned(self, worker: int) -> Tensor:
        """Every W-th id from the worker's number on."""
        return torch.arange(min(worker, self.num_rows), self.num_rows, self.num_workers, dtype=torch.int64)


class Hashed(Placement):
    """Row r where row `a r mod V` of `Modulo` is, for a fixed a without a common factor with V.

    A bijection, so shards differ by one row at most and need no list of their ids; a is near V over the golden ratio,
    which scatters neighbours (Knuth, The Art of Computer Programming, volume 3, 6.4).
    """

    def __init__(self, num_rows: int, num_workers: int) -> None:
        super().__init__(num_rows, num_workers)
        if num_rows > _MAX_HASHED:
            raise InputError(f"placement: hashed holds at most {_MAX_HASHED:,} rows; take modulo or ranges")
        self._even = Modulo(num_rows, num_workers)
        self._factor = max(1, round(num_rows * 0.6180339887498949))
        while math.gcd(self._factor, num_rows) != 1:
            self._factor += 1
        self._inverse = pow(self._factor, -1, num_rows)

    @property
    def capacity(self) -> int:
        """As of `Modulo`."""
        return self._even.capacity

    def _scatter(self, ids: Tensor) -> Tensor:
        return (ids * self._factor).remainder(self.num_rows)

    def owner(self, ids: Tensor) -> Tensor:
        """Remainder of the scattered id."""
        return self._even.owner(self._scatter(ids))

    def slot(self, ids: Tensor) -> Tensor:
        """Quotient of the scattered id."""
        return self._even.slot(self._scatter(ids))

    def owned(self, worker: int) -> Tensor:
        """Ids of the worker's scattered rows."""
        return (self._even.owned(worker) * self._inverse).remainder(self.num_rows)


class Ranges(Placement):
    """Row r on the worker whose range of ids holds it.

    Args:
        bounds: first id of each worker's range, and V at the end; ascending.
    """

    def __init__(self, bounds: list[int]) -> None:
        super().__init__(bounds[-1], len(bounds) - 1)
        if bounds[0] != 0 or any(b <= a for a, b in itertools.pairwise(bounds)):
            raise InputError(f"placement: bounds {bounds} must ascend from 0")
        self.bounds = bounds
        self._inner = torch.tensor(bounds[1:-1], dtype=torch.int64)
        self._first = torch.tensor(bounds[:-1], dtype=torch.int64)

    @classmethod
    def balanced(cls, load_V: np.ndarray, num_workers: int, *, max_rows: float = 2.0) -> "Ranges":
        """Ranges of equal load, of which none holds more than `max_rows` times its share of the rows.

        Args:
            load_V: how often each row is asked for at a step (`expected_load`).
            num_workers: W.
            max_rows: bound on the rows of a shard, in shares; ranges give way to it in order.
        """
        num_rows = len(load_V)
        if num_rows < num_workers:
            raise InputError(f"placement: {num_rows} rows are too few for {num_workers} workers")
        cap = max(1, int(max_rows * num_rows / num_workers))
        total = np.concatenate([[0.0], np.cumsum(np.asarray(load_V, dtype=np.float64))])
        bounds = [0]
        for worker in range(num_workers - 1):
            left = num_workers - 1 - worker
            goal = total[bounds[-1]] + (total[-1] - total[bounds[-1]]) / (left + 1)
            at = int(np.searchsorted(total, goal))
            least = max(bounds[-1] + 1, num_rows - left * cap)
            most = min(bounds[-1] + cap, num_rows - left)
            bounds.append(min(max(at, least), most))
        return cls([*bounds, num_rows])

    @property
    def capacity(self) -> int:
        """Rows of the longest range."""
        return max(b - a for a, b in itertools.pairwise(self.bounds))

    def owner(self, ids: Tensor) -> Tensor:
        """Range that holds each id."""
        return torch.bucketize(ids, self._inner.to(ids.device), right=True)

    def slot(self, ids: Tensor) -> Tensor:
        """Distance from the range's first id."""
        return ids - self._first.to(ids.device)[self.owner(ids)]

    def owned(self, worker: int) -> Tensor:
        """The worker's range."""
        return torch.arange(self.bounds[worker], self.bounds[worker + 1], dtype=torch.int64)


def expected_load(counts_V: np.ndarray, ids_per_step: int) -> np.ndarray:
    """Expected lookups of each row at a step of `ids_per_step` draws in proportion to `counts_V`, repeats removed."""
    counts = np.asarray(counts_V, dtype=np.float64)
    share = counts / max(counts.sum(), 1.0)
    return np.asarray(-np.expm1(ids_per_step * np.log1p(-np.minimum(share, 1 - 1e-12))))


def make_placement(name: str, num_rows: int, num_workers: int, load_V: np.ndarray | None = None) -> Placement:
    """The placement of a configuration.

    Args:
        name: `modulo`, `hashed` or `ranges`.
        num_rows: V.
        num_workers: W.
        load_V: needed by `ranges`; None: all rows weigh the same.
    """
    if name == "ranges":
        return Ranges.balanced(np.ones(num_rows) if load_V is None else load_V, num_workers)
    return (Hashed if name == "hashed" else Modulo)(num_rows, num_workers)
