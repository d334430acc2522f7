"""Row updates and sums of row gradients on a CPU, compiled: each row is read and written once.

An update reads the gradients of a row, adds them up in the order in which they arrived, and changes the row and its
state, while all of it is in the cache. torch's own operations would read and write a `[U, D]` matrix five to nine times
for the same. The rules are those of `optimizer.py`, which also holds the form for other devices.

A touched row lies anywhere in a table that no cache holds; it is asked for a few rows before its turn (1.6 to 1.9 times
faster for Adam at 12,000 to 100,000 rows of 64).

Shapes:  R rows held here, D width, N gradients, U distinct rows touched; the gradients of touched row u are
`order_N[starts_P[u] : starts_P[u + 1]]`, P = U + 1.
"""

import numpy as np
from numba import njit

from distributed_mi.core.vector_math import copy, dot32, fetch_to_write

_FAST = {"contract", "reassoc"}
"""NaN and infinity keep their meaning: training stops on them."""

# error_model="numpy": a division that may raise keeps a loop scalar, at three times the seconds.


_AHEAD = 4
"""Rows between asking for one and changing it."""


@njit(nogil=True, cache=True, error_model="numpy")
def extremes(values_N):
    """The smallest and the largest of some whole numbers, at least one."""
    low, high = values_N[0], values_N[0]
    for n in range(len(values_N)):
        low, high = min(low, values_N[n]), max(high, values_N[n])
    return low, high


@njit(nogil=True, cache=True, error_model="numpy")
def group_by_counting(slots_N, num_rows, first):
    """Distinct slots from `first` on, ascending, and what `group_by_row` gives: `slots_U`, `starts_P`, `order_N`."""
    count_R = np.zeros(num_rows, np.int32)
    for n in range(len(slots_N)):
        count_R[slots_N[n]] += 1
    count_R[:first] = 0
    distinct = np.int64(0)
    for slot in range(num_rows):
        distinct += np.int64(count_R[slot] > 0)
    slots_U, starts_P = np.empty(distinct, np.int64), np.zeros(distinct + 1, np.int64)
    u = 0
    for slot in range(num_rows):
        if count_R[slot]:
            slots_U[u] = slot
            starts_P[u + 1] = starts_P[u] + count_R[slot]
            count_R[slot] = starts_P[u]
            u += 1
    order_N = np.empty(starts_P[distinct], np.int64)
    for n in range(len(slots_N)):
        slot = slots_N[n]
        if slot >= first:
            order_N[count_R[slot]] = n
            count_R[slot] += 1
    return slots_U, starts_P, order_N


@njit(nogil=True, cache=True, error_model="numpy")
def group_by_row(inverse_N, num_rows):
    """Positions of each row's gradients, in the order of arrival: `starts_P`, `order_N`."""
    starts_P = np.zeros(num_rows + 1, np.int64)
    for n in range(len(inverse_N)):
        starts_P[inverse_N[n] + 1] += 1
    for u in range(num_rows):
        starts_P[u + 1] += starts_P[u]
    place_U = starts_P[:-1].copy()
    order_N = np.empty(len(inverse_N), np.int64)
    for n in range(len(inverse_N)):
        order_N[place_U[inverse_N[n]]] = n
        place_U[inverse_N[n]] += 1
    return starts_P, order_N


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _add(grad_D, total_D):
    for d in range(len(total_D)):
        total_D[d] += grad_D[d]


@njit(inline="always")
def _row(parts, n):
    """Row n of matrices that stand one below the other."""
    i = 0
    while n >= len(parts[i]):
        n -= len(parts[i])
        i += 1
    return parts[i][n]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _total(u, starts_P, order_N, parts, total_D):
    copy(_row(parts, order_N[starts_P[u]]), total_D)
    for at in range(starts_P[u] + 1, starts_P[u + 1]):
        _add(_row(parts, order_N[at]), total_D)


@njit(nogil=True, cache=True, error_model="numpy")
def add_by_row(inverse_N, grads_ND, out_UD):
    """`out[inverse[n]] += grads[n]`, in the order of n."""
    for n in range(len(inverse_N)):
        _add(grads_ND[n], out_UD[inverse_N[n]])


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _descend(weight_D, grad_D, lr):
    for d in range(len(weight_D)):
        weight_D[d] -= lr * grad_D[d]


@njit(nogil=True, cache=True, error_model="numpy")
def sgd(weight_RD, slots_U, starts_P, order_N, parts, lr):
    """`w -= lr g`."""
    total_D = np.empty(weight_RD.shape[1], np.float32)
    for u in range(len(slots_U)):
        if u + _AHEAD < len(slots_U):
            fetch_to_write(weight_RD, slots_U[u + _AHEAD])
        _total(u, starts_P, order_N, parts, total_D)
        _descend(weight_RD[slots_U[u]], total_D, np.float32(lr))


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _adagrad_row(weight_D, sums_D, grad_D, lr, eps):
    for d in range(len(weight_D)):
        sums_D[d] += grad_D[d] * grad_D[d]
        weight_D[d] -= lr * grad_D[d] / (np.sqrt(sums_D[d]) + eps)


@njit(nogil=True, cache=True, error_model="numpy")
def adagrad(weight_RD, sums_RD, slots_U, starts_P, order_N, parts, lr, eps):
    """`s += g^2; w -= lr g / (sqrt(s) + eps)`, number by number."""
    total_D = np.empty(weight_RD.shape[1], np.float32)
    for u in range(len(slots_U)):
        if u + _AHEAD < len(slots_U):
            fetch_to_write(weight_RD, slots_U[u + _AHEAD])
            fetch_to_write(sums_RD, slots_U[u + _AHEAD])
        _total(u, starts_P, order_N, parts, total_D)
        slot = slots_U[u]
        _adagrad_row(weight_RD[slot], sums_RD[slot], total_D, np.float32(lr), np.float32(eps))


@njit(nogil=True, cache=True, error_model="numpy")
def row_adagrad(weight_RD, sums_R, slots_U, starts_P, order_N, parts, lr, eps):
    """The same with one sum per row, of the mean squares of its gradients."""
    width = np.float32(weight_RD.shape[1])
    total_D = np.empty(weight_RD.shape[1], np.float32)
    for u in range(len(slots_U)):
        if u + _AHEAD < len(slots_U):
            fetch_to_write(weight_RD, slots_U[u + _AHEAD])
        _total(u, starts_P, order_N, parts, total_D)
        slot = slots_U[u]
        sums_R[slot] += dot32(total_D, total_D) / width
        step = np.float32(lr) / (np.sqrt(sums_R[slot]) + np.float32(eps))
        _descend(weight_RD[slot], total_D, step)


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _adam_row(weight_D, mean_D, square_D, grad_D, take1, keep2, take2, step, root, eps):
    for d in range(len(weight_D)):
        mean = mean_D[d] + take1 * (grad_D[d] - mean_D[d])
        square = keep2 * square_D[d] + take2 * (grad_D[d] * grad_D[d])
        mean_D[d] = mean
        square_D[d] = square
        weight_D[d] -= step * mean / (np.sqrt(square) / root + eps)


@njit(nogil=True, cache=True, error_model="numpy")
def adam(
    weight_RD,
    mean_RD,
    square_RD,
    updates_R,
    slots_U,
    starts_P,
    order_N,
    parts,
    lr,
    beta1,
    beta2,
    eps,
    corrections_T2,
):
    """Adam with each row's own count of updates.

    `corrections_T2[count]` is `1 - beta1^count, sqrt(1 - beta2^count)`; beyond the table they are computed, which costs
    as much as the row.
    """
    total_D = np.empty(weight_RD.shape[1], np.float32)
    take1, keep2, take2 = np.float32(1 - beta1), np.float32(beta2), np.float32(1 - beta2)
    for u in range(len(slots_U)):
        if u + _AHEAD < len(slots_U):
            fetch_to_write(weight_RD, slots_U[u + _AHEAD])
            fetch_to_write(mean_RD, slots_U[u + _AHEAD])
            fetch_to_write(square_RD, slots_U[u + _AHEAD])
        _total(u, starts_P, order_N, parts, total_D)
        slot = slots_U[u]
        updates_R[slot] += 1
        count = updates_R[slot]
        if count < len(corrections_T2):
            one, two = corrections_T2[count]
        else:
            one, two = 1 - beta1**count, np.sqrt(1 - beta2**count)
        step, root = np.float32(lr / one), np.float32(two)
        _adam_row(
            weight_RD[slot],
            mean_RD[slot],
            square_RD[slot],
            total_D,
            take1,
            keep2,
            take2,
            step,
            root,
            np.float32(eps),
        )


@njit(nogil=True, cache=True, error_model="numpy")
def dense_adam(weight_N, mean_N, square_N, steps_1, grad_N, lr, beta1, beta2, eps):
    """Adam on all numbers of a parameter; `steps_1` counts."""
    steps_1[0] += 1
    count = np.float64(steps_1[0])
    _adam_row(
        weight_N,
        mean_N,
        square_N,
        grad_N,
        np.float32(1 - beta1),
        np.float32(beta2),
        np.float32(1 - beta2),
        np.float32(lr / (1 - beta1**count)),
        np.float32(np.sqrt(1 - beta2**count)),
        np.float32(eps),
    )
