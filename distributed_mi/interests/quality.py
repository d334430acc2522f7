"""How good interests are, without a judge: what their users did later, and how the interests of one user differ.

Semantic score. A user's later item i is scored by the interests S_u that are the user's, and by those of N random
other exemplars; the same item for all of them, so that items that fit everybody help nobody:

    score(u, i)        = max over s in S_u of cos(s, title vector of i)
    rank_percentile    = share of the N others with a lower score, ties counted half     1 best, 0.5 by chance
    hit@k, mrr         of the rank among the N + 1, ties broken at random: the expected value is taken

averaged over a user's later items first, then over users. When the interest sets are exchanged at random between the
exemplars, each rank is equally likely whatever the sets and the items are, so that the levels of `chance` are exact.

Sets of different sizes are no such exchange: more interests give a higher maximum, so that a user with many ranks high
for any item. Over all exemplars, each counted once, that cancels. Over members it does not, because the exemplars of
large clusters have more interests than others: GPT-3.5's texts for MovieLens-100K gave members 0.68 without knowing
anything of them. Therefore each score is also taken of the same interests for the later items of another user, who has
another exemplar (`swapped`), and

    lift  =  score - swapped score            0 by chance, whatever the sizes of the sets

is the number to compare populations and backends by. Items that the user has are left out of the other's later items,
as those of the history are left out of its own.

What the score does not see: whether a text reads well, and whether it says why. It rewards words that stand in titles,
so a method that quotes titles has an advantage over one that describes.

Shapes:  E exemplars, R interest vectors of all, T text width, V items, U users, S later items of all, n later items of
one user, N others, M metrics.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distributed_mi.core.seeding import stream
from distributed_mi.interests.resampling import Floats, Ints

Vectors = NDArray[np.float32]

HITS = (1, 10)
"""Ranks at which hits are counted."""
SEMANTIC = ("rank_percentile", *(f"hit@{k}" for k in HITS), "mrr")
"""Names of the semantic scores."""
NEAR_DUPLICATE = 0.95
"""Cosine above which two interests of a user say the same."""

_TIE = 1e-6
"""Scores closer than this are equal: float32 products of equal vectors may differ by their place in a matrix."""
_ITEMS_AT_ONCE = 1024
"""Later items scored at once; with 100 exemplars of 20 interests that is 8 MB."""


@dataclass(frozen=True)
class InterestVectors:
    """The interests of all exemplars as unit vectors, exemplar by exemplar; each exemplar has at least one.

    Args:
        user_index_E: int64, ascending.
        vectors_RT: float32, of length 1; a zero vector stays zero.
        offsets: int64 `[E + 1]`, where each exemplar's vectors begin and end.
    """

    user_index_E: Ints
    vectors_RT: Vectors
    offsets: Ints

    @classmethod
    def build(cls, user_index_R: NDArray[Any], vectors_RT: NDArray[Any]) -> Self:
        """From one row per interest, in any order.

        Raises:
            ValueError: no interests, numbers of rows that differ, or a value that is not finite.
        """
        if not len(vectors_RT) or vectors_RT.ndim != 2 or len(user_index_R) != len(vectors_RT):
            raise ValueError(
                f"needs one vector for each interest; got {vectors_RT.shape} for {len(user_index_R)} interests"
            )
        if not np.isfinite(vectors_RT).all():
            raise ValueError("interest vectors hold values that are not finite")
        order = np.argsort(user_index_R, kind="stable")
        users, starts = np.unique(np.asarray(user_index_R, dtype=np.int64)[order], return_index=True)
        return cls(users, _unit(vectors_RT[order]), np.append(starts, len(order)).astype(np.int64))

    @property
    def num_exemplars(self) -> int:
        """E."""
        return len(self.user_index_E)

    @property
    def counts(self) -> Ints:
        """Interests of each exemplar."""
        return np.diff(self.offsets)

    def of(self, place: int) -> Vectors:
        """Vectors of the exemplar at a place of `user_index_E`."""
        return self.vectors_RT[self.offsets[place] : self.offsets[place + 1]]

    def places(self, user_index_U: Ints) -> Ints:
        """Where exemplars stand in `user_index_E`.

        Raises:
            ValueError: one of them has no interests.
        """
        places = np.minimum(np.searchsorted(self.user_index_E, user_index_U), self.num_exemplars - 1)
        missing = user_index_U[self.user_index_E[places] != user_index_U]
        if len(missing):
            raise ValueError(
                f"{len(missing)} users inherit from exemplars without interests, first {missing[0]}"
            )
        return places.astype(np.int64)

    def scores(self, places: Ints, items_nT: Vectors) -> NDArray[np.float32]:
        """The highest cosine of each item with an interest of each of some exemplars, `[n, len(places)]`.

        Args:
            places: of the exemplars.
            items_nT: unit vectors.
        """
        counts = self.counts[places]
        bounds = np.cumsum(counts) - counts
        rows = np.repeat(self.offsets[places] - bounds, counts) + np.arange(counts.sum())
        return np.maximum.reduceat(items_nT @ self.vectors_RT[rows].T, bounds, axis=1)


def _unit(rows: NDArray[Any]) -> Vectors:
    rows = np.asarray(rows, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


@dataclass(frozen=True)
class LaterItems:
    """What some users did later.

    Args:
        user_index_U: int64.
        exemplar_U: int64, `user_index` of the exemplar whose interests each user has: itself, or another.
        rows: int64 `[S]`, rows of the matrix of item vectors, user by user.
        offsets: int64 `[U + 1]`.
        known: rows of the items that each user has, earlier or later.
    """

    user_index_U: Ints
    exemplar_U: Ints
    rows: Ints
    offsets: Ints
    known: Sequence[Collection[int]]

    @classmethod
    def build(
        cls,
        users: Sequence[int],
        exemplars: Sequence[int],
        rows: Sequence[Sequence[int]],
        history: Sequence[Collection[int]] | None = None,
    ) -> Self:
        """From one entry per user; a user may have no later items. `history`: rows of the items before them."""
        before: Sequence[Collection[int]] = history or [()] * len(rows)
        return cls(
            np.asarray(users, dtype=np.int64),
            np.asarray(exemplars, dtype=np.int64),
            np.fromiter((i for r in rows for i in r), dtype=np.int64),
            np.cumsum([0, *(len(r) for r in rows)], dtype=np.int64),
            [frozenset(r).union(b) for r, b in zip(rows, before, strict=True)],
        )

    def of(self, place: int) -> Ints:
        """Rows of the later items of one user."""
        return self.rows[self.offsets[place] : self.offsets[place + 1]]

    def unknown_to(self, place: int, other: int) -> Ints:
        """Rows of the later items of `other` that the user at `place` does not have."""
        return np.array([i for i in self.of(other).tolist() if i not in self.known[place]], dtype=np.int64)

    def partners(self, seed: int) -> Ints:
        """For each user another one with later items and another exemplar, -1 where there is none.

        Users stand in a circle, in an order that depends on the seed and their indices alone; the partner is the next
        that will do.
        """
        found = np.full(len(self.user_index_U), -1, dtype=np.int64)
        circle = sorted(
            np.flatnonzero(self.counts).tolist(),
            key=lambda u: stream(seed, "interests/quality/circle", int(self.user_index_U[u])).random(),
        )
        exemplars = self.exemplar_U[circle]
        for n, u in enumerate(circle):
            others = np.flatnonzero(np.roll(exemplars, -n) != exemplars[n])
            if len(others):
                found[u] = circle[(n + int(others[0])) % len(circle)]
        return found

    @property
    def counts(self) -> Ints:
        """Later items of each user."""
        return np.diff(self.offsets)


def later_items(events: Sequence[int], num_history: int) -> list[int]:
    """Distinct items after the first `num_history` events, in order, without those that stand among them."""
    seen = set(events[:num_history])
    return [i for i in dict.fromkeys(events[num_history:]) if i not in seen]


def chance(num_others: int) -> dict[str, float]:
    """The semantic scores of interests that know nothing, with so many others; empty when there are none."""
    if num_others < 1:
        return {}
    total = num_others + 1
    values = [0.5, *(min(k, total) / total for k in HITS), float(_harmonic(total)[total]) / total]
    return dict(zip(SEMANTIC, values, strict=True))


def _harmonic(count: int) -> Floats:
    """`[count + 1]`: element r is 1 + 1/2 + ... + 1/r."""
    return np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, count + 1))])


def rank_scores(own_n: NDArray[Any], others_nN: NDArray[Any]) -> Floats:
    """The semantic scores of single items: own score against those of at least one other.

    Returns:
        float64 `[n, M]`, columns as in `SEMANTIC`.
    """
    num_others = others_nN.shape[1]
    above = (others_nN > own_n[:, None] + _TIE).sum(axis=1)
    equal = (np.abs(others_nN - own_n[:, None]) <= _TIE).sum(axis=1)
    harmonic = _harmonic(num_others + 1)
    hits = [np.clip(k - above, 0, equal + 1) / (equal + 1) for k in HITS]
    mrr = (harmonic[above + equal + 1] - harmonic[above]) / (equal + 1)
    return np.stack([1.0 - (above + 0.5 * equal) / num_others, *hits, mrr], axis=1)


def draw_others(num_exemplars: int, own: int, count: int, *, seed: int, user_index: int) -> Ints:
    """Places of `count` different exemplars, none of them `own`; a function of seed and user alone."""
    drawn = stream(seed, "interests/quality", user_index).choice(num_exemplars - 1, count, replace=False)
    return (drawn + (drawn >= own)).astype(np.int64)


@dataclass(frozen=True)
class SemanticScores:
    """Semantic scores per user; NaN for users without later items.

    Args:
        num_others: N; 0 when there is one exemplar, with which nothing can be compared: then all is NaN.
        own: metric -> float64 `[U]`, the user's interests for the user's later items.
        swapped: the same interests for the later items of another user, among the same others; NaN also where no user
            has another exemplar, or where the user has all items of the other.
        random: interests of one of the others for the user's later items, ranked among the same N + 1: what inheriting
            from anyone would give. Below chance by what `own` is above it, divided by N.
    """

    num_others: int
    own: dict[str, Floats]
    swapped: dict[str, Floats]
    random: dict[str, Floats]

    @property
    def lift(self) -> dict[str, Floats]:
        """Metric -> own minus swapped; names end in `_lift`."""
        return {f"{m}_lift": self.own[m] - self.swapped[m] for m in self.own}


def semantic_scores(
    interests: InterestVectors,
    later: LaterItems,
    items_VT: NDArray[Any],
    *,
    num_others: int = 99,
    seed: int = 7,
) -> SemanticScores:
    """How well the users' interests fit their later items, in comparison with the interests of random others.

    The others of a user depend on seed, user and the list of exemplars only: two backends that answered for the same
    exemplars are compared with the same others, and with the same swaps.

    Args:
        interests: of all exemplars.
        later: users with their later items.
        items_VT: text vectors, on any scale.
        num_others: N at most; there are never more than the exemplars but one.
        seed: of the draws.

    Raises:
        ValueError: an exemplar without interests, or vectors of another width.
    """
    if items_VT.ndim != 2 or items_VT.shape[1] != interests.vectors_RT.shape[1]:
        raise ValueError(
            f"items have vectors {items_VT.shape}, interests {interests.vectors_RT.shape}: widths differ"
        )
    count = max(min(num_others, interests.num_exemplars - 1), 0)
    found_3UM = np.full((3, len(later.user_index_U), len(SEMANTIC)), np.nan)
    places = interests.places(later.exemplar_U)
    partners = later.partners(seed)
    for u in np.flatnonzero(later.counts) if count else ():
        others = draw_others(
            interests.num_exemplars, places[u], count, seed=seed, user_index=int(later.user_index_U[u])
        )
        candidates = np.append(places[u], others)
        own, random = _mean_ranks(interests, candidates, items_VT, later.of(u))
        found_3UM[0, u], found_3UM[2, u] = own, random
        if partners[u] >= 0 and len(rows := later.unknown_to(u, partners[u])):
            found_3UM[1, u] = _mean_ranks(interests, candidates, items_VT, rows)[0]
    return SemanticScores(count, *(dict(zip(SEMANTIC, f.T, strict=True)) for f in found_3UM))


def _mean_ranks(
    interests: InterestVectors, candidates: Ints, items_VT: NDArray[Any], rows: Ints
) -> tuple[Floats, Floats]:
    """Semantic scores of the first and of the second candidate among all, mean over some items, `[M]` each."""
    sums = np.zeros((2, len(SEMANTIC)))
    for low in range(0, len(rows), _ITEMS_AT_ONCE):
        scores = interests.scores(candidates, _unit(items_VT[rows[low : low + _ITEMS_AT_ONCE]]))
        sums[0] += rank_scores(scores[:, 0], scores[:, 1:]).sum(axis=0)
        sums[1] += rank_scores(scores[:, 1], np.delete(scores, 1, axis=1)).sum(axis=0)
    return sums[0] / len(rows), sums[1] / len(rows)


def coverage(support: Sequence[Collection[int]], history: Sequence[Collection[int]]) -> Floats:
    """Share of each user's distinct history items that some interest names as support; NaN for an empty history.

    Args:
        support: items named by the interests of each user; others than those of the history do not count.
        history: items that the interests were made from.

    Returns:
        float64 `[U]`.
    """
    pairs = ((set(named), set(items)) for named, items in zip(support, history, strict=True))
    return np.array([len(a & b) / len(b) if b else np.nan for a, b in pairs], dtype=np.float64)


def distinctness(interests: InterestVectors, places: Ints | None = None) -> dict[str, Floats]:
    """How different the interests of one exemplar are.

    Args:
        interests: of all exemplars.
        places: which exemplars; None: all.

    Returns:
        float64 `[len(places)]` each. `distinctness`: 1 - mean cosine of two different interests, NaN for an exemplar
        with one. `near_duplicates`: share of the interests that have another one with a cosine above 0.95.
    """
    chosen = np.arange(interests.num_exemplars) if places is None else places
    out = np.full((2, len(chosen)), np.nan)
    for row, place in enumerate(chosen):
        vectors = interests.of(place)
        m = len(vectors)
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -np.inf)
        out[1, row] = (cosines.max(axis=1) > NEAR_DUPLICATE).mean()
        if m > 1:
            np.fill_diagonal(cosines, 0.0)
            out[0, row] = 1.0 - cosines.sum(dtype=np.float64) / (m * (m - 1))
    return {"distinctness": out[0], "near_duplicates": out[1]}
