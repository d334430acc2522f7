"""The item table: rows of item vectors that a model reads, trained by an optimizer of their own.

`ItemTable` is the interface, `LocalItemTable` holds every row in this process, `sharded.ShardedItemTable` spreads
the rows over workers. Both start from the same numbers (a row's first value depends on seed and row alone) and a
model cannot tell them apart.

Shapes:  V rows (id 0 is padding: always zero, never trained), D width.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distributed_mi.core.errors import InputError
from distributed_mi.embeddings.catalogue_loss import InterestChoice, full_catalogue_loss
from distributed_mi.embeddings.counters import TableCounters
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.optimizer import TableOptimizer
from distributed_mi.embeddings.storage import RowStore, check_ids, gather_rows
from distributed_mi.embeddings.topk import TopK, check_topk, local_topk


class Fetched(NamedTuple):
    """What `ItemTable.fetch` gives.

    Args:
        source_UD: float32, rows without a graph; maybe the table itself, so not to be written to, nor to be read after
            the table's next step.
        slots: where in the source the row of each id stands, a tensor like each id tensor.
        give_back: takes (slots, gradients `[n, D]`) pairs, once at most; slots may repeat, over all pairs. Collective
            like `fetch`. Without it there are no gradients.
    """

    source_UD: Tensor
    slots: tuple[Tensor, ...]
    give_back: Callable[[Sequence[tuple[Tensor, Tensor]]], None]

    def rows(self) -> tuple[Tensor, ...]:
        """Rows of each id tensor, of its shape plus `[D]`, copied."""
        return tuple(gather_rows(self.source_UD, slots) for slots in self.slots)


class ItemTable(ABC):
    """Rows of a `[V, D]` float32 table.

    In a group of workers every method is collective: all call it, in the same order.
    """

    num_rows: int
    """V, padding included."""
    dim: int
    """D."""
    store: RowStore
    """Rows held here."""
    group: WorkerGroup
    """Who holds the others."""
    _anchor: Tensor
    """Gives the rows a gradient function although the table is no parameter of any module."""
    counters: TableCounters
    """Of this worker; see `take_counters`."""

    @abstractmethod
    def fetch(self, *ids: Tensor) -> Fetched:
        """Rows of several id tensors in one exchange.

        Args:
            ids: int64 tensors of any shapes with values in [0, V).

        Returns:
            The rows, zeros for padding (0), and who takes their gradients; those of padding are ignored.

        Raises:
            InputError: an id outside [0, V); the id is named.
        """

    def lookup(self, *ids: Tensor) -> list[Tensor]:
        """Rows of each id tensor, `fetch` under autograd; see there.

        Returns:
            For each id tensor a float32 tensor of its shape plus `[D]`.
        """
        return list(_Rows.apply(self._anchor, self, *ids))

    @abstractmethod
    def announce(self, *ids: Tensor) -> None:
        """Say which lookup will come, so that what it needs of other workers can be asked for meanwhile.

        It changes nothing but the time. Lookups that were announced come in the order in which they were; others may
        come between them. The tensors must stay as they are until then.

        Args:
            ids: the same tensors that `lookup` will get.

        Raises:
            InputError: an id outside [0, V); the id is named.
        """

    @abstractmethod
    def forget_announced(self) -> None:
        """No announced lookup will come any more."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of one id tensor; see `lookup`."""
        return self.lookup(ids)[0]

    def logits(self, queries_BD: Tensor, candidate_ids_N: Tensor) -> Tensor:
        """Inner products `[B, N]` of queries with the rows of shared candidates."""
        return queries_BD @ self.rows(candidate_ids_N).T

    def full_catalogue_loss(
        self,
        interests_BKD: Tensor,
        target_ids_B: Tensor,
        *,
        choice: InterestChoice = "argmax",
        power: float = 1.0,
        target_rows_BD: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of each user's target among all items, with exact gradients of interests and of all rows.

        Never holds more scores than a tile; `catalogue_loss` has the formulas. `step` then updates every row.

        Args:
            interests_BKD: of this worker's users; workers may have different B, also 0.
            target_ids_B: int64 in [1, V).
            choice: which interest scores an item: `argmax` (what serving ranks by), `label_aware`, or `target`.
            power: p of `label_aware`: how sharply its attention prefers the interest nearest an item.
            target_rows_BD: rows of the targets where they are at hand, from this table, which spares an exchange.

        Returns:
            `[B]` float32, not averaged.

        Raises:
            InputError: a target that is padding or outside the table, an unknown choice, interests of another width.
        """
        if bool((target_ids_B == 0).any()):
            place = int((target_ids_B == 0).nonzero()[0])
            raise InputError(f"full softmax: the target of user {place} is padding (0)")
        if target_rows_BD is None:
            target_rows_BD = self.rows(target_ids_B)
        return full_catalogue_loss(
            interests_BKD,
            target_rows_BD,
            store=self.store,
            group=self.group,
            anchor=self._anchor,
            choice=choice,
            power=power,
        )

    @abstractmethod
    def topk(self, interests: Tensor, k: int, *, seen_M2: Tensor | None = None) -> TopK:
        """Exact top-k of the whole catalogue for this worker's users, by the largest inner product over K interests.

        The result does not depend, in any bit, on how many users are asked for at once, on the workers, or on who
        holds which row; see `embeddings.topk`.

        Args:
            interests: float32 `[B, K, D]`, or `[B, D]` for users with one interest; workers may have different B, also
                0.
            k: at most V - 1.
            seen_M2: int64 `[M, 2]` pairs (place in B, id) to leave out; None: nothing is left out.

        Returns:
            Scores, ids and interests `[B, k]`; padding is never returned; ties go to the smaller id.

        Raises:
            InputError: k or the shape of the interests is wrong.
        """

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """Apply the gradients collected since the last step to the rows they touch, then forget them."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the collected gradients."""

    def take_counters(self) -> TableCounters:
        """What lookups and steps have cost here since the last call. Not collective."""
        counters, self.counters = self.counters, TableCounters()
        return counters

    @abstractmethod
    def state(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What this worker holds.

        Returns:
            Ids of its rows `[R]` int64, and name -> tensor whose first axis is those rows (`weight`, and the
            optimizer's state). The tensors are views, not copies.
        """

    @abstractmethod
    def assign(self, ids_R: Tensor, tensors: dict[str, Tensor]) -> None:
        """Overwrite the rows in `ids_R` that this worker owns from tensors as `state` gives; skip the others."""


class LocalItemTable(ItemTable):
    """The whole table in this process. The reference that `ShardedItemTable` must equal."""

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        seed: int = 0,
        std: float | None = None,
        optimizer: TableOptimizer | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the table; see `RowStore` for the arguments."""
        check_size(num_rows, dim)
        self.num_rows, self.dim, self.counters = num_rows, dim, TableCounters()
        ids = torch.arange(num_rows, dtype=torch.int64)
        self.store = RowStore(ids, dim, seed=seed, std=std, optimizer=optimizer, device=device)
        self.group = WorkerGroup.alone(device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def fetch(self, *ids: Tensor) -> Fetched:
        """See `ItemTable.fetch`."""
        for some in ids:
            check_ids(some, self.num_rows)
        num_ids = sum(some.numel() for some in ids)

        def give_back(found: Sequence[tuple[Tensor, Tensor]]) -> None:
            self.counters.ids += num_ids
            if found:
                slots, grads = zip(*found, strict=True)
                self.store.collect(torch.cat(slots), *grads)

        return Fetched(self.store.weight_RD, ids, give_back)

    def announce(self, *ids: Tensor) -> None:
        """See `ItemTable.announce`; there is nobody to ask."""

    def forget_announced(self) -> None:
        """See `ItemTable.forget_announced`."""

    def topk(self, interests: Tensor, k: int, *, seen_M2: Tensor | None = None) -> TopK:
        """See `ItemTable.topk`."""
        check_topk(interests, k, self.num_rows, self.dim)
        return local_topk(self.store.weight_RD, self.store.ids_R, interests, k, seen_M2)

    def step(self, learning_rate: float) -> None:
        """See `ItemTable.step`."""
        started = time.perf_counter()
        self.store.step(learning_rate)
        self.counters.unique_ids += self.store.num_touched
        self.counters.update_seconds += time.perf_counter() - started

    def zero_grad(self) -> None:
        """See `ItemTable.zero_grad`."""
        self.store.zero_grad()

    def state(self) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ItemTable.state`."""
        return self.store.ids_R, self.store.tensors()

    def assign(self, ids_R: Tensor, tensors: dict[str, Tensor]) -> None:
        """See `ItemTable.assign`."""
        check_ids(ids_R, self.num_rows)
        self.store.assign(ids_R, tensors)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: ItemTable, *ids: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        fetched = table.fetch(*ids)
        ctx.give_back, ctx.slots = fetched.give_back, fetched.slots
        return fetched.rows()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        pairs = ((slots, grad) for slots, grad in zip(ctx.slots, grads, strict=True) if grad is not None)
        ctx.give_back([(slots.reshape(-1), grad.reshape(-1, grad.shape[-1])) for slots, grad in pairs])
        return None, None, *(None for _ in grads)


def check_size(num_rows: int, dim: int) -> None:
    """Refuse a table without items or without width.

    Raises:
        InputError: fewer than two rows or a width below one.
    """
    if num_rows < 2 or dim < 1:
        raise InputError(
            f"item table of {num_rows} rows by {dim}: needs padding, at least one item, and a width"
        )
