"""REMI's routing regularisation: attention that sits on one item of the history costs.

Xie et al., "Rethinking Multi-Interest Learning for Candidate Matching in Recommender Systems", RecSys 2023.

    C_bk = (1/d) sum_t (A_bkt - mean_t A_bkt)^2          over ALL L positions of the window, padding included
    loss = sum_b sum_k C_bk^2                            summed over users, not averaged

These are the conventions of the public code; lambda = 100 is right only with them, at 128 users a step, d = 64 and
L = 20. For other sizes the same strength is lambda' = lambda (d / 64)^2 (128 / users per step).

Uniform attention over a full history costs 0. A short history of n items costs at least K ((1/n - 1/L) / d)^2.

Shapes:  B users, K interests, L positions, D width.
"""

from torch import Tensor


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
    # sum_t (A - mean)^2 over `length` slots, of which those beyond the tensor hold 0.
    spread_BK = attention_BKL.square().sum(dim=2) - attention_BKL.sum(dim=2).square() / length
    return (spread_BK / dim).square().sum(dim=1)
