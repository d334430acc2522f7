"""Selection and exact scoring of top-k candidates, compiled.

A tile of approximate scores, float32 or bfloat16, is read once, as whole numbers in the order of the scores: chunks
without a score at the user's threshold are passed over, the few others give candidates. Candidates wait in a buffer;
when it is full, the k-th best in it raises the threshold and those below are thrown out, and where that is not enough
(many ties) the buffer is scored exactly and cut to its k best. Scores in the end are exact ones only, so they depend on
nothing but the user's interests and the item's row.

The kernels release the interpreter's lock; each thread has users of its own.

Shapes:  B users, K interests, R rows held, t rows of a tile, D width, C places of a candidate buffer, M seen pairs.
"""

import numpy as np
from numba import njit

from distributed_mi.core.vector_math import bits_of_float, dot32, fetch_to_read, float_of_bits, ordered32

_CHUNK = 64
"""Scores of one interest that are compared with the threshold at once."""
_AHEAD = 4
"""Candidates between asking for a row and scoring it."""
_COARSE = np.float32(1.02 * 2.0**-7)
"""Two scores rounded to bfloat16, by half a unit in the eighth bit each."""
_BITS = 62
"""Interests that have a bit of their own in a candidate's mark; later ones share the last."""


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _squares(row_D):
    """Sum of squares, float64."""
    total = 0.0
    for d in range(len(row_D)):
        total += np.float64(row_D[d]) * np.float64(row_D[d])
    return total


@njit(nogil=True, cache=True, fastmath={"contract"})
def _take_rests(row_D, rests_D):
    """What rounding to bfloat16 takes from each number."""
    for d in range(len(row_D)):
        bits = bits_of_float(row_D[d])
        near = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-0x10000)
        rests_D[d] = row_D[d] - float_of_bits(np.int32(near))


@njit(nogil=True, cache=True)
def largest_norms(weight_RD):
    """Largest Euclidean norm of the rows and of their rests, float64; NaN when a row is not finite."""
    largest, largest_rest = 0.0, 0.0
    rests_D = np.empty(weight_RD.shape[1], np.float32)
    for row in range(len(weight_RD)):
        squares = _squares(weight_RD[row])
        if not squares <= np.finfo(np.float64).max:
            return np.nan, np.nan
        largest = max(largest, squares)
        _take_rests(weight_RD[row], rests_D)
        largest_rest = max(largest_rest, _squares(rests_D))
    return np.sqrt(largest), np.sqrt(largest_rest)


@njit(nogil=True, cache=True)
def norms_of_users(interests_BKD, norms_B, rests_B):
    """The same of each user's interests, out."""
    for b in range(len(interests_BKD)):
        norms_B[b], rests_B[b] = largest_norms(interests_BKD[b])


# Loops over a tile are functions of their own, because LLVM makes vector instructions of such only. A key is the bits
# of a score with those below the sign turned over where it is negative: int16 of bfloat16, int32 of float32.


@njit(nogil=True, cache=True)
def _take_keys(bits_t, keys_t):
    """Keys of one interest's scores."""
    below = np.iinfo(keys_t.dtype).max
    for place in range(len(keys_t)):
        bits = bits_t[place]
        keys_t[place] = bits ^ below if bits < 0 else bits


@njit(nogil=True, cache=True)
def _raise(bits_t, keys_t):
    """Larger of two scores at each place, as keys."""
    below = np.iinfo(keys_t.dtype).max
    for place in range(len(keys_t)):
        bits = bits_t[place]
        key = keys_t.dtype.type(bits ^ below if bits < 0 else bits)
        other = keys_t[place]
        keys_t[place] = other if other > key else key


@njit(nogil=True, cache=True)
def _reaches(keys_t, threshold):
    """How many keys are not below a threshold."""
    count = np.int32(0)
    for place in range(len(keys_t)):
        count += np.int32(keys_t[place] >= threshold)
    return count


@njit(nogil=True, cache=True)
def _threshold_key(score, lowest, drop):
    """A key that every score from `score` on reaches; of bfloat16 also the one just below may. NaN: all reach it."""
    if not score > -np.inf:
        return lowest
    # The key of -0.0 is below that of 0.0, which is no better.
    return ordered32(bits_of_float(score if score != 0.0 else np.float32(-0.0))) >> drop


@njit(inline="always")
def _score_of_key(key, sign, below, drop):
    return float_of_bits(np.int32((key ^ ((key >> sign) & below)) << drop))


@njit(nogil=True, cache=True)
def _dot(query_D, row_D):
    """Inner product, float64, of float32 vectors: products are exact, four sums over d mod 4 in order, then added."""
    width = len(query_D)
    whole = width - width % 4
    a = b = c = e = 0.0
    for d in range(0, whole, 4):
        a += np.float64(query_D[d]) * np.float64(row_D[d])
        b += np.float64(query_D[d + 1]) * np.float64(row_D[d + 1])
        c += np.float64(query_D[d + 2]) * np.float64(row_D[d + 2])
        e += np.float64(query_D[d + 3]) * np.float64(row_D[d + 3])
    if whole < width:
        a += np.float64(query_D[whole]) * np.float64(row_D[whole])
    if whole + 1 < width:
        b += np.float64(query_D[whole + 1]) * np.float64(row_D[whole + 1])
    if whole + 2 < width:
        c += np.float64(query_D[whole + 2]) * np.float64(row_D[whole + 2])
    return (a + b) + (c + e)


@njit(nogil=True, cache=True)
def _is_seen(seen_M, low, high, item):
    """Whether an id is among ascending ones."""
    while low < high:
        middle = (low + high) // 2
        if seen_M[middle] < item:
            low = middle + 1
        elif seen_M[middle] > item:
            high = middle
        else:
            return True
    return False


@njit(nogil=True, cache=True)
def _kth_largest_key(keys_n, k, bits):
    """The k-th largest of at least k keys: bit by bit, the largest number that k of them reach."""
    found = np.int32(-1) << np.int32(bits - 1)
    for bit in range(bits - 1, -1, -1):
        trial = np.int32(found + (np.int32(1) << np.int32(bit)))
        if _reaches(keys_n, trial) >= k:
            found = trial
    return found


@njit(nogil=True, cache=True)
def _kth_largest(scores_n, k):
    """The k-th largest of at least k scores."""
    keys_n = np.empty(len(scores_n), np.int32)
    _take_keys(scores_n.view(np.int32), keys_n)
    return float_of_bits(ordered32(_kth_largest_key(keys_n, k, 32)))


@njit(nogil=True, cache=True)
def _score(query_KD, row_D, mark):
    """Exact score, rounded to float32, and the first interest that gives it, among those marked."""
    best, chosen = np.float32(-np.inf), -1
    for interest in range(len(query_KD)):
        if (mark >> min(interest, _BITS - 1)) & 1:
            score = np.float32(_dot(query_KD[interest], row_D)) + np.float32(0.0)  # no -0.0
            if chosen < 0 or score > best:
                best, chosen = score, interest
    return best, chosen


@njit(nogil=True, cache=True)
def _settle(query_KD, weight_RD, ids_R, slots_C, scores_C, marks_C, count, k):
    """Score the candidates exactly and keep the k best, in order. Returns how many are left."""
    keys, bits_C = np.empty(count, np.int64), scores_C.view(np.int32)
    for c in range(count):
        if c + _AHEAD < count:
            fetch_to_read(weight_RD, slots_C[c + _AHEAD])
        if marks_C[c] > 0:
            score, interest = _score(query_KD, weight_RD[slots_C[c]], marks_C[c])
            scores_C[c], marks_C[c] = score, -1 - interest
        bits = np.int64(bits_C[c])
        keys[c] = -(((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) | (0xFFFFFFFF - ids_R[slots_C[c]]))
    order = np.argsort(keys)[:k]
    slots, scores, marks = slots_C[order], scores_C[order], marks_C[order]
    left = len(order)
    slots_C[:left], scores_C[:left], marks_C[:left] = slots, scores, marks
    return left


@njit(nogil=True, cache=True)
def _refine(query_KD, weight_RD, slots_C, scores_C, marks_C, count, margin):
    """Approximate scores anew, in float32; `margin` is twice the error of these."""
    interests = len(query_KD)
    for c in range(count):
        if c + _AHEAD < count:
            fetch_to_read(weight_RD, slots_C[c + _AHEAD])
        if marks_C[c] <= 0:
            continue
        row_D, mark = weight_RD[slots_C[c]], marks_C[c]
        best, near = np.float32(-np.inf), np.int64(0)
        for interest in range(interests):
            bit = np.int64(1) << min(interest, _BITS - 1)
            if mark & bit:
                score = dot32(query_KD[interest], row_D)
                if score - margin > best:  # none of the earlier ones can give the score
                    near = np.int64(0)
                if score >= best - margin:
                    near |= bit
                best = max(best, score)
        scores_C[c], marks_C[c] = best, near


@njit(inline="always")
def _below(score, margin, coarse):
    """A score that everything reaches that may be at least as good as `score`, an approximation too."""
    return np.float32(score - margin - coarse * (abs(score) + margin))


@njit(nogil=True, cache=True)
def _make_room(k, margin, coarse, query_KD, weight_RD, ids_R, slots_C, scores_C, marks_C, count):
    """Throw out candidates that cannot be among the k best.

    Returns how many are left, at most half a buffer, and the score that a new candidate must reach.
    """
    if count < k or margin == np.inf:
        threshold = np.float32(-np.inf)
    else:
        threshold = _below(_kth_largest(scores_C[:count], k), margin, coarse)
    left = 0
    for c in range(count):
        if not scores_C[c] < threshold:
            slots_C[left], scores_C[left], marks_C[left] = slots_C[c], scores_C[c], marks_C[c]
            left += 1
    if 2 * left > len(slots_C):
        left = _settle(query_KD, weight_RD, ids_R, slots_C, scores_C, marks_C, left, k)
        if left == k:
            threshold = max(threshold, _below(scores_C[k - 1], margin, coarse))
    return left, threshold


@njit(nogil=True, cache=True)
def _mark(bits_Kt, place, sign, below, threshold):
    """A bit for each interest whose approximate score reaches a threshold."""
    mark = 0
    for interest in range(len(bits_Kt)):
        bits = np.int64(bits_Kt[interest, place])
        if bits ^ ((bits >> sign) & below) >= threshold:
            mark |= 1 << min(interest, _BITS - 1)
    return mark


@njit(inline="always")
def _is_power_of_two(number):
    return number & (number - 1) == 0


@njit(nogil=True, cache=True)
def scan_tile(
    bits_BKt,
    first_slot,
    weight_RD,
    ids_R,
    interests_BKD,
    margins_B,
    seen_starts_B1,
    seen_M,
    k,
    thresholds_B,
    slots_BC,
    approximate_BC,
    marks_BC,
    counts_B,
):
    """Take the candidates of a tile into the users' buffers.

    Args:
        bits_BKt: bits of the approximate scores, int32 of float32 or int16 of bfloat16.
        first_slot: place of the tile's first row among the rows held.
        weight_RD: float32.
        ids_R: int64; id 0 is padding.
        interests_BKD: float32.
        margins_B: float32; an item whose approximate score, before it was rounded to bfloat16, is this far below the
            k-th best one cannot be among the k best. Infinite: nothing is known, all items are candidates. 0: all
            scores are 0, and the ids ascend.
        seen_starts_B1: int64, where each user's seen ids begin.
        seen_M: int64, ascending for each user.
        k: length of the lists.
        thresholds_B: float32, approximate score that a candidate must reach; -inf at first.
        slots_BC: int64, rows of the candidates; C at least 2 k + 2.
        approximate_BC: float32, their scores.
        marks_BC: int64; above 0 a bit for each interest that may give the score, below 0 the score is exact and
            `-1 - mark` gives it.
        counts_B: int64, candidates in each buffer; 0 at first.
    """
    users, interests, rows = bits_BKt.shape
    coarse = _COARSE if bits_BKt.itemsize == 2 else np.float32(0.0)
    capacity = slots_BC.shape[1]
    keys_t, places_c = np.empty(rows, bits_BKt.dtype), np.empty(_CHUNK, np.int64)
    drop = np.int32(32 - 8 * bits_BKt.itemsize)
    sign, below, lowest = np.int32(31) - drop, np.int32(0x7FFFFFFF) >> drop, np.int32(-0x80000000) >> drop
    for b in range(users):
        margin, bits_Kt, count = margins_B[b], bits_BKt[b], counts_B[b]
        _take_keys(bits_Kt[0], keys_t)
        for interest in range(1, interests):
            _raise(bits_Kt[interest], keys_t)
        if thresholds_B[b] == -np.inf and margin < np.inf:
            # Among the best of this tile may be padding and what the user has seen.
            enough = k + 1 + seen_starts_B1[b + 1] - seen_starts_B1[b]
            if enough <= rows:
                key = _kth_largest_key(keys_t, enough, 8 * keys_t.itemsize)
                thresholds_B[b] = _below(_score_of_key(key, sign, below, drop), margin, coarse)
        threshold = _threshold_key(thresholds_B[b], lowest, drop)
        for start in range(0, rows, _CHUNK):
            stop = min(start + _CHUNK, rows)
            if _reaches(keys_t[start:stop], threshold) == 0:
                continue
            hits = 0
            for place in range(start, stop):
                places_c[hits] = place
                hits += keys_t[place] >= threshold
            for place in places_c[:hits]:
                key = np.int32(keys_t[place])
                if key < threshold:  # it has risen since
                    continue
                slot = first_slot + place
                item = ids_R[slot]
                if item == 0 or _is_seen(seen_M, seen_starts_B1[b], seen_starts_B1[b + 1], item):
                    continue
                if count == capacity:
                    count, thresholds_B[b] = _make_room(
                        k,
                        margin,
                        coarse,
                        interests_BKD[b],
                        weight_RD,
                        ids_R,
                        slots_BC[b],
                        approximate_BC[b],
                        marks_BC[b],
                        count,
                    )
                    threshold = _threshold_key(thresholds_B[b], lowest, drop)
                if margin == 0.0 and count >= k:  # all items tie, and these have the smallest ids
                    break
                score = _score_of_key(key, sign, below, drop)
                slots_BC[b, count], approximate_BC[b, count] = slot, score
                marks_BC[b, count] = _mark(
                    bits_Kt, place, sign, below, _threshold_key(_below(score, margin, coarse), lowest, drop)
                )
                count += 1
        if count > k and _is_power_of_two(
            first_slot // rows + 1
        ):  # a higher threshold for as many tiles again
            count, thresholds_B[b] = _make_room(
                k,
                margin,
                coarse,
                interests_BKD[b],
                weight_RD,
                ids_R,
                slots_BC[b],
                approximate_BC[b],
                marks_BC[b],
                count,
            )
        counts_B[b] = count


@njit(nogil=True, cache=True)
def finish(
    weight_RD,
    ids_R,
    interests_BKD,
    margins_B,
    fine_margins_B,
    rounded,
    slots_BC,
    approximate_BC,
    marks_BC,
    counts_B,
    scores_Bk,
    found_Bk,
    chosen_Bk,
):
    """Score what is left in the buffers exactly and write the k best of each user, best first, smaller ids first.

    Args:
        weight_RD: as in `scan_tile`, like the next ones.
        ids_R: see there.
        interests_BKD: see there.
        margins_B: see there.
        fine_margins_B: float32, the same for scores approximated in float32.
        rounded: whether the approximate scores were bfloat16.
        slots_BC: see there.
        approximate_BC: see there.
        marks_BC: see there.
        counts_B: see there.
        scores_Bk: float32, receives the scores; places without an item are left as they are.
        found_Bk: int64, receives the ids.
        chosen_Bk: int64, receives the interests.
    """
    k = scores_Bk.shape[1]
    for b in range(len(counts_B)):
        slots_C, scores_C, marks_C, query_KD = slots_BC[b], approximate_BC[b], marks_BC[b], interests_BKD[b]
        count, margin = counts_B[b], margins_B[b]
        if rounded and fine_margins_B[b] < np.inf:  # else nothing is known in float32 either
            count, _ = _make_room(
                k, margin, _COARSE, query_KD, weight_RD, ids_R, slots_C, scores_C, marks_C, count
            )
            margin = fine_margins_B[b]
            _refine(query_KD, weight_RD, slots_C, scores_C, marks_C, count, margin)
        count, _ = _make_room(
            k, margin, np.float32(0.0), query_KD, weight_RD, ids_R, slots_C, scores_C, marks_C, count
        )
        count = _settle(query_KD, weight_RD, ids_R, slots_C, scores_C, marks_C, count, k)
        for c in range(count):
            scores_Bk[b, c], found_Bk[b, c], chosen_Bk[b, c] = scores_C[c], ids_R[slots_C[c]], -1 - marks_C[c]
