"""Copies of the most popular rows on every worker, with exact gradients.

The owner of a row alone trains it. Its copies are read without an exchange; their gradients are added up over the
workers at the step and given to the owner, and the changed rows go back to all before the next lookup. So the numbers
are those of a table without copies.

De-duplication makes a popular row travel once per worker and step already, so copies save no bytes for rows that every
worker touches at every step: they replace an exchange of uneven parts by two collectives of fixed size, which overlap
with nothing here. They pay where the exchange is bound by its slowest pair of workers (`benchmarks/bench_embedding.py`
measures it). Rows that few workers touch cost more as copies.

Shapes:  H replicated rows (ids 0 .. H - 1), D width.
"""

import torch
from torch import Tensor

from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.placement import Placement
from distributed_mi.embeddings.storage import RowStore


class HotRows:
    """The copies on one worker. All methods but `rows`, `collect` and `zero_grad` are collective."""

    def __init__(self, num_rows: int, store: RowStore, placement: Placement, group: WorkerGroup) -> None:
        self.num_rows, self.store, self.group = num_rows, store, group
        self.outdated = True
        device = store.weight_RD.device
        ids_H = torch.arange(num_rows, device=device)
        owner_H = placement.owner(ids_H)
        self._mine = ids_H[owner_H == group.rank]
        self._my_slots = placement.slot(self._mine)
        # Row h stands at this place in what an all-gather of every worker's own part gives.
        self._place_H = torch.argsort(torch.argsort(owner_H, stable=True), stable=True)
        self._rows_HD = store.weight_RD.new_zeros((num_rows, store.dim))
        # The last column counts gradients: a row that nobody touched must not move.
        self._grad_HE = store.weight_RD.new_zeros((num_rows, store.dim + 1))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of replicated ids."""
        return self._rows_HD.index_select(0, ids)

    def collect(self, ids: Tensor, grads: Tensor) -> None:
        """Add gradients of distinct ids."""
        ones = grads.new_ones((len(grads), 1))
        self._grad_HE.index_add_(0, ids, torch.cat([grads, ones], dim=1))

    def zero_grad(self) -> None:
        """Forget the gradients of this worker."""
        self._grad_HE.zero_()

    def send_gradients(self) -> None:
        """Hand the sums over all workers to the rows' owners."""
        if not self.num_rows:
            return
        total_HE = self.group.all_reduce_sum(self._grad_HE).index_select(0, self._mine)
        touched = total_HE[:, -1] > 0
        if bool(touched.any()):
            self.store.collect(self._my_slots[touched], total_HE[touched, :-1].contiguous())
        self.zero_grad()

    def refresh(self) -> None:
        """Fetch the rows from their owners when they may have changed."""
        if self.num_rows and self.outdated:
            mine = self.store.read(self._my_slots)
            parts = torch.cat(self.group.all_gather_rows(mine))
            self._rows_HD = parts.index_select(0, self._place_H)
        self.outdated = False
