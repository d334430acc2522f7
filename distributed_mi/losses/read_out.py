"""Which of a user's interests a target is compared with.

Shapes:  B users, K interests, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ReadOut = Callable[[Tensor, Tensor], Tensor]
"""`(interests_BKD, target_rows_BD) -> [B, D]`."""


def hard_read_out(interests_BKD: Tensor, target_rows_BD: Tensor) -> Tensor:
    """The interest with the largest inner product with the target, `[B, D]`.

    The choice is not differentiated: the other K - 1 interests get no gradient from this user. Ties go to the
    first.
    """
    scores_BK = (interests_BKD.detach() @ target_rows_BD.detach()[:, :, None]).squeeze(2)
    query_BD: Tensor = _Pick.apply(interests_BKD, scores_BK.argmax(dim=1))
    return query_BD


class _Pick(torch.autograd.Function):
    """One of each user's interests. Advanced indexing would add up its gradient as if a place could repeat."""

    @staticmethod
    def forward(ctx: Any, interests_BKD: Tensor, best_B: Tensor) -> Tensor:
        user_B = torch.arange(len(best_B), device=best_B.device)
        ctx.shape, ctx.place = interests_BKD.shape, (user_B, best_B)
        return interests_BKD[ctx.place]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
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
