"""Attentive pooling on a CPU, compiled: it reads the real places of a batch only.

Most places of a batch are padding (Beauty: 70% at L = 20). `layers.AttentivePooling` has the equations and the form for
other devices, `layers._PackedPooling` the matrix products between these kernels.

Shapes:  B users, L history, S = B L places of which P are real, K interests, D width, A inner width, M distances from
the newest item.
"""

import numpy as np
from numba import njit

from distributed_mi.core.vector_math import dot32, exp32, f32

_FAST = {"contract", "reassoc"}

# Loops over the width are functions of their own, because LLVM makes vector instructions of such only.


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _add_scaled(factor, row_D, out_D):
    for d in range(len(out_D)):
        out_D[d] += factor * row_D[d]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _add(one_D, other_D, out_D):
    for d in range(len(out_D)):
        out_D[d] = one_D[d] + other_D[d]


@njit(inline="always")
def _distance(place, length, positions_MD):
    """Which of the vectors by distance from the newest item stands at a place."""
    return min(length - 1 - place % length, len(positions_MD) - 1)


@njit(nogil=True, cache=True, error_model="numpy")
def gather_keys(mask_BL, rows_SD, positions_MD, places_P, starts_B1, keys_PD):
    """Find the real places, where each user's begin among them, and their rows plus vectors of positions, if any."""
    length = mask_BL.shape[1]
    p = 0
    for b in range(mask_BL.shape[0]):
        starts_B1[b] = p
        for t in range(length):
            if mask_BL[b, t]:
                row_D = rows_SD[b * length + t]
                if len(positions_MD):
                    _add(row_D, positions_MD[_distance(t, length, positions_MD)], keys_PD[p])
                else:
                    for d in range(len(row_D)):  # not a slice, see `embeddings.kernels._copy`
                        keys_PD[p, d] = row_D[d]
                places_P[p] = b * length + t
                p += 1
    starts_B1[mask_BL.shape[0]] = p


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def tanh_in_place(values_N):
    """Tanh x = 1 - 2 / (1 + e^2x), within 1e-7."""
    for n in range(len(values_N)):
        values_N[n] = f32(1.0) - f32(2.0) / (f32(1.0) + exp32(f32(2.0) * values_N[n]))


@njit(nogil=True, cache=True, error_model="numpy")
def pool_forward(scores_KP, rows_SD, places_P, starts_B1, attention_BKL, interests_BKD):
    """Softmax over each user's real places, and the mean of the rows by it; both outputs start as zeros."""
    length = attention_BKL.shape[2]
    for b in range(len(starts_B1) - 1):
        first, last = starts_B1[b], starts_B1[b + 1]
        for k in range(len(scores_KP)):
            largest = f32(-np.inf)
            for p in range(first, last):
                largest = max(largest, scores_KP[k, p])
            total = f32(0.0)
            for p in range(first, last):
                weight = exp32(scores_KP[k, p] - largest)
                attention_BKL[b, k, places_P[p] % length] = weight
                total += weight
            for p in range(first, last):
                weight = attention_BKL[b, k, places_P[p] % length] / total
                attention_BKL[b, k, places_P[p] % length] = weight
                _add_scaled(weight, rows_SD[places_P[p]], interests_BKD[b, k])


@njit(nogil=True, cache=True, error_model="numpy")
def _scores_backward(
    grad_interests_BKD,
    grad_attention_BKL,
    attention_BKL,
    rows_SD,
    places_P,
    starts_B1,
    grad_scores_KP,
    grad_rows_SD,
):
    length = attention_BKL.shape[2]
    for b in range(len(starts_B1) - 1):
        first, last = starts_B1[b], starts_B1[b + 1]
        for k in range(len(grad_scores_KP)):
            grad_D = grad_interests_BKD[b, k]
            mean = f32(0.0)
            for p in range(first, last):
                slot = places_P[p] % length
                grad = dot32(grad_D, rows_SD[places_P[p]])
                if len(grad_attention_BKL):
                    grad += grad_attention_BKL[b, k, slot]
                grad_scores_KP[k, p] = grad
                mean += attention_BKL[b, k, slot] * grad
            for p in range(first, last):
                weight = attention_BKL[b, k, places_P[p] % length]
                grad_scores_KP[k, p] = weight * (grad_scores_KP[k, p] - mean)
                _add_scaled(weight, grad_D, grad_rows_SD[places_P[p]])


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _mix(one, other, one_D, other_D, out_D):
    for d in range(len(out_D)):
        out_D[d] += one * one_D[d] + other * other_D[d]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _through_tanh(hidden_A, flow_A, total_A):
    for a in range(len(flow_A)):
        flow = flow_A[a] * (f32(1.0) - hidden_A[a] * hidden_A[a])
        flow_A[a] = flow
        total_A[a] += flow


@njit(nogil=True, cache=True, error_model="numpy")
def pool_backward(
    grad_interests_BKD,
    grad_attention_BKL,
    attention_BKL,
    rows_SD,
    places_P,
    starts_B1,
    outer_KA,
    hidden_PA,
    grad_scores_KP,
    grad_rows_SD,
    flow_PA,
    grad_bias_A,
):
    """From the interests and the attention back to what tanh was taken of.

    Args:
        grad_interests_BKD: gradient of the interests.
        grad_attention_BKL: of the attention; empty: zeros.
        attention_BKL: of the forward pass.
        rows_SD: of the histories.
        places_P: of `gather_keys`.
        starts_B1: of `gather_keys`.
        outer_KA: W2, transposed.
        hidden_PA: tanh.
        grad_scores_KP: out.
        grad_rows_SD: added to.
        flow_PA: out, gradient of what tanh was taken of, in its first P rows.
        grad_bias_A: added to, sum of `flow_PA`.
    """
    _scores_backward(
        grad_interests_BKD,
        grad_attention_BKL,
        attention_BKL,
        rows_SD,
        places_P,
        starts_B1,
        grad_scores_KP,
        grad_rows_SD,
    )
    num_interests = len(outer_KA)
    for p in range(len(hidden_PA)):
        flow_A = flow_PA[p]
        flow_A[:] = f32(0.0)
        for k in range(0, num_interests - 1, 2):
            _mix(grad_scores_KP[k, p], grad_scores_KP[k + 1, p], outer_KA[k], outer_KA[k + 1], flow_A)
        if num_interests % 2:
            _add_scaled(grad_scores_KP[num_interests - 1, p], outer_KA[num_interests - 1], flow_A)
        _through_tanh(hidden_PA[p], flow_A, grad_bias_A)


@njit(nogil=True, cache=True, error_model="numpy")
def scatter_keys(grad_keys_PD, places_P, length, grad_rows_SD, grad_positions_MD):
    """Add the gradients of the keys to those of the rows and of the positions."""
    for p in range(len(places_P)):
        _add_scaled(f32(1.0), grad_keys_PD[p], grad_rows_SD[places_P[p]])
        if len(grad_positions_MD):
            distance = _distance(places_P[p], length, grad_positions_MD)
            _add_scaled(f32(1.0), grad_keys_PD[p], grad_positions_MD[distance])
