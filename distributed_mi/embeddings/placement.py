"""Which worker holds which row of a sharded table, and where.

Another placement is another subclass: a table needs an owner and a slot for every id, the ids of a worker in slot
order, and the size of the largest shard.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


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
        """Ids held by a worker, int64, in slot order and ascending (ties of a top-k rely on that)."""

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
