"""An item table whose rows are spread over the workers of a group.

A lookup is three exchanges: how many rows of each worker are wanted, which, and the rows. Ids are de-duplicated
first, over all id tensors of the call, so a popular item and the padding travel once per worker and step. Backward
sends the summed row gradients back the same way, and the owner adds what it gets from all workers: the gradient of
the step is the sum of the workers' partial losses (`LossTerms.total`).

Only the rows have to be waited for where they are needed. A lookup that is announced has its counts on their way before
the rows of the one before it, and its ids while the model computes on those. Row gradients travel while the dense
gradients are reduced and applied, and while the next accumulation part is computed.

Shapes:  V rows, D width, W workers, U distinct ids of this worker's lookup.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_mi.core.errors import InputError
from distributed_mi.embeddings.counters import TableCounters
from distributed_mi.embeddings.gradients import add_by_row
from distributed_mi.embeddings.group import Exchange, WorkerGroup
from distributed_mi.embeddings.optimizer import TableOptimizer
from distributed_mi.embeddings.placement import Modulo, Placement
from distributed_mi.embeddings.replication import HotRows
from distributed_mi.embeddings.storage import RowStore, check_ids
from distributed_mi.embeddings.table import Fetched, ItemTable, check_size
from distributed_mi.embeddings.topk import TopK, check_topk, sharded_topk


class ShardedItemTable(ItemTable):
    """Same interface and same numbers as `LocalItemTable`; each worker holds its rows only.

    An error on one worker (an id outside the table) ends that worker in the middle of a collective; the others then
    fail with a connection error of torch.distributed.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        group: WorkerGroup,
        seed: int = 0,
        std: float | None = None,
        optimizer: TableOptimizer | None = None,
        device: torch.device | str | None = None,
        placement: Placement | None = None,
        replicated_rows: int = 0,
        exchange_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make this worker's shard.

        Args:
            num_rows: V, padding included.
            dim: D.
            group: the workers.
            seed: seed of the first values, which do not depend on the workers.
            std: their standard deviation; None: sqrt(2 / D).
            optimizer: what trains the rows; None: the default.
            device: where the rows lie; None: the group's.
            placement: who holds which row; None: `Modulo`.
            replicated_rows: the first so many ids, which are the most popular, have a copy on every worker
                (`replication.py`).
            exchange_dtype: float32, or bfloat16 to send rows and row gradients at half the size. Both are rounded
                then; sums, rows and optimizer state stay float32.
        """
        check_size(num_rows, dim)
        if exchange_dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"item table: exchange_dtype {exchange_dtype} must be float32 or bfloat16")
        self.exchange_dtype = exchange_dtype
        self.num_rows, self.dim, self.group, self.counters = num_rows, dim, group, TableCounters()
        self.placement = placement or Modulo(num_rows, group.size)
        device = group.device if device is None else torch.device(device)
        ids = self.placement.owned(group.rank)
        self.store = RowStore(ids, dim, seed=seed, std=std, optimizer=optimizer, device=device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._bounds_W1 = torch.arange(group.size + 1, device=device) * self.placement.capacity
        self._first_hot_key = group.size * self.placement.capacity
        self._on_their_way: list[tuple[Tensor, Exchange]] = []
        self._announced: deque[_Announced] = deque()
        self._hot = HotRows(min(replicated_rows, num_rows), self.store, self.placement, group)

    def fetch(self, *ids: Tensor) -> Fetched:
        """See `ItemTable.fetch`."""
        self._hot.refresh()
        if self._announced and self._announced[0].is_of(ids):
            coming = self._announced.popleft()
        else:
            coming = _Announced(self, ids)
        route = coming.route()
        rows_UD = self._exchange(self.store.read(route.slots), route.receive, route.send)
        for announced in self._announced:
            announced.ask()
        if len(route.hot_ids):
            rows_UD = torch.cat([rows_UD, self._hot.rows(route.hot_ids)])
        parts = route.inverse.split([some.numel() for some in ids])
        slots = tuple(part.view(some.shape) for part, some in zip(parts, ids, strict=True))
        return Fetched(rows_UD, slots, lambda found: self._send_back(route, found))

    def _send_back(self, route: "_Route", found: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add up the gradients of each distinct row, and send them to its owner."""
        num_cold = sum(route.send)
        grad_UD = self.store.weight_RD.new_zeros((num_cold + len(route.hot_ids), self.dim))
        for slots, grads in found:
            add_by_row(slots, grads, grad_UD)
        exchange = self._start_exchange(grad_UD[:num_cold], route.send, route.receive)
        self._on_their_way.append((route.slots, exchange))
        if len(route.hot_ids):
            self._hot.collect(route.hot_ids, grad_UD[num_cold:])

    def announce(self, *ids: Tensor) -> None:
        """See `ItemTable.announce`."""
        self._announced.append(_Announced(self, ids))

    def forget_announced(self) -> None:
        """See `ItemTable.forget_announced`."""
        self._announced.clear()

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Exchange float32 rows at the width of `exchange_dtype`."""
        return self._received(self._start_exchange(rows, send, receive))

    def _start_exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Exchange:
        started = time.perf_counter()
        exchange = self.group.start_exchange(rows.to(self.exchange_dtype), send, receive)
        outside = sum(send) - send[self.group.rank]
        self.counters.exchanged_bytes += outside * rows.shape[1] * self.exchange_dtype.itemsize
        self.counters.exchange_seconds += time.perf_counter() - started
        return exchange

    def _received(self, exchange: Exchange) -> Tensor:
        started = time.perf_counter()
        rows = exchange.wait().float()
        self.counters.exchange_seconds += time.perf_counter() - started
        return rows

    def _collect_received(self) -> None:
        """Wait for the row gradients that are on their way."""
        for slots, exchange in self._on_their_way:
            self.store.collect(slots, self._received(exchange))
        self._on_their_way.clear()

    def topk(self, interests: Tensor, k: int, *, seen_M2: Tensor | None = None) -> TopK:
        """See `ItemTable.topk`."""
        check_topk(interests, k, self.num_rows, self.dim)
        return sharded_topk(self.store.weight_RD, self.store.ids_R, interests, k, self.group, seen_M2)

    def step(self, learning_rate: float) -> None:
        """See `ItemTable.step`."""
        self._collect_received()
        started = time.perf_counter()
        self._hot.send_gradients()
        self.store.step(learning_rate)
        self._hot.outdated = True
        self.counters.update_seconds += time.perf_counter() - started

    def zero_grad(self) -> None:
        """See `ItemTable.zero_grad`."""
        self._collect_received()
        self.store.zero_grad()
        self._hot.zero_grad()

    def state(self) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ItemTable.state`."""
        return self.store.ids_R, self.store.tensors()

    def assign(self, ids_R: Tensor, tensors: dict[str, Tensor]) -> None:
        """See `ItemTable.assign`; each worker keeps what it owns and no exchange takes place."""
        check_ids(ids_R, self.num_rows)
        ids_R = ids_R.to(self.store.ids_R.device)
        owned = self.placement.owner(ids_R) == self.group.rank
        here = {name: values[owned.to(values.device)] for name, values in tensors.items()}
        self.store.assign(self.placement.slot(ids_R[owned]), here)
        self._hot.outdated = True


@dataclass(frozen=True)
class _Route:
    """One lookup of this worker.

    Args:
        slots: int64, rows held here that the workers want, in rank order.
        inverse: int64 `[N]`, place of each id of the lookup among its distinct rows.
        hot_ids: int64, replicated rows of the lookup; they stand behind the exchanged ones.
        send: distinct rows wanted of each worker.
        receive: rows that each worker wants from here.
    """

    slots: Tensor
    inverse: Tensor
    hot_ids: Tensor
    send: list[int]
    receive: list[int]


class _Announced:
    """A lookup of which the owners are being told: how many rows they are asked for, then which."""

    def __init__(self, table: ShardedItemTable, ids: Sequence[Tensor]) -> None:
        self.table, self.ids = table, ids
        flat = torch.cat([i.reshape(-1) for i in ids])
        check_ids(flat, table.num_rows)
        keys = table.placement.key(flat)
        if table._hot.num_rows:
            keys = torch.where(flat < table._hot.num_rows, table._first_hot_key + flat, keys)
        # Keys sort by owner, so each worker's part is one run; the replicated rows come last.
        keys_U, self.inverse = torch.unique(keys, return_inverse=True)
        counts_W = torch.searchsorted(keys_U, table._bounds_W1).diff()
        self.send: list[int] = counts_W.tolist()
        cold, hot = keys_U.tensor_split([sum(self.send)])
        self.wanted, self.hot_ids = cold.remainder(table.placement.capacity), hot - table._first_hot_key
        self.receive: list[int] = []
        one_each = [1] * table.group.size
        self.counts = table.group.start_exchange(counts_W, one_each, one_each)
        self.slots: Exchange | None = None
        table.counters.ids += len(flat)
        table.counters.unique_ids += len(keys_U)
        table.counters.exchanged_bytes += 8 * (sum(self.send) - self.send[table.group.rank])

    def is_of(self, ids: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that were announced."""
        same = (
            a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(ids, self.ids, strict=True)
        )
        return len(ids) == len(self.ids) and all(same)

    def ask(self) -> None:
        """Send the slots when the counts are known."""
        if self.slots is None:
            started = time.perf_counter()
            self.receive = self.counts.wait().tolist()
            self.slots = self.table.group.start_exchange(self.wanted, self.send, self.receive)
            self.table.counters.exchange_seconds += time.perf_counter() - started

    def route(self) -> _Route:
        """Wait for what the others ask for."""
        self.ask()
        assert self.slots is not None
        started = time.perf_counter()
        slots = self.slots.wait()
        self.table.counters.exchange_seconds += time.perf_counter() - started
        return _Route(slots, self.inverse, self.hot_ids, self.send, self.receive)
