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

_CHUNK = 256
"""Columns handled at a time. Their values stay in the innermost cache until their maximum is known."""

# LLVM makes vector instructions of loops over whole arrays that only go element by element. A loop that also finds a
# maximum stays scalar, and indices that might be negative do too: hence the small functions, and `_largest`.


@njit(nogil=True, cache=True, fastmath=_FAST)
def _age_chunk(similarities_K, responsibilities_K, availabilities_K, totals_K, keep, take, values_K):
    """Availabilities of the round before, and what they and the similarities add up to."""
    zero = np.float32(0.0)
    for k in range(len(similarities_K)):
        target = min(totals_K[k] - max(responsibilities_K[k], zero), zero)
        availability = keep * availabilities_K[k] + take * target
        availabilities_K[k] = availability
        values_K[k] = availability + similarities_K[k]


@njit(nogil=True, cache=True, fastmath=_FAST)
def _respond_chunk(similarities_K, responsibilities_K, reach, keep, take, values_K):
    """Responsibilities held against one number; also written to `values_K`."""
    for k in range(len(similarities_K)):
        responsibility = keep * responsibilities_K[k] + take * (similarities_K[k] - reach)
        responsibilities_K[k] = responsibility
        values_K[k] = responsibility


@njit(nogil=True, cache=True, fastmath=_FAST)
def _largest(values_K, scratch_K):
    """Maximum of `_CHUNK` numbers; `scratch_K` has room for half of them and may be their first half."""
    half = _CHUNK // 2
    for k in range(half):
        scratch_K[k] = max(values_K[k], values_K[k + half])
    while half > 8:
        half //= 2
        for k in range(half):
            scratch_K[k] = max(scratch_K[k], scratch_K[k + half])
    largest = scratch_K[0]
    for k in range(1, half):
        largest = max(largest, scratch_K[k])
    return largest


@njit(nogil=True, cache=True, fastmath=_FAST)
def _add_positive(responsibilities_K, sums_K):
    for k in range(len(responsibilities_K)):
        sums_K[k] += max(responsibilities_K[k], np.float32(0.0))


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
    values = np.empty(_CHUNK, dtype=np.float32)
    scratch = np.empty(_CHUNK // 2, dtype=np.float32)
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
            size = stop - start
            if row < high:
                values[size:] = -np.inf
                _age_chunk(
                    similarities_RU[here, start:stop],
                    responsibilities_RU[here, start:stop],
                    availabilities_RU[here, start:stop],
                    totals_U[start:stop],
                    keep,
                    take,
                    values,
                )
                if _largest(values, scratch) > second:
                    for k in range(size):
                        value = values[k]
                        if value > first:
                            second = first
                            first = value
                            best = start + k
                        elif value > second:
                            second = value
            if row > low:
                values[size:] = zero
                _respond_chunk(
                    similarities_RU[before, start:stop],
                    responsibilities_RU[before, start:stop],
                    reach,
                    keep,
                    take,
                    values,
                )
                if start <= reach_best < stop:
                    responsibilities_RU[before, reach_best] = of_best
                    values[reach_best - start] = of_best
                if _largest(values, scratch) > zero:  # few are positive: most chunks leave the sums alone
                    _add_positive(responsibilities_RU[before, start:stop], sums_U[start:stop])
        if row < high:
            first_R[row], second_R[row], best_R[row] = first, second, best
            reach, reach_best = first, best
            if best >= 0:
                gain = take * (similarities_RU[row, best] - second)
                of_best = keep * responsibilities_RU[row, best] + gain


_EXACT = {"nnan", "nsz"}
"""What lets loops over float64 become vector instructions and changes no bit."""


@njit(nogil=True, cache=True, fastmath=_EXACT)
def _age_list(columns_K, responsibilities_K, availabilities_K, totals_U, keep, take):
    for e in range(len(columns_K)):
        target = min(totals_U[columns_K[e]] - max(np.float64(responsibilities_K[e]), 0.0), 0.0)
        availabilities_K[e] = keep * availabilities_K[e] + take * target


@njit(nogil=True, cache=True, fastmath=_EXACT)
def _respond_list(similarities_K, responsibilities_K, reach, keep, take):
    for e in range(len(similarities_K)):
        responsibility = keep * responsibilities_K[e] + take * (similarities_K[e] - reach)
        responsibilities_K[e] = np.float32(responsibility)


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
        columns, similarities = columns_M[start:stop], similarities_M[start:stop]
        responsibilities, availabilities = responsibilities_M[start:stop], availabilities_M[start:stop]
        if age_availabilities:
            _age_list(columns, responsibilities, availabilities, totals_U, keep, take)
        first, second, best, where = self_value_R[row], -np.inf, SELF, -1
        for e in range(len(columns)):
            value = np.float64(availabilities[e]) + similarities[e]
            if value > second:
                if value > first:
                    second = first
                    first = value
                    where = e
                else:
                    second = value
        if where >= 0:
            best = columns[where]
        first_R[row], second_R[row], best_R[row] = first, second, best
        if bound_R[row] > second:
            short += 1
            continue
        of_best = np.float32(0.0)
        if where >= 0:
            gain = take * (similarities[where] - second)
            of_best = np.float32(keep * responsibilities[where] + gain)
        _respond_list(similarities, responsibilities, first, keep, take)
        if where >= 0:
            responsibilities[where] = of_best
        for e in range(len(columns)):
            if responsibilities[e] > np.float32(0.0):
                sums_U[columns[e]] += responsibilities[e]
    return short


@njit(nogil=True, cache=True)
def take_lists(rows, starts_R, old_M, new_starts_N, new_M):
    """Entries of some rows, one row after the other."""
    for n in range(len(rows)):
        start, stop = starts_R[rows[n]], starts_R[rows[n] + 1]
        new_M[new_starts_N[n] : new_starts_N[n + 1]] = old_M[start:stop]


@njit(nogil=True, cache=True)
def lengthen_lists(starts_R, values_M, rows, added_starts_N, added_M, new_starts_R):
    """Add what was found for some rows (ascending) at the end of their lists, in place.

    Lists move from the last to the first, each behind where it was; those before the first row that grows stay.

    Args:
        starts_R: int64, where each row's entries begin.
        values_M: the entries; has room for those added.
        rows: int64 rows that grow.
        added_starts_N: int64, where each one's new entries begin.
        added_M: the new entries.
        new_starts_R: int64, where each row's entries will begin.
    """
    n = len(rows) - 1
    for row in range(len(starts_R) - 2, -1, -1):
        shift = new_starts_R[row] - starts_R[row]
        if n >= 0 and rows[n] == row:
            place = new_starts_R[row + 1] - added_starts_N[n + 1]
            for e in range(added_starts_N[n], added_starts_N[n + 1]):
                values_M[place + e] = added_M[e]
            n -= 1
        if shift == 0:
            if n < 0:
                return
            continue
        for e in range(starts_R[row + 1] - 1, starts_R[row] - 1, -1):
            values_M[e + shift] = values_M[e]


@njit(nogil=True, cache=True)
def keep_new(found_BL, values_BL, own_B, known_starts_B, known_M, mark_U, keep_BL, farthest_B):
    """Which users that an index found are not listed yet.

    Args:
        found_BL: int64 columns, -1 for none.
        values_BL: float32 similarities.
        own_B: int64, the users asked for.
        known_starts_B: int64, where each one's known columns begin.
        known_M: int32, the known columns.
        mark_U: int64 scratch for all users, below 0 everywhere.
        keep_BL: bool, receives whether a column is new.
        farthest_B: float32, receives the smallest similarity found, -inf where nothing is new.
    """
    for b in range(len(own_B)):
        for e in range(known_starts_B[b], known_starts_B[b + 1]):
            mark_U[known_M[e]] = b
        mark_U[own_B[b]] = b
        farthest, new = np.float32(np.inf), False
        for n in range(found_BL.shape[1]):
            column = found_BL[b, n]
            keep = column >= 0 and mark_U[column] != b
            keep_BL[b, n] = keep
            new |= keep
            if column >= 0 and column != own_B[b]:
                farthest = min(farthest, values_BL[b, n])
        farthest_B[b] = farthest if new else -np.inf
    for b in range(len(own_B)):
        for e in range(known_starts_B[b], known_starts_B[b + 1]):
            mark_U[known_M[e]] = -1
        mark_U[own_B[b]] = -1


@njit(nogil=True, cache=True)
def sort_by_row(rows_N, first_row, columns_N, values_N, places_R, new_columns_N, new_values_N):
    """Pairs by row, in the order in which they came.

    Args:
        rows_N: int64.
        first_row: what the rows count from.
        columns_N: int32.
        values_N: float32.
        places_R: int64, where each row's pairs begin; overwritten.
        new_columns_N: int32, receives the columns.
        new_values_N: float32, receives the values.
    """
    for n in range(len(rows_N)):
        row = rows_N[n] - first_row
        new_columns_N[places_R[row]] = columns_N[n]
        new_values_N[places_R[row]] = values_N[n]
        places_R[row] += 1


@njit(nogil=True, cache=True)
def join_lists(
    starts_R,
    columns_M,
    values_M,
    other_starts_R,
    others_N,
    other_values_N,
    mark_U,
    new_starts_R,
    joined,
    values,
):
    """Two sets of lists of the same rows; a column that both have, or one has twice, is taken once.

    Args:
        starts_R: int64, where each row's entries begin.
        columns_M: int32.
        values_M: float32.
        other_starts_R: int64; and so on.
        others_N: int32.
        other_values_N: float32.
        mark_U: int64 scratch for all users, below 0 everywhere.
        new_starts_R: int64, receives where the joined entries begin.
        joined: int32, receives the columns; has room for both.
        values: float32, receives the values.
    """
    place = 0
    for row in range(len(starts_R) - 1):
        new_starts_R[row] = place
        for e in range(starts_R[row], starts_R[row + 1]):
            mark_U[columns_M[e]] = row
            joined[place], values[place] = columns_M[e], values_M[e]
            place += 1
        for e in range(other_starts_R[row], other_starts_R[row + 1]):
            if mark_U[others_N[e]] != row:
                mark_U[others_N[e]] = row
                joined[place], values[place] = others_N[e], other_values_N[e]
                place += 1
    new_starts_R[len(starts_R) - 1] = place


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
