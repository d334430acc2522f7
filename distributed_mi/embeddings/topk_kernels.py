"""Selection and exact scoring of top-k candidates, compiled.

A tile of approximate scores is read once: chunks without a score at the user's threshold are passed over, the few
others give candidates. Candidates wait in a buffer; when it is full, those below the threshold that has risen since
are thrown out, and where that is not enough (many ties) the buffer is scored exactly and cut to its k best. Scores in
the end are exact ones only, so they depend on nothing but the user's interests and the item's row.

The kernels release the interpreter's lock; each thread has users of its own.

Shapes:  B users, K interests, R rows held, t rows of a tile, D width, C places of a candidate buffer, M seen pairs.
"""

import numpy as np
from numba import njit

_CHUNK = 32
"""Scores of one interest that are compared with the threshold at once."""
_BITS = 62
"""Interests that have a bit of their own in a candidate's mark; later ones share the last."""


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def largest_norm(weight_RD):
    """Largest Euclidean norm of the rows, float64; NaN when a row is not finite."""
    largest = 0.0
    for row in range(len(weight_RD)):
        total = 0.0
        for d in range(weight_RD.shape[1]):
            total += np.float64(weight_RD[row, d]) * np.float64(weight_RD[row, d])
        if not total <= np.finfo(np.float64).max:
            return np.nan
        largest = max(largest, total)
    return np.sqrt(largest)


@njit(nogil=True, cache=True)
def _raise(best_t, scores_t):
    """Larger of two scores at each place; a loop of its own, because LLVM makes vector instructions of such only."""
    for place in range(len(best_t)):
        value, other = best_t[place], scores_t[place]
        best_t[place] = value if value > other else other


@njit(nogil=True, cache=True)
def _reaches(best_t, threshold):
    """How many scores are not below a threshold; vector instructions again."""
    count = np.int32(0)
    for place in range(len(best_t)):
        count += np.int32(not best_t[place] < threshold)
    return count


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
def _replace_smallest(heap_k, value):
    """Put a value in the place of the smallest of a heap."""
    place, size = 0, len(heap_k)
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and heap_k[child + 1] < heap_k[child]:
            child += 1
        if heap_k[child] >= value:
            break
        heap_k[place] = heap_k[child]
        place = child
    heap_k[place] = value


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
def _make_room(heap_k, margin, query_KD, weight_RD, ids_R, slots_C, scores_C, marks_C, count):
    """Throw out candidates that cannot be among the k best. Returns how many are left: at most half a buffer."""
    threshold = heap_k[0] - margin
    left = 0
    for c in range(count):
        if not scores_C[c] < threshold:
            slots_C[left], scores_C[left], marks_C[left] = slots_C[c], scores_C[c], marks_C[c]
            left += 1
    if 2 * left > len(slots_C):
        left = _settle(query_KD, weight_RD, ids_R, slots_C, scores_C, marks_C, left, len(heap_k))
    return left


@njit(nogil=True, cache=True)
def _mark(scores_Kt, place, threshold):
    """A bit for each interest whose approximate score is not below a threshold."""
    mark = 0
    for interest in range(len(scores_Kt)):
        if not scores_Kt[interest, place] < threshold:
            mark |= 1 << min(interest, _BITS - 1)
    return mark


@njit(nogil=True, cache=True)
def scan_tile(
    scores_BKt,
    first_slot,
    weight_RD,
    ids_R,
    interests_BKD,
    margins_B,
    seen_starts_B1,
    seen_M,
    heaps_Bk,
    slots_BC,
    approximate_BC,
    marks_BC,
    counts_B,
):
    """Take the candidates of a tile into the users' buffers.

    Args:
        scores_BKt: float32, approximate scores.
        first_slot: place of the tile's first row among the rows held.
        weight_RD: float32.
        ids_R: int64; id 0 is padding.
        interests_BKD: float32.
        margins_B: float32; an item whose approximate score is this far below the k-th best one cannot be among the
            k best. Infinite: nothing is known, all items are candidates. 0: all scores are 0, and the ids ascend.
        seen_starts_B1: int64, where each user's seen ids begin.
        seen_M: int64, ascending for each user.
        heaps_Bk: float32, heap of the k best approximate scores so far; -inf at first.
        slots_BC: int64, rows of the candidates; C at least 2 k + 2.
        approximate_BC: float32, their scores.
        marks_BC: int64; above 0 a bit for each interest that may give the score, below 0 the score is exact and
            `-1 - mark` gives it.
        counts_B: int64, candidates in each buffer; 0 at first.
    """
    users, interests, rows = scores_BKt.shape
    capacity = slots_BC.shape[1]
    best_t = np.empty(rows, np.float32)
    for b in range(users):
        margin, heap_k, scores_Kt = margins_B[b], heaps_Bk[b], scores_BKt[b]
        count = counts_B[b]
        threshold = heap_k[0] - margin
        best_t[:] = scores_Kt[0]
        for interest in range(1, interests):
            _raise(best_t, scores_Kt[interest])
        for start in range(0, rows, _CHUNK):
            stop = min(start + _CHUNK, rows)
            if _reaches(best_t[start:stop], threshold) == 0:
                continue
            for place in range(start, stop):
                score = best_t[place]
                if score < threshold:
                    continue
                slot = first_slot + place
                item = ids_R[slot]
                if item == 0 or _is_seen(seen_M, seen_starts_B1[b], seen_starts_B1[b + 1], item):
                    continue
                if count == capacity:
                    count = _make_room(
                        heap_k,
                        margin,
                        interests_BKD[b],
                        weight_RD,
                        ids_R,
                        slots_BC[b],
                        approximate_BC[b],
                        marks_BC[b],
                        count,
                    )
                if margin == 0.0 and count >= len(heap_k):  # all items tie, and these have the smallest ids
                    break
                slots_BC[b, count], approximate_BC[b, count] = slot, score
                marks_BC[b, count] = _mark(scores_Kt, place, score - margin)
                count += 1
                if score > heap_k[0]:
                    _replace_smallest(heap_k, score)
                    threshold = heap_k[0] - margin
        counts_B[b] = count


@njit(nogil=True, cache=True)
def finish(
    weight_RD,
    ids_R,
    interests_BKD,
    margins_B,
    heaps_Bk,
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
        heaps_Bk: see there.
        slots_BC: see there.
        approximate_BC: see there.
        marks_BC: see there.
        counts_B: see there.
        scores_Bk: float32, receives the scores; places without an item are left as they are.
        found_Bk: int64, receives the ids.
        chosen_Bk: int64, receives the interests.
    """
    k = heaps_Bk.shape[1]
    for b in range(len(counts_B)):
        slots_C, scores_C, marks_C = slots_BC[b], approximate_BC[b], marks_BC[b]
        count = _make_room(
            heaps_Bk[b],
            margins_B[b],
            interests_BKD[b],
            weight_RD,
            ids_R,
            slots_C,
            scores_C,
            marks_C,
            counts_B[b],
        )
        count = _settle(interests_BKD[b], weight_RD, ids_R, slots_C, scores_C, marks_C, count, k)
        for c in range(count):
            scores_Bk[b, c], found_Bk[b, c], chosen_Bk[b, c] = scores_C[c], ids_R[slots_C[c]], -1 - marks_C[c]
