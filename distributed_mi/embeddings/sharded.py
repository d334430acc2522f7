"""An item table whose rows are spread over the workers of a group.

A lookup is three exchanges: how many rows of each worker are wanted, which, and the rows. Ids are de-duplicated
first, over all id tensors of the call, so a popular item and the padding travel once per worker and step. Backward
sends the summed row gradients back the same way, and the owner adds what it gets from all workers: the gradient of
the step is the sum of the workers' partial losses (`LossTerms.total`).

Shapes:  V rows, D width, W workers, U distinct ids of this worker's lookup.
"""

from typing import Any

import torch
from torch import Tensor

from distributed_mi.embeddings.counters import TableCounters
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.optimizer import TableOptimizer
from distributed_mi.embeddings.placement import Modulo, Placement
from distributed_mi.embeddings.storage import RowStore, check_ids
from distributed_mi.embeddings.table import ItemTable, check_size, split_rows
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
        """
        check_size(num_rows, dim)
        self.num_rows, self.dim, self.group, self.counters = num_rows, dim, group, TableCounters()
        self.placement = placement or Modulo(num_rows, group.size)
        device = group.device if device is None else torch.device(device)
        ids = self.placement.owned(group.rank)
        self.store = RowStore(ids, dim, seed=seed, std=std, optimizer=optimizer, device=device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._bounds_W1 = torch.arange(group.size + 1, device=device) * self.placement.capacity

    def lookup(self, *ids: Tensor) -> list[Tensor]:
        """See `ItemTable.lookup`."""
        flat = torch.cat([i.reshape(-1) for i in ids])
        check_ids(flat, self.num_rows)
        keys_U, inverse = torch.unique(self.placement.key(flat), return_inverse=True)
        # Keys sort by owner, so each worker's part is one run.
        send = torch.searchsorted(keys_U, self._bounds_W1).diff().tolist()
        slots, receive = self.group.all_to_all_rows(keys_U.remainder(self.placement.capacity), send)
        rows_UD = _ExchangedRows.apply(self._anchor, slots, self, send, receive)
        return split_rows(rows_UD.index_select(0, inverse), ids)

    def topk(self, interests: Tensor, k: int, *, seen_M2: Tensor | None = None) -> TopK:
        """See `ItemTable.topk`."""
        check_topk(interests, k, self.num_rows, self.dim)
        return sharded_topk(self.store.weight_RD, self.store.ids_R, interests, k, self.group, seen_M2)

    def step(self, learning_rate: float) -> None:
        """See `ItemTable.step`; needs no exchange, the gradients are here already."""
        self.store.step(learning_rate)

    def zero_grad(self) -> None:
        """See `ItemTable.zero_grad`."""
        self.store.zero_grad()

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


class _ExchangedRows(torch.autograd.Function):
    """Rows that others asked for go out, rows that were asked for come in; backward the other way."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        slots: Tensor,
        table: ShardedItemTable,
        send: list[int],
        receive: list[int],
    ) -> Tensor:
        ctx.table, ctx.send, ctx.receive = table, send, receive
        ctx.save_for_backward(slots)
        rows = table.store.weight_RD.index_select(0, slots)
        return table.group.exchange_rows(rows, receive, send)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None, None]:
        (slots,) = ctx.saved_tensors
        table = ctx.table
        table.store.collect(slots, table.group.exchange_rows(grads[0], ctx.send, ctx.receive))
        return None, None, None, None, None
