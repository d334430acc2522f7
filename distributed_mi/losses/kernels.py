"""Parts of losses on a CPU, compiled: each user's numbers are read while they are in the cache.

The formulas are those of `sampled_softmax.py`, `read_out.py` and `regularizers.py`, which also hold the form for other
devices. Each of torch's operations would pass over the `[B, N]` scores; here they come from memory once forward and
once backward. On the small matrices of the others it is the number of operations that costs.

Shapes:  B users, N shared negatives, K interests, L positions, D width.
"""

import numpy as np
from numba import njit

from distributed_mi.core.blas import use_one_thread
from distributed_mi.core.vector_math import copy, dot32, exp32, f32, largest32
from distributed_mi.losses.sampled_softmax import MASKED

use_one_thread()

_MASKED = f32(MASKED)

# Loops over the negatives are functions of their own, because LLVM makes vector instructions of such only. Sums may be
# taken in another order (`reassoc`), exponentials may not.


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _mask_hits(scores_N, ids_N, target):
    """Mask the negatives that are the target; how many."""
    hits = np.int64(0)
    for n in range(len(scores_N)):
        hit = ids_N[n] == target
        scores_N[n] = _MASKED if hit else scores_N[n]
        hits += np.int64(hit)
    return hits


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _subtract(scores_N, log_q_N):
    for n in range(len(scores_N)):
        scores_N[n] -= log_q_N[n]


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _exponentials(scores_N, largest, factor, out_N):
    for n in range(len(scores_N)):
        out_N[n] = exp32(factor * (scores_N[n] - largest))


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _exponentials_in_place(scores_N, largest):
    """The same for a factor of 1; with the scores for `out_N` the function above would go number by number."""
    for n in range(len(scores_N)):
        scores_N[n] = exp32(scores_N[n] - largest)


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _sum(values_N):
    total = f32(0.0)
    for n in range(len(values_N)):
        total += values_N[n]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def softmax_forward(
    query_BD,
    target_BD,
    negative_ND,
    target_log_q_B,
    target_ids_B,
    ids_N,
    log_q_N,
    counts_N,
    beta,
    scores_are_missing,
    scores_BN,
    loss_B,
    probability_B,
    sums_2B,
):
    """Loss of each user.

    Args:
        query_BD: what is compared with the items.
        target_BD: rows of the targets.
        negative_ND: rows of the negatives.
        target_log_q_B: what to subtract from the score of each target; empty: nothing.
        target_ids_B: ids of the targets; empty: a negative that is the user's target counts like any other.
        ids_N: ids of the negatives.
        log_q_N: what to subtract from each negative's scores; empty: nothing.
        counts_N: False on negatives that do not count; empty: all do.
        beta: concentration.
        scores_are_missing: whether to take the product that makes them.
        scores_BN: inner products with the negatives. Afterwards e^(s - max) where beta is 0 or 1, else s - max.
        loss_B: out.
        probability_B: out, of all negatives together.
        sums_2B: out, sums of hard and of sharp weights.
    """
    if scores_are_missing:
        np.dot(query_BD, negative_ND.T, scores_BN)
    mask_hits = len(target_ids_B) > 0
    num_negatives = scores_BN.shape[1]
    masked = np.int64(0)
    for n in range(len(counts_N)):
        masked += np.int64(not counts_N[n])
    other_N = np.empty(num_negatives, np.float32)
    for b in range(scores_BN.shape[0]):
        scores_N = scores_BN[b]
        num = num_negatives - masked
        if len(log_q_N):
            _subtract(scores_N, log_q_N)
        if mask_hits:
            num -= _mask_hits(scores_N, ids_N, target_ids_B[b])
        if masked:
            for n in range(num_negatives):
                if not counts_N[n]:
                    num += np.int64(mask_hits and ids_N[n] == target_ids_B[b])  # it was taken away twice
                    scores_N[n] = _MASKED
        largest = largest32(scores_N)
        if beta == 0.0:
            _exponentials_in_place(scores_N, largest)
            hard = np.float64(_sum(scores_N))
            sharp = np.float64(num)
        elif beta == 1.0:
            _exponentials_in_place(scores_N, largest)
            hard = np.float64(dot32(scores_N, scores_N))
            sharp = np.float64(_sum(scores_N))
        else:
            _exponentials(scores_N, largest, f32(1.0 + beta), other_N)
            hard = np.float64(_sum(other_N))
            _exponentials(scores_N, largest, f32(beta), other_N)
            sharp = np.float64(_sum(other_N))
            for n in range(num_negatives):
                scores_N[n] -= largest
        sums_2B[0, b] = hard
        sums_2B[1, b] = sharp
        if num == 0:
            loss_B[b] = 0.0
            probability_B[b] = 0.0
            continue
        target = dot32(query_BD[b], target_BD[b])
        if len(target_log_q_B):
            target -= target_log_q_B[b]
        # Of all negatives as one, against the target: log sum_j w_j exp(s_j) - s_target.
        margin = np.float64(largest) + np.log(hard) - np.log(sharp) + np.log(np.float64(num)) - target
        small = np.exp(-abs(margin))
        loss_B[b] = max(margin, 0.0) + np.log1p(small)
        probability_B[b] = (1.0 if margin >= 0.0 else small) / (1.0 + small)
        if margin != margin:
            loss_B[b] = margin
            probability_B[b] = margin


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _plain_flow(kept_N, hard, out_N):
    for n in range(len(kept_N)):
        out_N[n] = kept_N[n] * hard


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _squared_flow(kept_N, hard, sharp, out_N):
    for n in range(len(kept_N)):
        out_N[n] = (kept_N[n] * hard - sharp) * kept_N[n]


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _flow(kept_N, beta, hard, sharp, out_N):
    for n in range(len(kept_N)):
        out_N[n] = exp32((f32(1.0) + beta) * kept_N[n]) * hard - exp32(beta * kept_N[n]) * sharp


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _scale(row_D, factor, out_D):
    for d in range(len(row_D)):
        out_D[d] = factor * row_D[d]


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _add_scaled(row_D, factor, out_D):
    for d in range(len(row_D)):
        out_D[d] += factor * row_D[d]


@njit(nogil=True, cache=True, error_model="numpy")
def softmax_backward(
    query_BD,
    target_BD,
    negative_ND,
    grad_B,
    probability_B,
    kept_BN,
    sums_2B,
    beta,
    takes_products,
    d_BN,
    grad_query_BD,
    grad_target_BD,
    grad_negative_ND,
):
    """Gradients of what is compared.

    Args:
        query_BD: of the forward pass.
        target_BD: of the forward pass.
        negative_ND: of the forward pass.
        grad_B: gradient of each loss.
        probability_B: of the forward pass.
        kept_BN: what the forward pass left in the place of the scores.
        sums_2B: of the forward pass.
        beta: concentration.
        takes_products: whether the products with the gradient of the scores are taken here.
        d_BN: out, gradient of the scores.
        grad_query_BD: out; without products only what comes from the target.
        grad_target_BD: out.
        grad_negative_ND: out, where products are taken.
    """
    for b in range(kept_BN.shape[0]):
        flow = grad_B[b] * probability_B[b]
        if sums_2B[0, b] == 0.0 or flow == 0.0:
            d_BN[b] = 0.0
            continue
        hard = f32(flow * (1.0 + beta) / sums_2B[0, b])
        sharp = f32(flow * beta / sums_2B[1, b]) if beta else f32(0.0)
        if beta == 0.0:
            _plain_flow(kept_BN[b], hard, d_BN[b])
        elif beta == 1.0:
            _squared_flow(kept_BN[b], hard, sharp, d_BN[b])
        else:
            _flow(kept_BN[b], f32(beta), hard, sharp, d_BN[b])
    if takes_products:
        np.dot(d_BN, negative_ND, grad_query_BD)
        np.dot(d_BN.T, query_BD, grad_negative_ND)
    else:
        grad_query_BD[:] = f32(0.0)
    for b in range(kept_BN.shape[0]):
        flow = grad_B[b] * probability_B[b]
        _scale(query_BD[b], -flow, grad_target_BD[b])
        _add_scaled(target_BD[b], -flow, grad_query_BD[b])


@njit(nogil=True, cache=True, error_model="numpy")
def pick_closest(interests_BKD, target_rows_BD, best_B, query_BD):
    """The interest with the largest inner product with the target, the first of equals; out: which, and its vector."""
    for b in range(interests_BKD.shape[0]):
        best, highest = 0, dot32(interests_BKD[b, 0], target_rows_BD[b])
        for k in range(1, interests_BKD.shape[1]):
            score = dot32(interests_BKD[b, k], target_rows_BD[b])
            if score > highest:
                best, highest = k, score
        best_B[b] = best
        copy(interests_BKD[b, best], query_BD[b])


@njit(nogil=True, cache=True, error_model="numpy")
def put_back(grad_BD, best_B, out_BKD):
    """Gradient of the interests: that of the chosen one, zeros for the others."""
    for b in range(out_BKD.shape[0]):
        for k in range(out_BKD.shape[1]):
            for d in range(out_BKD.shape[2]):
                out_BKD[b, k, d] = grad_BD[b, d] if k == best_B[b] else f32(0.0)


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _sums(values_L):
    total, squares = f32(0.0), f32(0.0)
    for place in range(len(values_L)):
        total += values_L[place]
        squares += values_L[place] * values_L[place]
    return total, squares


@njit(nogil=True, cache=True, error_model="numpy")
def routing_forward(attention_BKL, dim, length, penalty_B, mean_BK, cost_BK):
    """Penalty of each user; also out: mean attention and C of each interest."""
    for b in range(attention_BKL.shape[0]):
        penalty = f32(0.0)
        for k in range(attention_BKL.shape[1]):
            total, squares = _sums(attention_BKL[b, k])
            mean = total / f32(length)
            cost = (squares - mean * mean * f32(length)) / f32(dim)
            mean_BK[b, k], cost_BK[b, k] = mean, cost
            penalty += cost * cost
        penalty_B[b] = penalty


@njit(nogil=True, cache=True, error_model="numpy")
def routing_backward(attention_BKL, mean_BK, cost_BK, grad_B, dim, grad_BKL):
    """Gradient of the attention."""
    for b in range(attention_BKL.shape[0]):
        for k in range(attention_BKL.shape[1]):
            flow = f32(4.0) * grad_B[b] * cost_BK[b, k] / f32(dim)
            for place in range(attention_BKL.shape[2]):
                grad_BKL[b, k, place] = flow * (attention_BKL[b, k, place] - mean_BK[b, k])
