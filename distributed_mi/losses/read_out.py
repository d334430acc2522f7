"""Which of a user's interests a target is compared with.

Shapes:  B users, K interests, D width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.cpu import is_plain

ReadOut = Callable[[Tensor, Tensor], Tensor]
"""`(interests_BKD, target_rows_BD) -> [B, D]`."""


def hard_read_out(interests_BKD: Tensor, target_rows_BD: Tensor) -> Tensor:
    """The interest with the largest inner product with the target, `[B, D]`.

    The choice is not differentiated: the other K - 1 interests get no gradient from this user. Ties go to the
    first.
    """
    query_BD: Tensor = _HardReadOut.apply(interests_BKD, target_rows_BD.detach())
    return query_BD


class _HardReadOut(torch.autograd.Function):
    """Its gradient is written out: advanced indexing would add it up as if a place could repeat."""

    @staticmethod
    def forward(ctx: Any, interests_BKD: Tensor, target_BD: Tensor) -> Tensor:
        ctx.shape = interests_BKD.shape
        if is_plain(interests_BKD) and is_plain(target_BD):
            from distributed_mi.losses import kernels

            query_BD = torch.empty_like(target_BD)
            ctx.best, ctx.place = np.empty(len(target_BD), np.int64), None
            kernels.pick_closest(interests_BKD.numpy(), target_BD.numpy(), ctx.best, query_BD.numpy())
            return query_BD
        users_B = torch.arange(len(interests_BKD), device=interests_BKD.device)
        best_B = (interests_BKD @ target_BD[:, :, None]).squeeze(2).argmax(dim=1)
        ctx.place = (users_B, best_B)
        return interests_BKD[ctx.place]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.place is None:
            from distributed_mi.losses import kernels

            grad_BKD = grads[0].new_empty(ctx.shape)
            kernels.put_back(grads[0].contiguous().numpy(), ctx.best, grad_BKD.numpy())
        else:
            grad_BKD = grads[0].new_zeros(ctx.shape)
            grad_BKD[ctx.place] = grads[0]
        return grad_BKD, None


def soft_read_out(
    query_BD: Tensor, values_BMD: Tensor, mask_BM: Tensor | None = None, *, scale: bool = True
) -> Tensor:
    """Target-aware attention (EIMF, equations 6 and 8): `softmax_m(q . v_m / sqrt(D))`-weighted sum, `[B, D]`.

    Args:
        query_BD: the target.
        values_BMD: keys and values.
        mask_BM: True on real values, at least one per user; None: all are.
        scale: divide by sqrt(D).
    """
    scores_BM = (values_BMD @ query_BD[:, :, None]).squeeze(2)
    if scale:
        scores_BM = scores_BM / query_BD.shape[1] ** 0.5
    if mask_BM is not None:
        scores_BM = scores_BM.masked_fill(~mask_BM, float("-inf"))
    return (torch.softmax(scores_BM, dim=1)[:, None, :] @ values_BMD).squeeze(1)
