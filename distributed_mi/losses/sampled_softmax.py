"""Sampled softmax over negatives that all users of a step share, with REMI's weights on hard ones.

    loss_b = log( exp(s_b+) + sum_j w_bj exp(s_bj) ) - s_b+        s = query . row - log q
    w_bj   = exp(beta s_bj) / mean_i exp(beta s_bi)

beta = 0: all weights are 1. With every item as a negative and accidental hits masked this is the full softmax
cross-entropy. The correction by log q (Bengio and Senecal 2008) makes the gradient an estimate of the full one under a
non-uniform sampler; for a uniform one it cancels. Public versions differ: TensorFlow's ComiRec draws log-uniformly
without replacement, corrects and masks; REMI's PyTorch code draws uniformly with replacement, has padding among the
negatives and keeps accidental hits (at 1,280 negatives of Beauty's 12,101 items one target in ten is among its own
negatives).

beta > 0: interest-aware hard negatives (Xie et al., "Rethinking Multi-Interest Learning for Candidate Matching in
Recommender Systems", RecSys 2023). Negatives should be drawn with q(j) proportional to exp(beta s_j); they are drawn
uniformly and weighted instead. The weights have mean 1; a large beta puts all weight N on the hardest negative. The
gradient flows through them, as in the public code. Scores are shifted by their maximum before any exponential, so no
beta overflows. Differences from the public code: accidental hits are masked by default (they would carry the largest
weights of all), and padding is never a negative.

Forward and backward look at the scores once each. With A = exp(beta (s - max)), whose row sums are a, and
H = exp((1 + beta) (s - max)), whose row sums are h:

    d loss / d s_bj = p_b ( (1 + beta) H_bj / h_b  -  beta A_bj / a_b )       p_b: probability of all negatives

so only A (and H, where it is not A squared) outlives the forward pass; autograd would keep four such matrices.

Shapes:  B users, N shared negatives, D width.
"""

from typing import Any

import torch
from torch import Tensor

MASKED = -1e30
"""Score of a negative that does not count; finite, so that a row with nothing else has no NaN in its gradient."""


def target_scores(query_BD: Tensor, target_rows_BD: Tensor) -> Tensor:
    """Inner products `[B]` with each user's target."""
    return (query_BD * target_rows_BD).sum(dim=1)


def sampled_softmax(
    query_BD: Tensor,
    target_rows_BD: Tensor,
    negative_rows_ND: Tensor,
    *,
    target_ids_B: Tensor,
    negative_ids_N: Tensor,
    beta: float = 0.0,
    mask_accidental_hits: bool = True,
    target_log_q_B: Tensor | None = None,
    negative_log_q_N: Tensor | None = None,
    negative_mask_N: Tensor | None = None,
) -> Tensor:
    """Loss of each user, `[B]`, not averaged; 0 where no negative counts.

    Args:
        query_BD: what is compared with the items.
        target_rows_BD: row of each user's target.
        negative_rows_ND: rows of the shared negatives.
        target_ids_B: int64, to find accidental hits.
        negative_ids_N: int64.
        beta: concentration of the weights on hard negatives; 0 weighs all alike.
        mask_accidental_hits: leave out negatives that equal the user's target.
        target_log_q_B: log probability of drawing each target as a negative; None: no correction.
        negative_log_q_N: the same of each negative; the weights are taken from corrected scores too.
        negative_mask_N: bool, False on negatives that do not count; None: all do.
    """
    hits = accidental_hits(target_ids_B, negative_ids_N) if mask_accidental_hits else None
    target_B = target_scores(query_BD.detach(), target_rows_BD.detach())
    if target_log_q_B is not None:
        target_B = target_B - target_log_q_B
    loss_B: Tensor = _SampledSoftmax.apply(
        query_BD, target_rows_BD, negative_rows_ND, target_B, beta, hits, negative_log_q_N, negative_mask_N
    )
    return loss_B


def accidental_hits(target_ids_B: Tensor, negative_ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """(user, negative) pairs in which a negative is the user's target: two int64 index tensors.

    By binary search: a `[B, N]` comparison would cost as much as the scores.
    """
    sorted_N, order_N = negative_ids_N.sort()
    target_ids_B = target_ids_B.contiguous()
    low_B = torch.searchsorted(sorted_N, target_ids_B)
    count_B = torch.searchsorted(sorted_N, target_ids_B, right=True) - low_B
    rows = torch.repeat_interleave(torch.arange(len(target_ids_B), device=count_B.device), count_B)
    first = count_B.cumsum(0) - count_B
    within = torch.arange(len(rows), device=rows.device) - first[rows]
    return rows, order_N[low_B[rows] + within]


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BD: Tensor,
        target_rows_BD: Tensor,
        negative_rows_ND: Tensor,
        target_B: Tensor,
        beta: float,
        hits: tuple[Tensor, Tensor] | None,
        log_q_N: Tensor | None,
        mask_N: Tensor | None,
    ) -> Tensor:
        scores_BN = query_BD @ negative_rows_ND.T  # in bfloat16 under autocast
        scores_BN = scores_BN if scores_BN.dtype == torch.float64 else scores_BN.float()
        num_B = _mask(scores_BN, hits, log_q_N, mask_N)
        top_B = scores_BN.amax(dim=1)
        shifted_BN = scores_BN.sub_(top_B[:, None])
        hard_BN: Tensor | None = None  # left out for beta = 1
        sharp_BN: Tensor | None = None  # left out for beta = 0
        sharp_B: Tensor | None = None
        if beta == 0:
            hard_BN = shifted_BN.exp_()
            hard_B = hard_BN.sum(dim=1)
        elif beta == 1:
            sharp_BN = shifted_BN.exp_()
            hard_B = sharp_BN.square().sum(dim=1)
        else:
            hard_BN = torch.exp(shifted_BN * (1 + beta))
            hard_B = hard_BN.sum(dim=1)
            sharp_BN = shifted_BN.mul_(beta).exp_()
        # Of all negatives as one: log sum_j w_j exp(s_j) = max + log h - log a + log n.
        log_mass_B = top_B + hard_B.log()
        if sharp_BN is not None:
            sharp_B = sharp_BN.sum(dim=1)
            log_mass_B = log_mass_B - sharp_B.log() + num_B.log()
        log_mass_B = log_mass_B.masked_fill(num_B == 0, MASKED)
        loss_B = torch.nn.functional.softplus(log_mass_B - target_B)
        probability_B = torch.sigmoid(log_mass_B - target_B)
        ctx.beta = beta
        ctx.save_for_backward(
            query_BD, target_rows_BD, negative_rows_ND, hard_BN, sharp_BN, hard_B, sharp_B, probability_B
        )
        return loss_B

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_BD, target_BD, negative_ND, hard_BN, sharp_BN, hard_B, sharp_B, probability_B = (
            ctx.saved_tensors
        )
        flow_B1 = (grads[0] * probability_B)[:, None]
        scale_B1 = flow_B1 * (1 + ctx.beta) / hard_B[:, None]
        if sharp_BN is None:
            d_BN = hard_BN * scale_B1
        else:
            less_B1 = flow_B1 * ctx.beta / sharp_B[:, None]
            if hard_BN is None:  # beta = 1: hard is sharp squared
                d_BN = (sharp_BN * scale_B1).sub_(less_B1).mul_(sharp_BN)
            else:
                d_BN = (hard_BN * scale_B1).addcmul_(sharp_BN, less_B1, value=-1)
        rows_dtype = negative_ND.dtype
        grad_query_BD = d_BN @ negative_ND.to(d_BN.dtype) - flow_B1 * target_BD
        grad_negative_ND = (d_BN.T @ query_BD.to(d_BN.dtype)).to(rows_dtype)
        grad_target_BD = -flow_B1 * query_BD
        return (
            grad_query_BD.to(query_BD.dtype),
            grad_target_BD.to(target_BD.dtype),
            grad_negative_ND,
            None,
            None,
            None,
            None,
            None,
        )


def _mask(
    scores_BN: Tensor,
    hits: tuple[Tensor, Tensor] | None,
    log_q_N: Tensor | None,
    mask_N: Tensor | None,
) -> Tensor:
    """Correct and mask scores in place; how many negatives of each user count, `[B]`."""
    num_users, num_negatives = scores_BN.shape
    num_B = scores_BN.new_full((num_users,), float(num_negatives))
    if log_q_N is not None:
        scores_BN.sub_(log_q_N)
    if mask_N is not None:
        scores_BN.masked_fill_(~mask_N, MASKED)
        num_B -= (~mask_N).sum()
    if hits is not None and len(hits[0]):
        scores_BN[hits] = MASKED
        counted = scores_BN.new_ones(len(hits[0])) if mask_N is None else mask_N[hits[1]].to(scores_BN.dtype)
        num_B.index_add_(0, hits[0], counted, alpha=-1)
    return num_B
