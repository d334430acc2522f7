"""Row gradients of a step: which rows they belong to, and their sums.

Shapes:  N gradients, U distinct rows, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.cpu import is_plain

_COUNTED = 16
"""Rows of a table per gradient up to which a look at every row is faster than sorting."""


@dataclass(frozen=True)
class RowGradients:
    """Gradients of some rows; several may belong to one row and add up.

    Args:
        slots_N: int64, the row of each gradient.
        grads_ND: float32.
        num_rows: of the store that the slots belong to.
        holds_padding: whether slot 0 is padding, which is left out.
    """

    slots_N: Tensor
    grads_ND: Tensor
    num_rows: int
    holds_padding: bool

    @classmethod
    def of(
        cls, pending: list[tuple[Tensor, Tensor]], *, num_rows: int, holds_padding: bool
    ) -> "RowGradients":
        """From (slots, gradients) pairs of one or more lookups; slots may repeat."""
        if len(pending) == 1:
            return cls(*pending[0], num_rows, holds_padding)
        slots, grads = (torch.cat(parts) for parts in zip(*pending, strict=True))
        return cls(slots, grads, num_rows, holds_padding)

    @property
    def compiled(self) -> bool:
        """Whether the kernels of `kernels.py` can take it."""
        return is_plain(self.grads_ND)

    def summed(self) -> tuple[Tensor, Tensor]:
        """Distinct slots without padding, ascending, and the sum of each one's gradients `[U, D]`."""
        slots_U, inverse_N = torch.unique(self.slots_N, return_inverse=True)
        first = int(self.holds_padding and len(slots_U) > 0 and int(slots_U[0]) == 0)
        totals_UD = self.grads_ND.new_zeros((len(slots_U), self.grads_ND.shape[1]))
        add_by_row(inverse_N, self.grads_ND, totals_UD)
        return slots_U[first:], totals_UD[first:]

    def grouped(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """`slots_U` (without padding, ascending), `starts_P`, `order_N`, `grads_ND` as the kernels take them."""
        from distributed_mi.embeddings import kernels

        grads_ND, first = self.grads_ND.numpy(), int(self.holds_padding)
        if self.num_rows <= _COUNTED * len(self.slots_N):
            return *kernels.group_by_counting(self.slots_N.numpy(), self.num_rows, first), grads_ND
        slots_U, inverse_N = torch.unique(self.slots_N, return_inverse=True)
        starts_P, order_N = kernels.group_by_row(inverse_N.numpy(), len(slots_U))
        first = int(self.holds_padding and len(slots_U) > 0 and int(slots_U[0]) == 0)
        return slots_U.numpy()[first:], starts_P[first:], order_N, grads_ND


def add_by_row(inverse_N: Tensor, grads_ND: Tensor, out_UD: Tensor) -> None:
    """`out[inverse[n]] += grads[n]`; on a CPU in the order of n."""
    if not (is_plain(grads_ND) and is_plain(out_UD)):
        out_UD.index_add_(0, inverse_N, grads_ND)
        return
    from distributed_mi.embeddings import kernels

    kernels.add_by_row(inverse_N.numpy(), grads_ND.numpy(), out_UD.numpy())
