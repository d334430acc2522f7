"""Row gradients of a step: which rows they belong to, and their sums.

Shapes:  N gradients, U distinct rows, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.cpu import is_plain

_COUNTED = 16
"""Rows of a table per gradient up to which a look at every row is faster than sorting."""


PARTS = 3
"""Matrices of gradients that kernels take: histories, targets and negatives of a step."""


@dataclass(frozen=True)
class RowGradients:
    """Gradients of some rows; several may belong to one row and add up.

    Args:
        slots_N: int64, the row of each gradient.
        parts: float32 `[N_i, D]`, one below the other `[N, D]`.
        num_rows: of the store that the slots belong to.
        holds_padding: whether slot 0 is padding, which is left out.
    """

    slots_N: Tensor
    parts: list[Tensor]
    num_rows: int
    holds_padding: bool

    @classmethod
    def of(
        cls, pending: Sequence[tuple[Tensor, Sequence[Tensor]]], *, num_rows: int, holds_padding: bool
    ) -> "RowGradients":
        """From what `RowStore.collect` got, in one or more calls."""
        slots_N = pending[0][0] if len(pending) == 1 else torch.cat([slots for slots, _ in pending])
        parts = [grad.contiguous() for _, grads in pending for grad in grads]
        return cls(slots_N, parts, num_rows, holds_padding)

    @property
    def compiled(self) -> bool:
        """Whether the kernels of `kernels.py` can take it."""
        return all(is_plain(grads) for grads in self.parts)

    def summed(self) -> tuple[Tensor, Tensor]:
        """Distinct slots without padding, ascending, and the sum of each one's gradients `[U, D]`."""
        slots_U, inverse_N = torch.unique(self.slots_N, return_inverse=True)
        first = int(self.holds_padding and len(slots_U) > 0 and int(slots_U[0]) == 0)
        totals_UD = self.parts[0].new_zeros((len(slots_U), self.parts[0].shape[1]))
        add_by_row(inverse_N, torch.cat(self.parts), totals_UD)
        return slots_U[first:], totals_UD[first:]

    def grouped(self) -> "Grouped":
        """The same for the kernels."""
        from distributed_mi.embeddings import kernels

        parts = self.parts if len(self.parts) <= PARTS else [torch.cat(self.parts)]
        arrays = [grads.numpy() for grads in parts]
        arrays += [arrays[0][:0]] * (PARTS - len(arrays))
        if self.num_rows <= _COUNTED * len(self.slots_N):
            first = int(self.holds_padding)
            places = kernels.group_by_counting(self.slots_N.numpy(), self.num_rows, first)
            return Grouped(places[0], places[1], places[2], tuple(arrays))
        slots_U, inverse_N = torch.unique(self.slots_N, return_inverse=True)
        starts_P, order_N = kernels.group_by_row(inverse_N.numpy(), len(slots_U))
        first = int(self.holds_padding and len(slots_U) > 0 and int(slots_U[0]) == 0)
        return Grouped(slots_U.numpy()[first:], starts_P[first:], order_N, tuple(arrays))


class Grouped(NamedTuple):
    """Row gradients as the kernels take them.

    Args:
        slots_U: distinct slots without padding, ascending.
        starts_P: `[U + 1]`, where each one's gradients begin in `order_N`.
        order_N: places of gradients in `parts`.
        parts: `PARTS` matrices, one below the other.
    """

    slots_U: np.ndarray
    starts_P: np.ndarray
    order_N: np.ndarray
    parts: tuple[np.ndarray, ...]

    def of_rows(self, rows: slice) -> "Grouped":
        """The part of some of the distinct slots."""
        return self._replace(slots_U=self.slots_U[rows], starts_P=self.starts_P[rows.start : rows.stop + 1])


def add_by_row(inverse_N: Tensor, grads_ND: Tensor, out_UD: Tensor) -> None:
    """`out[inverse[n]] += grads[n]`; on a CPU in the order of n."""
    if not (is_plain(grads_ND) and is_plain(out_UD)):
        out_UD.index_add_(0, inverse_N, grads_ND)
        return
    from distributed_mi.embeddings import kernels

    kernels.add_by_row(inverse_N.numpy(), grads_ND.numpy(), out_UD.numpy())
