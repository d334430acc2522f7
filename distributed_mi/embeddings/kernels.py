"""Row updates and sums of row gradients on a CPU, compiled: each row is read and written once.

An update reads the gradients of a row, adds them up in the order in which they arrived, and changes the row and its
state, while all of it is in the cache. torch's own operations would read and write a `[U, D]` matrix five to nine times
for the same. The rules are those of `optimizer.py`, which also holds the form for other devices.

`first` is 1 where slot 0 is padding and among the touched rows: it is skipped.

Shapes:  R rows held here, D width, N gradients, U distinct rows touched; the gradients of touched row u are
`order_N[starts_P[u] : starts_P[u + 1]]`, P = U + 1.
"""

import numpy as np
from numba import njit

_FAST = {"contract", "reassoc"}
"""NaN and infinity keep their meaning: training stops on them."""

# error_model="numpy": a division that may raise keeps a loop scalar, at three times the seconds.


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


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _total(u, starts_P, order_N, grads_ND, total_D):
    total_D[:] = grads_ND[order_N[starts_P[u]]]
    for at in range(starts_P[u] + 1, starts_P[u + 1]):
        _add(grads_ND[order_N[at]], total_D)


@njit(nogil=True, cache=True, error_model="numpy")
def sum_by_row(inverse_N, grads_ND, out_UD):
    """`out[inverse[n]] += grads[n]`, in the order of n."""
    for n in range(len(inverse_N)):
        _add(grads_ND[n], out_UD[inverse_N[n]])


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _descend(weight_D, grad_D, lr):
    for d in range(len(weight_D)):
        weight_D[d] -= lr * grad_D[d]


@njit(nogil=True, cache=True, error_model="numpy")
def sgd(weight_RD, slots_U, starts_P, order_N, grads_ND, first, lr):
    """`w -= lr g`."""
    total_D = np.empty(weight_RD.shape[1], np.float32)
    for u in range(first, len(slots_U)):
        _total(u, starts_P, order_N, grads_ND, total_D)
        _descend(weight_RD[slots_U[u]], total_D, np.float32(lr))


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _adagrad_row(weight_D, sums_D, grad_D, lr, eps):
    for d in range(len(weight_D)):
        sums_D[d] += grad_D[d] * grad_D[d]
        weight_D[d] -= lr * grad_D[d] / (np.sqrt(sums_D[d]) + eps)


@njit(nogil=True, cache=True, error_model="numpy")
def adagrad(weight_RD, sums_RD, slots_U, starts_P, order_N, grads_ND, first, lr, eps):
    """`s += g^2; w -= lr g / (sqrt(s) + eps)`, number by number."""
    total_D = np.empty(weight_RD.shape[1], np.float32)
    for u in range(first, len(slots_U)):
        _total(u, starts_P, order_N, grads_ND, total_D)
        slot = slots_U[u]
        _adagrad_row(weight_RD[slot], sums_RD[slot], total_D, np.float32(lr), np.float32(eps))


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _sum_of_squares(grad_D):
    total = np.float32(0.0)
    for d in range(len(grad_D)):
        total += grad_D[d] * grad_D[d]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def row_adagrad(weight_RD, sums_R, slots_U, starts_P, order_N, grads_ND, first, lr, eps):
    """The same with one sum per row, of the mean squares of its gradients."""
    width = np.float32(weight_RD.shape[1])
    total_D = np.empty(weight_RD.shape[1], np.float32)
    for u in range(first, len(slots_U)):
        _total(u, starts_P, order_N, grads_ND, total_D)
        slot = slots_U[u]
        sums_R[slot] += _sum_of_squares(total_D) / width
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
    grads_ND,
    first,
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
    for u in range(first, len(slots_U)):
        _total(u, starts_P, order_N, grads_ND, total_D)
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
