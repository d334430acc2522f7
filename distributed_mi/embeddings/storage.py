"""The rows that one worker holds: values, optimizer state, collected gradients.

`LocalItemTable` and `ShardedItemTable` both stand on this; they differ in who holds a row and how it travels.

Shapes:  R rows held here, D width, U distinct rows.
"""

import math

import torch
from torch import Tensor

from distributed_mi.core.errors import CheckpointError, InputError
from distributed_mi.embeddings.initial import normal_rows
from distributed_mi.embeddings.optimizer import TableOptimizer, make_optimizer


class RowStore:
    """Rows of an item table in slot order. Padding (id 0), where held, is zero and stays zero."""

    def __init__(
        self,
        ids_R: Tensor,
        dim: int,
        *,
        seed: int,
        std: float | None,
        optimizer: TableOptimizer | None,
        device: torch.device | str,
    ) -> None:
        """Make the rows.

        Args:
            ids_R: ids held here, ascending; slot s holds `ids_R[s]`.
            dim: D.
            seed: seed of the first values.
            std: standard deviation of the first values; None: sqrt(2 / D), Kaiming's as in REMI's code.
            optimizer: what trains the rows; None: the default of `TableOptimizerConfig`.
            device: where the rows lie.
        """
        std = math.sqrt(2.0 / dim) if std is None else std
        self.dim = dim
        self.ids_R = ids_R.to(device)
        self.weight_RD = torch.from_numpy(normal_rows(ids_R.numpy(), dim, seed=seed, std=std)).to(device)
        self.optimizer = optimizer or make_optimizer()
        self.state = self.optimizer.init_state(self.weight_RD)
        self.holds_padding = len(ids_R) > 0 and int(ids_R[0]) == 0
        self._pending: list[tuple[Tensor, Tensor]] = []

    def collect(self, slots: Tensor, grads: Tensor) -> None:
        """Remember row gradients until `step`; slots may repeat, their gradients add up."""
        self._pending.append((slots, grads))

    def zero_grad(self) -> None:
        """Forget the collected gradients."""
        self._pending.clear()

    def step(self, lr: float) -> None:
        """Apply the collected gradients and forget them."""
        pending, self._pending = self._pending, []
        if pending:
            slots_U, grad_UD = self._sum_by_slot(pending)
        elif self.optimizer.touches_all_rows:
            slots_U, grad_UD = self.ids_R[:0], self.weight_RD[:0]
        else:
            return
        if self.optimizer.touches_all_rows:
            grad_UD = torch.zeros_like(self.weight_RD).index_add_(0, slots_U, grad_UD)
            slots_U = torch.arange(len(self.ids_R), device=self.ids_R.device)
            if self.holds_padding:
                slots_U, grad_UD = slots_U[1:], grad_UD[1:]
        if slots_U.numel():
            self.optimizer.update(self.weight_RD, self.state, slots_U, grad_UD, lr)

    def _sum_by_slot(self, pending: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Distinct touched slots, ascending, without padding, and the sum of each one's gradients."""
        slots = torch.cat([s for s, _ in pending]) if len(pending) > 1 else pending[0][0]
        grads = torch.cat([g for _, g in pending]) if len(pending) > 1 else pending[0][1]
        slots_U, inverse = torch.unique(slots, return_inverse=True)
        grad_UD = grads.new_zeros((len(slots_U), self.dim)).index_add_(0, inverse, grads)
        first = 1 if self.holds_padding and slots_U.numel() and int(slots_U[0]) == 0 else 0
        return slots_U[first:], grad_UD[first:]

    def tensors(self) -> dict[str, Tensor]:
        """`weight` and the optimizer's state; not copies."""
        return {"weight": self.weight_RD, **self.state}

    def assign(self, slots: Tensor, tensors: dict[str, Tensor]) -> None:
        """Overwrite rows.

        Raises:
            CheckpointError: a tensor that this store does not have (another optimizer wrote it) or of another
            shape.
        """
        own = self.tensors()
        for name, values in tensors.items():
            if name not in own:
                raise CheckpointError(
                    f"item table: cannot load {name!r}; this table holds {', '.join(sorted(own))}"
                )
            if values.shape[1:] != own[name].shape[1:]:
                raise CheckpointError(
                    f"item table: {name!r} has rows of shape {tuple(values.shape[1:])}, "
                    f"this table has {tuple(own[name].shape[1:])}"
                )
            own[name][slots] = values.to(own[name].device, own[name].dtype)
        if self.holds_padding:
            self.weight_RD[0] = 0.0


def check_ids(flat: Tensor, num_rows: int) -> None:
    """Refuse ids outside of the table.

    Raises:
        InputError: names the first such id.
    """
    if flat.numel() == 0:
        return
    low, high = torch.aminmax(flat)
    if int(low) < 0 or int(high) >= num_rows:
        wrong = flat[(flat < 0) | (flat >= num_rows)][0]
        raise InputError(f"item table: id {int(wrong)} is outside [0, {num_rows})")
