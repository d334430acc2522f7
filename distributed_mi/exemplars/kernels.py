"""One round of affinity propagation over some rows, compiled: over whole rows of the matrix, and over neighbour lists.

Both kernels make the availabilities of the round before and the responsibilities of this one while a row is in the
cache, so that a round reads and writes each message once. They release the interpreter's lock; the caller cuts the rows
into strips for threads and adds the strips' column sums in order, so that the number of threads changes no bit.

Shapes:  U users, R rows of the caller (a strip's are `low` to `high`), M entries of all lists of the caller.
"""

import numpy as np
from numba import njit

_FAST = {"nnan", "nsz", "arcp", "contract", "reassoc"}
"""No NaN can arise (inputs are finite, infinities are only ever subtracted from finite numbers)."""

SELF = -1
"""In place of a column: the row's own diagonal."""

_CHUNK = 128
"""Columns whose maximum is taken in vector registers before anybody asks where it is."""


@njit(nogil=True, cache=True, fastmath=_FAST)
def dense_rows(
    similarities_RU,
    responsibilities_RU,
    availabilities_RU,
    low,
    high,
    totals_U,
    self_value_R,
    damping,
    sums_U,
    first_R,
    second_R,
    best_R,
):
    """Both messages of whole rows.

    Args:
        similarities_RU: float32, -inf where a row meets its own column.
        responsibilities_RU: float32, updated; -inf on the diagonal is harmless.
        availabilities_RU: float32, updated.
        low: first row of the strip.
        high: one past its last row.
        totals_U: float32 column sums of the round before.
        self_value_R: float32, own availability plus preference of each row.
        damping: weight of the old message.
        sums_U: float64, to which the positive responsibilities are added.
        first_R: float32, receives each row's largest availability plus similarity, the diagonal included.
        second_R: float32, receives the second largest.
        best_R: int64, receives the column of the largest, `SELF` for the diagonal.
    """
    users = similarities_RU.shape[1]
    keep = np.float32(damping)
    take = np.float32(1.0) - keep
    zero = np.float32(0.0)
    reach, reach_best, of_best = zero, SELF, zero  # of the row before
    # The availabilities of a row come from memory, the responsibilities of the row before lie in the cache: chunk by
    # chunk in turn, one computes while the other waits.
    for row in range(low, high + 1):
        first, second, best = zero, np.float32(-np.inf), SELF
        here, before = min(row, high - 1), max(row - 1, low)
        if row < high:
            first = self_value_R[row]
        for start in range(0, users, _CHUNK):
            stop = min(start + _CHUNK, users)
            if row < high:
                largest = np.float32(-np.inf)
                for k in range(start, stop):
                    target = min(totals_U[k] - max(responsibilities_RU[here, k], zero), zero)
                    availability = keep * availabilities_RU[here, k] + take * target
                    availabilities_RU[here, k] = availability
                    largest = max(largest, availability + similarities_RU[here, k])
                if largest > second:
                    for k in range(start, stop):
                        value = availabilities_RU[here, k] + similarities_RU[here, k]
                        if value > first:
                            second = first
                            first = value
                            best = k
                        elif value > second:
                            second = value
            if row > low:
                largest = zero
                for k in range(start, stop):
                    gain = take * (similarities_RU[before, k] - reach)
                    responsibility = keep * responsibilities_RU[before, k] + gain
                    responsibilities_RU[before, k] = responsibility
                    largest = max(largest, responsibility)
                if start <= reach_best < stop:
                    responsibilities_RU[before, reach_best] = of_best
                    largest = max(largest, of_best)
                if largest > zero:  # few responsibilities are positive: most chunks leave the sums alone
                    for k in range(start, stop):
                        sums_U[k] += max(responsibilities_RU[before, k], zero)
        if row < high:
            first_R[row], second_R[row], best_R[row] = first, second, best
            reach, reach_best = first, best
            if best >= 0:
                gain = take * (similarities_RU[row, best] - second)
                of_best = keep * responsibilities_RU[row, best] + gain


@njit(nogil=True, cache=True)
def list_rows(
    rows,
    starts_R,
    columns_M,
    similarities_M,
    responsibilities_M,
    availabilities_M,
    totals_U,
    self_value_R,
    bound_R,
    damping,
    age_availabilities,
    sums_U,
    first_R,
    second_R,
    best_R,
):
    """Both messages of the listed pairs of some rows.

    A row whose second largest value lies below `bound_R`, the similarity that pairs outside of its list may reach,
    could be wrong: its availabilities are brought up to date, its responsibilities are left, and it is counted.

    Args:
        rows: int64, the rows to do.
        starts_R: int64, where each row's entries begin; one more than there are rows.
        columns_M: int32 column of each entry; the diagonal is not among them.
        similarities_M: float32.
        responsibilities_M: float32, updated.
        availabilities_M: float32, updated when `age_availabilities`.
        totals_U: float64 column sums of the round before.
        self_value_R: float64, own availability plus preference.
        bound_R: float32; -inf where nothing outside of the list matters.
        damping: weight of the old message.
        age_availabilities: whether the availabilities still stand at the round before.
        sums_U: float64, to which the positive responsibilities are added.
        first_R: float64, receives each row's largest availability plus similarity, the diagonal included.
        second_R: float64, receives the second largest.
        best_R: int64, receives the column of the largest, `SELF` for the diagonal.

    Returns:
        The number of rows whose list is too short.
    """
    keep, take = damping, 1.0 - damping
    short = 0
    for row in rows:
        start, stop = starts_R[row], starts_R[row + 1]
        first, second, best, where = self_value_R[row], -np.inf, SELF, -1
        for e in range(start, stop):
            k = columns_M[e]
            if age_availabilities:
                target = min(totals_U[k] - max(np.float64(responsibilities_M[e]), 0.0), 0.0)
                availabilities_M[e] = keep * availabilities_M[e] + take * target
            value = np.float64(availabilities_M[e]) + similarities_M[e]
            if value > first:
                second = first
                first = value
                best = k
                where = e
            elif value > second:
                second = value
        first_R[row], second_R[row], best_R[row] = first, second, best
        if bound_R[row] > second:
            short += 1
            continue
        for e in range(start, stop):
            reach = second if e == where else first
            responsibility = np.float32(keep * responsibilities_M[e] + take * (similarities_M[e] - reach))
            responsibilities_M[e] = responsibility
            if responsibility > 0.0:
                sums_U[columns_M[e]] += responsibility
    return short


@njit(nogil=True, cache=True)
def copy_lists(starts_R, new_starts_R, old_M, new_M):
    """Entries of every row to the front of its new, longer place."""
    for row in range(len(starts_R) - 1):
        size = starts_R[row + 1] - starts_R[row]
        new_M[new_starts_R[row] : new_starts_R[row] + size] = old_M[starts_R[row] : starts_R[row + 1]]


@njit(nogil=True, cache=True)
def nearest_listed(low, high, starts_R, columns_M, similarities_M, position_U, bound_R, labels_R, nearest_R):
    """Most similar exemplar in each row's list; -1 where another one outside of the list may be as near.

    Args:
        low: first row.
        high: one past the last.
        starts_R: int64, where each row's entries begin.
        columns_M: int32 columns.
        similarities_M: float32.
        position_U: int64, position among the exemplars, -1 for other users.
        bound_R: float32, similarity that users outside of the list may reach.
        labels_R: int64, receives the position.
        nearest_R: float32, receives the similarity.
    """
    for row in range(low, high):
        label, nearest = -1, np.float32(-np.inf)
        for e in range(starts_R[row], starts_R[row + 1]):
            position = position_U[columns_M[e]]
            if position < 0:
                continue
            value = similarities_M[e]
            if value > nearest or (value == nearest and position < label):
                label, nearest = position, value
        if nearest <= bound_R[row]:
            label = -1
        labels_R[row], nearest_R[row] = label, nearest


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def pair_similarities(ids_N, others_N, vectors_UD, similarities_N):
    """Minus the squared distance of each pair, summed in float64 from the differences of the coordinates."""
    width = vectors_UD.shape[1]
    for n in range(len(ids_N)):
        own, other = vectors_UD[ids_N[n]], vectors_UD[others_N[n]]
        total = 0.0
        for d in range(width):
            difference = np.float64(own[d]) - np.float64(other[d])
            total += difference * difference
        similarities_N[n] = -total


@njit(nogil=True, cache=True)
def _in_order(bits):
    """Bits of a float32 number, turned so that they order like the numbers: -1 < -0 < 0 < 1."""
    return bits ^ (np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else np.uint32(0x80000000))


@njit(nogil=True, cache=True)
def count_high_bits(values, counts):
    """Histogram of the upper half of the bits, in order, of float32 numbers."""
    for v in values.view(np.uint32):
        counts[_in_order(v) >> np.uint32(16)] += 1


@njit(nogil=True, cache=True)
def count_low_bits(values, high, counts):
    """Histogram of the lower half of the bits, in order, of those numbers whose upper half is `high`."""
    for v in values.view(np.uint32):
        v = _in_order(v)
        if v >> np.uint32(16) == high:
            counts[v & np.uint32(0xFFFF)] += 1
