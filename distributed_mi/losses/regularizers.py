"""REMI's routing regularisation: attention that sits on one item of the history costs.

Xie et al., "Rethinking Multi-Interest Learning for Candidate Matching in Recommender Systems", RecSys 2023.

    C_bk = (1/d) sum_t (A_bkt - mean_t A_bkt)^2          over ALL L positions of the window, padding included
    loss = sum_b sum_k C_bk^2                            summed over users, not averaged

These are the conventions of the public code; lambda = 100 is right only with them, at 128 users a step, d = 64 and
L = 20. For other sizes the same strength is lambda' = lambda (d / 64)^2 (128 / users per step).

Uniform attention over a full history costs 0. A short history of n items costs at least K ((1/n - 1/L) / d)^2.

Shapes:  B users, K interests, L positions, D width.
"""

from typing import Any

import torch
from torch import Tensor

from distributed_mi.core.cpu import is_plain


def routing_penalty(attention_BKL: Tensor, *, dim: int, num_positions: int | None = None) -> Tensor:
    """Penalty of each user, to be summed over the users of the step.

    Args:
        attention_BKL: rows over the history, 0 on padding.
        dim: d, width of an item vector.
        num_positions: L of the equation; None: the length of the tensor. Giving the model's window makes the
            penalty independent of how far this batch was padded.

    Returns:
        `[B]`.
    """
    length = attention_BKL.shape[2] if num_positions is None else num_positions
    penalty_B: Tensor = _RoutingPenalty.apply(attention_BKL, dim, length)
    return penalty_B


class _RoutingPenalty(torch.autograd.Function):
    """With its gradient written out: d C_bk^2 / d A_bkt = 4 C_bk (A_bkt - mean_bk) / d."""

    @staticmethod
    def forward(ctx: Any, attention_BKL: Tensor, dim: int, length: int) -> Tensor:
        ctx.dim = dim
        ctx.compiled = is_plain(attention_BKL)
        if ctx.compiled:
            from distributed_mi.losses import kernels

            penalty_B = attention_BKL.new_empty(len(attention_BKL))
            mean_BK, cost_BK = attention_BKL.new_empty((2, *attention_BKL.shape[:2]))
            out = (penalty_B.numpy(), mean_BK.numpy(), cost_BK.numpy())
            kernels.routing_forward(attention_BKL.numpy(), dim, length, *out)
        else:
            # sum_t (A - mean)^2 over `length` slots, of which those beyond the tensor hold 0.
            mean_BK = attention_BKL.sum(dim=2) / length
            cost_BK = (attention_BKL.square().sum(dim=2) - mean_BK.square() * length) / dim
            penalty_B = cost_BK.square().sum(dim=1)
        ctx.save_for_backward(attention_BKL, mean_BK, cost_BK)
        return penalty_B

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        attention_BKL, mean_BK, cost_BK = ctx.saved_tensors
        if ctx.compiled:
            from distributed_mi.losses import kernels

            grad_BKL = torch.empty_like(attention_BKL)
            saved = (x.numpy() for x in (attention_BKL, mean_BK, cost_BK, grads[0].contiguous()))
            kernels.routing_backward(*saved, ctx.dim, grad_BKL.numpy())
            return grad_BKL, None, None
        flow_BK = (4 / ctx.dim) * grads[0][:, None] * cost_BK
        return (attention_BKL - mean_BK[:, :, None]) * flow_BK[:, :, None], None, None
