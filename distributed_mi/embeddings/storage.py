"""The rows that one worker holds: values, optimizer state, collected gradients.

`LocalItemTable` and `ShardedItemTable` both stand on this; they differ in who holds a row and how it travels.

Shapes:  R rows held here, D width, U distinct rows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_mi.core.cpu import is_plain, map_slices
from distributed_mi.core.errors import CheckpointError, InputError
from distributed_mi.embeddings.gradients import RowGradients
from distributed_mi.embeddings.initial import normal_rows
from distributed_mi.embeddings.optimizer import TableOptimizer, make_optimizer

_COPY = 16
"""Numbers to copy that count as one to work on where threads are decided about: for 254,000 a second one gained 6 %."""

TILE_ROWS = 16_384
"""Rows updated at once when all are."""


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
        self._pending: list[tuple[Tensor, Sequence[Tensor]]] = []
        self._all_RD: Tensor | None = None
        self.num_touched = 0
        """Rows that the last step changed."""

    def read(self, slots_N: Tensor) -> Tensor:
        """Copies of rows, `[N, D]`; slots may repeat."""
        return gather_rows(self.weight_RD, slots_N)

    def collect(self, slots: Tensor, *grads: Tensor) -> None:
        """Remember row gradients until `step`.

        Args:
            slots: int64 `[N]`; where they repeat gradients add up.
            grads: float32 `[N_i, D]`, one below the other `[N, D]`.
        """
        self._pending.append((slots, grads))

    def collect_all(self) -> Tensor:
        """A gradient `[R, D]` of every row, to add to in place until `step`; then every row is updated.

        Zero when it is asked for first; padding's row is not read.
        """
        if self._all_RD is None:
            self._all_RD = torch.zeros_like(self.weight_RD)
        return self._all_RD

    @property
    def has_gradient_of_all(self) -> bool:
        """Whether `collect_all` was asked since the last step, so that a buffer of the rows' size is held."""
        return self._all_RD is not None

    def zero_grad(self) -> None:
        """Forget the collected gradients."""
        self._pending.clear()
        self._all_RD = None

    def step(self, lr: float) -> None:
        """Apply the collected gradients and forget them."""
        pending, self._pending = self._pending, []
        if self.optimizer.touches_all_rows or self._all_RD is not None:
            grad_RD = self.collect_all()
            for slots, grads in pending:
                for part, grad in zip(slots.split([len(grad) for grad in grads]), grads, strict=True):
                    grad_RD.index_add_(0, part, grad)
            self._step_all(grad_RD, lr)
            self.num_touched = len(grad_RD)
        elif pending:
            gradients = RowGradients.of(pending, num_rows=len(self.ids_R), holds_padding=self.holds_padding)
            self.num_touched = self.optimizer.apply(self.weight_RD, self.state, gradients, lr)

    def _step_all(self, grad_RD: Tensor, lr: float) -> None:
        """Update every row but padding, a tile at a time: what an optimizer holds beside is a few tiles."""
        self._all_RD = None
        for at in range(1 if self.holds_padding else 0, len(self.ids_R), TILE_ROWS):
            grad_UD = grad_RD[at : at + TILE_ROWS]
            slots_U = torch.arange(at, at + len(grad_UD), device=self.ids_R.device)
            self.optimizer.update(self.weight_RD, self.state, slots_U, grad_UD, lr)

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


def gather_rows(rows_RD: Tensor, slots: Tensor) -> Tensor:
    """Copies of rows, of the slots' shape plus `[D]`; slots may repeat."""
    flat_N, dim = slots.reshape(-1).contiguous(), rows_RD.shape[1]
    if not is_plain(rows_RD):
        return rows_RD.index_select(0, flat_N).view(*slots.shape, dim)
    from distributed_mi.core.vector_math import gather  # compiles

    out = rows_RD.new_empty((*slots.shape, dim))
    source, places, out_ND = rows_RD.numpy(), flat_N.numpy(), out.view(-1, dim).numpy()
    map_slices(lambda n: gather(source, places[n], out_ND[n]), len(places), dim // _COPY)
    return out


def check_ids(ids: Tensor, num_rows: int) -> None:
    """Refuse ids outside of the table.

    Raises:
        InputError: names the first such id.
    """
    if ids.numel() == 0:
        return
    if ids.device.type == "cpu":
        from distributed_mi.embeddings import kernels

        low, high = kernels.extremes(ids.reshape(-1).contiguous().numpy())
    else:
        low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= num_rows:
        wrong = ids[(ids < 0) | (ids >= num_rows)][0]
        raise InputError(f"item table: id {int(wrong)} is outside [0, {num_rows})")
