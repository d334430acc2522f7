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

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.cpu import map_slices
from distributed_mi.core.precision import product, product_dtype

MASKED = -1e30
"""Score of a negative that does not count; finite, so that a row with nothing else has no NaN in its gradient."""

_NO_IDS = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
_NO_LOG_Q, _NO_MASK = np.empty(0, np.float32), np.empty(0, np.bool_)


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
    ids = (target_ids_B, negative_ids_N) if mask_accidental_hits else None
    loss_B: Tensor = _SampledSoftmax.apply(
        query_BD,
        target_rows_BD,
        negative_rows_ND,
        target_log_q_B,
        float(beta),
        ids,
        negative_log_q_N,
        negative_mask_N,
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
        target_log_q_B: Tensor | None,
        beta: float,
        ids: tuple[Tensor, Tensor] | None,
        log_q_N: Tensor | None,
        mask_N: Tensor | None,
    ) -> Tensor:
        ctx.dtype, ctx.beta = product_dtype(query_BD.device.type), beta
        ctx.compiled = _on_cpu(query_BD, target_rows_BD, negative_rows_ND)
        kept: tuple[Tensor | None, ...]
        if ctx.compiled:
            query_BD, target_rows_BD, negative_rows_ND = (
                x.contiguous() for x in (query_BD, target_rows_BD, negative_rows_ND)
            )
            given = (query_BD, target_rows_BD, negative_rows_ND, target_log_q_B, ids, log_q_N, mask_N)
            loss_B, kept = _forward(*given, beta, ctx.dtype)
        else:
            scores_BN = product(query_BD, negative_rows_ND.T, ctx.dtype)
            target_B = target_scores(query_BD, target_rows_BD)
            if target_log_q_B is not None:
                target_B -= target_log_q_B
            loss_B, ctx.flow, kept = _by_torch(scores_BN, target_B, beta, ids, log_q_N, mask_N)
        ctx.save_for_backward(query_BD, target_rows_BD, negative_rows_ND, *kept)
        return loss_B

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_BD, target_BD, negative_ND, probability_B, *kept = ctx.saved_tensors
        if ctx.compiled:
            compared = (query_BD, target_BD, negative_ND)
            found = _backward(*compared, grads[0], probability_B, kept[0], kept[1], ctx.beta, ctx.dtype)
        else:
            flow_B = grads[0] * probability_B
            d_BN, flow_B1 = ctx.flow(flow_B, *kept), flow_B[:, None]
            grad_query_BD = product(d_BN, negative_ND.to(d_BN.dtype), ctx.dtype)
            found = (
                torch.addcmul(grad_query_BD, flow_B1, target_BD, value=-1).to(query_BD.dtype),
                (-flow_B1 * query_BD).to(target_BD.dtype),
                product(d_BN.T, query_BD.to(d_BN.dtype), ctx.dtype).to(negative_ND.dtype),
            )
        return *found, None, None, None, None, None


Form = tuple[Tensor, Callable[..., Tensor], tuple[Tensor | None, ...]]
"""Losses `[B]`; what makes the gradient of the scores from `grad of the loss x probability` and what was kept; and what
to keep, first of all the probability of all negatives together `[B]`."""


def _on_cpu(*tensors: Tensor) -> bool:
    """Whether compiled kernels can take them."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


def _forward(
    query_BD: Tensor,
    target_rows_BD: Tensor,
    negative_ND: Tensor,
    target_log_q_B: Tensor | None,
    ids: tuple[Tensor, Tensor] | None,
    log_q_N: Tensor | None,
    mask_N: Tensor | None,
    beta: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses on a CPU, and what to keep: probabilities, what the kernel left of the scores, its sums."""
    from distributed_mi.losses import kernels

    users, num_negatives = len(query_BD), len(negative_ND)
    query, target, negatives = (x.detach().numpy() for x in (query_BD, target_rows_BD, negative_ND))
    if dtype is None:
        scores_BN = query_BD.new_empty((users, num_negatives))
    else:
        scores_BN = product(query_BD.detach(), negative_ND.detach().T, dtype)
    loss_B, probability_B = query_BD.new_empty((2, users))
    sums_2B = torch.empty((2, users), dtype=torch.float64)
    target_ids, negative_ids = (i.contiguous().numpy() for i in ids or _NO_IDS)
    target_log_q, log_q = (
        _NO_LOG_Q if x is None else x.float().contiguous().numpy() for x in (target_log_q_B, log_q_N)
    )
    counts = _NO_MASK if mask_N is None else mask_N.contiguous().numpy()
    scores, loss, probability, sums = (x.numpy() for x in (scores_BN, loss_B, probability_B, sums_2B))

    def work(b: slice) -> None:
        kernels.softmax_forward(
            query[b],
            target[b],
            negatives,
            target_log_q[b],
            target_ids[b],
            negative_ids,
            log_q,
            counts,
            beta,
            dtype is None,
            scores[b],
            loss[b],
            probability[b],
            sums[:, b],
        )

    map_slices(work, users, num_negatives)
    return loss_B, (probability_B, scores_BN, sums_2B)


def _backward(
    query_BD: Tensor,
    target_BD: Tensor,
    negative_ND: Tensor,
    grad_B: Tensor,
    probability_B: Tensor,
    kept_BN: Tensor,
    sums_2B: Tensor,
    beta: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, of the targets' rows and of the negatives' rows on a CPU."""
    from distributed_mi.losses import kernels

    d_BN, grad_query_BD, grad_target_BD = (torch.empty_like(x) for x in (kept_BN, query_BD, target_BD))
    query, target, negatives, flow, probability, kept, sums, d, of_query, of_target = (
        x.numpy()
        for x in (
            query_BD,
            target_BD,
            negative_ND,
            grad_B.contiguous(),
            probability_B,
            kept_BN,
            sums_2B,
            d_BN,
            grad_query_BD,
            grad_target_BD,
        )
    )

    def work(b: slice) -> Any:
        of_negatives = np.empty(negatives.shape if dtype is None else (0, 0), np.float32)
        kernels.softmax_backward(
            query[b],
            target[b],
            negatives,
            flow[b],
            probability[b],
            kept[b],
            sums[:, b],
            beta,
            dtype is None,
            d[b],
            of_query[b],
            of_target[b],
            of_negatives,
        )
        return of_negatives

    parts = map_slices(work, len(kept), kept.shape[1])
    if dtype is not None:
        grad_query_BD += product(d_BN, negative_ND, dtype)
        return grad_query_BD, grad_target_BD, product(d_BN.T, query_BD, dtype)
    for part in parts[1:]:
        parts[0] += part
    return grad_query_BD, grad_target_BD, torch.from_numpy(parts[0])


def _by_torch(
    scores_BN: Tensor,
    target_B: Tensor,
    beta: float,
    ids: tuple[Tensor, Tensor] | None,
    log_q_N: Tensor | None,
    mask_N: Tensor | None,
) -> Form:
    """Losses on any device, in float32 or float64."""
    scores_BN = scores_BN if scores_BN.dtype == torch.float64 else scores_BN.float()
    num_B = _mask(scores_BN, accidental_hits(*ids) if ids else None, log_q_N, mask_N)
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

    def flow(
        flow_B: Tensor,
        hard_BN: Tensor | None,
        sharp_BN: Tensor | None,
        hard_B: Tensor,
        sharp_B: Tensor | None,
    ) -> Tensor:
        scale_B1 = (flow_B * (1 + beta) / hard_B)[:, None]
        if sharp_BN is None:
            assert hard_BN is not None
            return hard_BN * scale_B1
        assert sharp_B is not None
        less_B1 = (flow_B * beta / sharp_B)[:, None]
        if hard_BN is None:  # beta = 1: hard is sharp squared
            return (sharp_BN * scale_B1).sub_(less_B1).mul_(sharp_BN)
        return (hard_BN * scale_B1).addcmul_(sharp_BN, less_B1, value=-1)

    loss_B = torch.nn.functional.softplus(log_mass_B - target_B)
    return loss_B, flow, (torch.sigmoid(log_mass_B - target_B), hard_BN, sharp_BN, hard_B, sharp_B)


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
