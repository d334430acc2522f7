"""Attentive pooling on a CPU, compiled: it reads the real places of a batch only.

Most places of a batch are padding (Beauty: 70% at L = 20). `layers.AttentivePooling` has the equations and the form for
other devices. `forward` and `backward` do all for some users of a batch, in float32 and without the interpreter, so
that several threads can share a batch. They are made of functions that can be called one by one, which
`layers._PackedPooling` does where the larger products between them are taken in another precision.

What belongs to a place (rows, keys, hidden layer, scores) is given for the whole batch; `starts_B1` says where the
places of the users in question are.

Shapes:  B users in question, L history, P real places of the batch, R rows to read from, K interests, D width, A inner
width, M distances from the newest item.
"""

import numpy as np
from numba import njit

from distributed_mi.core.blas import use_one_thread
from distributed_mi.core.vector_math import copy, dot32, exp32, f32, gather

use_one_thread()

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
def find_places(mask_BL):
    """The real places, and where each user's begin among them."""
    batch, length = mask_BL.shape
    starts_B1 = np.zeros(batch + 1, np.int64)
    for b in range(batch):
        count = 0
        for t in range(length):
            count += mask_BL[b, t]
        starts_B1[b + 1] = starts_B1[b] + count
    places_P = np.empty(starts_B1[batch], np.int64)
    p = 0
    for b in range(batch):
        for t in range(length):
            if mask_BL[b, t]:
                places_P[p] = b * length + t
                p += 1
    return places_P, starts_B1


@njit(nogil=True, cache=True, error_model="numpy")
def read(source_RD, slots_P, positions_MD, length, places_P, starts_B1, rows_PD, keys_PD):
    """Out: rows of the real places, which stand in the source at `slots_P`, and keys: plus vectors of positions."""
    here = slice(starts_B1[0], starts_B1[-1])
    gather(source_RD, slots_P[here], rows_PD[here])
    for p in range(starts_B1[0], starts_B1[-1]):
        if len(positions_MD):
            _add(rows_PD[p], positions_MD[_distance(places_P[p], length, positions_MD)], keys_PD[p])
        else:
            copy(rows_PD[p], keys_PD[p])


@njit(nogil=True, cache=True, error_model="numpy")
def spread(rows_PD, places_P, out_SD):
    """Rows of the real places to where they stand among all places; zeros elsewhere."""
    out_SD[:] = f32(0.0)
    for p in range(len(places_P)):
        copy(rows_PD[p], out_SD[places_P[p]])


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _tanh(values_A):
    """In place: tanh x = 1 - 2 / (1 + e^2x), within 1e-7."""
    for a in range(len(values_A)):
        values_A[a] = f32(1.0) - f32(2.0) / (f32(1.0) + exp32(f32(2.0) * values_A[a]))


@njit(nogil=True, cache=True, error_model="numpy")
def score(bias_A, outer_KA, starts_B1, hidden_PA, scores_KP):
    """Add the bias, if any, to what stands in the hidden layer, take tanh of it, and score the places by that."""
    for p in range(starts_B1[0], starts_B1[-1]):
        hidden_A = hidden_PA[p]
        if len(bias_A):
            _add_scaled(f32(1.0), bias_A, hidden_A)
        _tanh(hidden_A)
        for k in range(len(outer_KA)):
            scores_KP[k, p] = dot32(hidden_A, outer_KA[k])


@njit(nogil=True, cache=True, error_model="numpy")
def pool(scores_KP, rows_PD, places_P, starts_B1, attention_BKL, interests_BKD):
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
                _add_scaled(weight, rows_PD[p], interests_BKD[b, k])


@njit(nogil=True, cache=True, error_model="numpy")
def forward(
    source_RD,
    slots_P,
    positions_MD,
    inner_DA,
    bias_A,
    outer_KA,
    places_P,
    starts_B1,
    rows_PD,
    keys_PD,
    hidden_PA,
    scores_KP,
    attention_BKL,
    interests_BKD,
):
    """Interests and attention of some users, of the functions above; the last six are filled in."""
    here = slice(starts_B1[0], starts_B1[-1])
    read(source_RD, slots_P, positions_MD, attention_BKL.shape[2], places_P, starts_B1, rows_PD, keys_PD)
    np.dot(keys_PD[here], inner_DA, hidden_PA[here])
    score(bias_A, outer_KA, starts_B1, hidden_PA, scores_KP)
    pool(scores_KP, rows_PD, places_P, starts_B1, attention_BKL, interests_BKD)


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _sum_of_sizes(values_D):
    total = f32(0.0)
    for d in range(len(values_D)):
        total += abs(values_D[d])
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _scores_backward(
    grad_interests_BKD,
    grad_attention_BKL,
    attention_BKL,
    rows_PD,
    places_P,
    starts_B1,
    grad_scores_KP,
    grad_rows_PD,
):
    length = attention_BKL.shape[2]
    for b in range(len(starts_B1) - 1):
        first, last = starts_B1[b], starts_B1[b + 1]
        for p in range(first, last):
            grad_rows_PD[p] = f32(0.0)
        for k in range(len(grad_scores_KP)):
            grad_D = grad_interests_BKD[b, k]
            counts = _sum_of_sizes(grad_D) != f32(0.0)  # of most interests none does, see `losses.read_out`
            mean = f32(0.0)
            for p in range(first, last):
                slot = places_P[p] % length
                grad = dot32(grad_D, rows_PD[p]) if counts else f32(0.0)
                if len(grad_attention_BKL):
                    grad += grad_attention_BKL[b, k, slot]
                grad_scores_KP[k, p] = grad
                mean += attention_BKL[b, k, slot] * grad
            for p in range(first, last):
                weight = attention_BKL[b, k, places_P[p] % length]
                grad_scores_KP[k, p] = weight * (grad_scores_KP[k, p] - mean)
                if counts:
                    _add_scaled(weight, grad_D, grad_rows_PD[p])


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
def score_backward(
    grad_interests_BKD,
    grad_attention_BKL,
    attention_BKL,
    rows_PD,
    outer_KA,
    places_P,
    starts_B1,
    hidden_PA,
    scores_KP,
    grad_rows_PD,
    flow_PA,
    grad_bias_A,
    grad_outer_KA,
):
    """From the interests and the attention back to what tanh was taken of.

    Args:
        grad_interests_BKD: gradient of the interests.
        grad_attention_BKL: of the attention; empty: zeros.
        attention_BKL: of the forward pass.
        rows_PD: of the real places.
        outer_KA: W2, transposed.
        places_P: of `find_places`.
        starts_B1: of `find_places`.
        hidden_PA: tanh.
        scores_KP: room for their gradients; what stands there is not read.
        grad_rows_PD: out.
        flow_PA: out, gradient of what tanh was taken of.
        grad_bias_A: added to, sum of `flow_PA`.
        grad_outer_KA: added to.
    """
    _scores_backward(
        grad_interests_BKD,
        grad_attention_BKL,
        attention_BKL,
        rows_PD,
        places_P,
        starts_B1,
        scores_KP,
        grad_rows_PD,
    )
    num_interests = len(outer_KA)
    for p in range(starts_B1[0], starts_B1[-1]):
        flow_A = flow_PA[p]
        flow_A[:] = f32(0.0)
        for k in range(0, num_interests - 1, 2):
            _mix(scores_KP[k, p], scores_KP[k + 1, p], outer_KA[k], outer_KA[k + 1], flow_A)
        if num_interests % 2:
            _add_scaled(scores_KP[num_interests - 1, p], outer_KA[num_interests - 1], flow_A)
        _through_tanh(hidden_PA[p], flow_A, grad_bias_A)
        for k in range(num_interests):
            _add_scaled(scores_KP[k, p], hidden_PA[p], grad_outer_KA[k])


@njit(nogil=True, cache=True, error_model="numpy")
def add_keys(grad_keys_PD, places_P, starts_B1, length, grad_rows_PD, grad_positions_MD):
    """Add the gradients of the keys to those of the rows and of the positions."""
    for p in range(starts_B1[0], starts_B1[-1]):
        _add_scaled(f32(1.0), grad_keys_PD[p], grad_rows_PD[p])
        if len(grad_positions_MD):
            distance = _distance(places_P[p], length, grad_positions_MD)
            _add_scaled(f32(1.0), grad_keys_PD[p], grad_positions_MD[distance])


@njit(nogil=True, cache=True, error_model="numpy")
def backward(
    grad_interests_BKD,
    grad_attention_BKL,
    attention_BKL,
    rows_PD,
    inner_DA,
    outer_KA,
    places_P,
    starts_B1,
    keys_PD,
    hidden_PA,
    scores_KP,
    flow_PA,
    grad_keys_PD,
    grad_rows_PD,
    grad_positions_MD,
    grad_inner_DA,
    grad_bias_A,
    grad_outer_KA,
):
    """Gradients for some users, of the functions above.

    Room that is overwritten: scores, `flow_PA`, `grad_keys_PD`. Added to: gradients of positions, bias and outer
    weights. Out: gradients of the rows (of these users), `grad_inner_DA`.
    """
    score_backward(
        grad_interests_BKD,
        grad_attention_BKL,
        attention_BKL,
        rows_PD,
        outer_KA,
        places_P,
        starts_B1,
        hidden_PA,
        scores_KP,
        grad_rows_PD,
        flow_PA,
        grad_bias_A,
        grad_outer_KA,
    )
    here = slice(starts_B1[0], starts_B1[-1])
    np.dot(keys_PD[here].T, flow_PA[here], grad_inner_DA)
    np.dot(flow_PA[here], inner_DA.T, grad_keys_PD[here])
    add_keys(grad_keys_PD, places_P, starts_B1, attention_BKL.shape[2], grad_rows_PD, grad_positions_MD)
