"""Parts of losses on a CPU, compiled: each user's numbers are read while they are in the cache.

The formulas are those of `sampled_softmax.py`, `read_out.py` and `regularizers.py`, which also hold the form for other
devices. Each of torch's operations would pass over the `[B, N]` scores; here they come from memory once forward and
once backward. On the small matrices of the others it is the number of operations that costs.

Shapes:  B users, N shared negatives, K interests, L positions, D width.
"""

import numpy as np
from numba import njit

from distributed_mi.core.vector_math import dot32, exp32, f32, largest32
from distributed_mi.losses.sampled_softmax import MASKED

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
    scores_BN,
    target_B,
    target_ids_B,
    ids_N,
    log_q_N,
    counts_N,
    beta,
    mask_hits,
    loss_B,
    probability_B,
    sums_2B,
):
    """Loss of each user, from scores that are overwritten.

    Args:
        scores_BN: inner products with the negatives. Afterwards e^(s - max) where beta is 0 or 1, else s - max.
        target_B: corrected score of each user's target.
        target_ids_B: ids of the targets.
        ids_N: ids of the negatives.
        log_q_N: what to subtract from each negative's scores; empty: nothing.
        counts_N: False on negatives that do not count; empty: all do.
        beta: concentration.
        mask_hits: whether a negative that is the user's target counts for nothing.
        loss_B: out.
        probability_B: out, of all negatives together.
        sums_2B: out, sums of hard and of sharp weights.
    """
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
        # Of all negatives as one, against the target: log sum_j w_j exp(s_j) - s_target.
        margin = np.float64(largest) + np.log(hard) - np.log(sharp) + np.log(np.float64(num)) - target_B[b]
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


@njit(nogil=True, cache=True, error_model="numpy")
def softmax_backward(kept_BN, flow_B, sums_2B, beta, out_BN):
    """Gradient of the scores.

    Args:
        kept_BN: what the forward pass left in the place of the scores.
        flow_B: gradient of each loss times the probability of all negatives.
        sums_2B: of the forward pass.
        beta: concentration.
        out_BN: out.
    """
    for b in range(kept_BN.shape[0]):
        if sums_2B[0, b] == 0.0 or flow_B[b] == 0.0:
            out_BN[b] = 0.0
            continue
        hard = f32(flow_B[b] * (1.0 + beta) / sums_2B[0, b])
        sharp = f32(flow_B[b] * beta / sums_2B[1, b]) if beta else f32(0.0)
        if beta == 0.0:
            _plain_flow(kept_BN[b], hard, out_BN[b])
        elif beta == 1.0:
            _squared_flow(kept_BN[b], hard, sharp, out_BN[b])
        else:
            _flow(kept_BN[b], f32(beta), hard, sharp, out_BN[b])


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
        for d in range(query_BD.shape[1]):  # not a slice, see `embeddings.kernels._copy`
            query_BD[b, d] = interests_BKD[b, best, d]


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
