"""Row gradients of a step: which rows they belong to, and their sums.

Shapes:  N gradients, U distinct rows, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RowGradients:
    """Gradients of some rows; several may belong to one row and add up.

    Args:
        slots_U: int64, distinct slots, ascending.
        inverse_N: int64, place in `slots_U` of each gradient's row.
        grads_ND: float32.
        first: 1 to leave out `slots_U[0]`, which is padding; else 0.
    """

    slots_U: Tensor
    inverse_N: Tensor
    grads_ND: Tensor
    first: int

    @classmethod
    def of(cls, pending: list[tuple[Tensor, Tensor]], *, holds_padding: bool) -> "RowGradients":
        """From (slots, gradients) pairs of one or more lookups; slots may repeat."""
        slots = torch.cat([s for s, _ in pending]) if len(pending) > 1 else pending[0][0]
        grads = torch.cat([g for _, g in pending]) if len(pending) > 1 else pending[0][1]
        slots_U, inverse_N = torch.unique(slots, return_inverse=True)
        padded = holds_padding and slots_U.numel() > 0 and int(slots_U[0]) == 0
        return cls(slots_U, inverse_N, grads, int(padded))

    @property
    def compiled(self) -> bool:
        """Whether the kernels of `kernels.py` can take it."""
        return is_plain(self.grads_ND)

    def summed(self) -> tuple[Tensor, Tensor]:
        """Distinct slots without padding, and the sum of each one's gradients `[U, D]`."""
        totals = sum_by_row(self.inverse_N, self.grads_ND, len(self.slots_U))
        return self.slots_U[self.first :], totals[self.first :]

    def grouped(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """`slots_U`, `starts_P`, `order_N`, `grads_ND`, `first` as the kernels take them."""
        from distributed_mi.embeddings import kernels

        starts_P, order_N = kernels.group_by_row(self.inverse_N.numpy(), len(self.slots_U))
        return self.slots_U.numpy(), starts_P, order_N, self.grads_ND.numpy(), self.first


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a float32 matrix that a compiled kernel can read where it lies."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()


def sum_by_row(inverse_N: Tensor, grads_ND: Tensor, num_rows: int) -> Tensor:
    """`out[inverse[n]] += grads[n]`, `[num_rows, D]`; on a CPU in the order of n."""
    out_UD = grads_ND.new_zeros((num_rows, grads_ND.shape[1]))
    if not is_plain(grads_ND):
        return out_UD.index_add_(0, inverse_N, grads_ND)
    from distributed_mi.embeddings import kernels

    kernels.sum_by_row(inverse_N.numpy(), grads_ND.numpy(), out_UD.numpy())
    return out_UD
