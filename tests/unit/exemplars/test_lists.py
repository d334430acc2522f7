"""Messages on lists of neighbours, on whole rows, and by the paper's equations: the same beliefs, round by round."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch

from distributed_mi.exemplars import kernels
from distributed_mi.exemplars.lists import ListMessages, NeighbourLists
from distributed_mi.exemplars.messages import DenseMessages, Messages, Reduce, TorchMessages
from distributed_mi.exemplars.neighbours import ExactNeighbours
from distributed_mi.exemplars.similarity import VectorSimilarities, similarity_matrix

ROUNDS = 20


class PaperMessages:
    """The equations of Frey and Dueck in float64, one number at a time."""

    def __init__(self, similarities_UU: np.ndarray, preferences_U: np.ndarray, damping: float) -> None:
        self.s = similarities_UU.astype(np.float64)
        np.fill_diagonal(self.s, preferences_U)
        self.r, self.a, self.damping = np.zeros_like(self.s), np.zeros_like(self.s), damping

    def round(self) -> np.ndarray:
        users = len(self.s)
        r, a = np.empty_like(self.r), np.empty_like(self.a)
        for i in range(users):
            for k in range(users):
                others = np.arange(users) != k
                r[i, k] = self.s[i, k] - (self.a[i] + self.s[i])[others].max()
        self.r = self.damping * self.r + (1 - self.damping) * r
        positive = np.maximum(self.r, 0.0)
        for i in range(users):
            for k in range(users):
                others = ~np.isin(np.arange(users), [i, k])
                total = positive[others, k].sum()
                a[i, k] = total if i == k else min(0.0, self.r[k, k] + total)
        self.a = self.damping * self.a + (1 - self.damping) * a
        return np.diag(self.r) + np.diag(self.a)


class MatrixMessages:
    """The same in matrices."""

    def __init__(self, similarities_UU: np.ndarray, preferences_U: np.ndarray, damping: float) -> None:
        self.s = similarities_UU.astype(np.float64)
        np.fill_diagonal(self.s, preferences_U)
        self.r, self.a, self.damping = np.zeros_like(self.s), np.zeros_like(self.s), damping

    def round(self) -> np.ndarray:
        values, users = self.a + self.s, np.arange(len(self.s))
        best = values.argmax(axis=1)
        first = values[users, best]
        values[users, best] = -np.inf
        r = self.s - first[:, None]
        r[users, best] = self.s[users, best] - values.max(axis=1)
        self.r = self.damping * self.r + (1 - self.damping) * r
        positive = np.maximum(self.r, 0.0)
        np.fill_diagonal(positive, np.diag(self.r))
        a = positive.sum(axis=0) - positive
        own = np.diag(a).copy()
        a = np.minimum(a, 0.0)
        np.fill_diagonal(a, own)
        self.a = self.damping * self.a + (1 - self.damping) * a
        return np.diag(self.r) + np.diag(self.a)


def vectors_of(rng: np.random.Generator, kind: str, users: int) -> torch.Tensor:
    if kind == "normal":
        points = rng.normal(size=(users, 5))
    elif kind == "blobs":
        points = rng.normal(size=(1 + users // 9, 4))[rng.integers(1 + users // 9, size=users)] * 6
        points += rng.normal(size=points.shape)
    elif kind == "duplicates":
        points = rng.normal(size=(1 + users // 3, 3))[rng.integers(1 + users // 3, size=users)]
    elif kind == "grid":
        points = rng.integers(0, 4, size=(users, 2)).astype(np.float64)
    else:
        points = rng.normal(size=(users, 1)) * rng.normal(size=(1, 3))
    return torch.from_numpy(points).float()


def list_messages(
    vectors: torch.Tensor,
    preferences: np.ndarray,
    damping: float,
    length: int = 4,
    rows: slice | None = None,
    reduce: Reduce | None = None,
) -> ListMessages:
    """Messages of some rows, all by default, with exact neighbours."""
    rows = rows or slice(0, len(vectors))
    source = ExactNeighbours(VectorSimilarities(vectors), rows.start)
    lists = source.lists(rows.stop - rows.start, length)
    return ListMessages(lists, len(vectors), rows.start, preferences[rows], damping, reduce, source=source)


def dense_messages(
    vectors: torch.Tensor,
    preferences: np.ndarray,
    damping: float,
    rows: slice | None = None,
    reduce: Reduce | None = None,
) -> DenseMessages:
    rows = rows or slice(0, len(vectors))
    matrix = similarity_matrix(vectors).numpy()[rows].copy()
    return DenseMessages(matrix, rows.start, preferences[rows], damping, reduce)


def assert_close(found: np.ndarray, wanted: np.ndarray, scale: float) -> None:
    """Equal up to float32 rounding of similarities of that size, added up over users and rounds."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6 * (scale + np.abs(wanted).max()))


@pytest.mark.parametrize("users", [2, 3, 9, 15])
@pytest.mark.parametrize("damping", [0.5, 0.8])
def test_all_equal_the_equations_of_the_paper(rng: np.random.Generator, users: int, damping: float) -> None:
    vectors = vectors_of(rng, "normal", users)
    matrix, preferences = similarity_matrix(vectors), -rng.uniform(1, 12, size=users)
    paper = PaperMessages(matrix.numpy(), preferences, damping)
    ours: list[Messages | MatrixMessages] = [
        MatrixMessages(matrix.numpy(), preferences, damping),
        dense_messages(vectors, preferences, damping),
        list_messages(vectors, preferences, damping, length=1),
        TorchMessages(matrix.clone(), preferences, damping),
    ]
    scale = float(matrix.abs().max()) + 12
    for _ in range(ROUNDS):
        wanted = paper.round()
        for passed in ours:
            assert_close(passed.round(), wanted, scale)


@pytest.mark.parametrize("kind", ["normal", "blobs", "duplicates", "grid", "line"])
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("preference", [-0.5, -8.0, -100.0])
def test_lists_and_whole_rows_equal_float64_round_by_round(
    rng: np.random.Generator, kind: str, length: int, preference: float
) -> None:
    vectors = vectors_of(rng, kind, 120)
    matrix, preferences = similarity_matrix(vectors), preference * rng.uniform(1.0, 1.1, size=120)
    reference = MatrixMessages(matrix.numpy(), preferences, 0.6)
    lists = list_messages(vectors, preferences, 0.6, length)
    ours = [dense_messages(vectors, preferences, 0.6), lists, TorchMessages(matrix.clone(), preferences, 0.6)]
    scale = float(matrix.abs().max()) - preference
    for _ in range(ROUNDS):
        wanted = reference.round()
        rounding = 3e-6 * (scale + np.abs(wanted).max())
        dense, of_lists, of_torch = (float(np.abs(passed.round() - wanted).max()) for passed in ours)
        # Far below the similarities rounding may grow from round to round until no float32 messages are near to those
        # in float64. Lists are then no further off than whole rows.
        assert of_lists <= rounding + 3 * max(dense, of_torch)
        if preference > -100.0:
            assert max(dense, of_torch) <= rounding
    assert lists.unproven == 0
    assert lists.lists.entries <= 120 * 119


def test_lists_that_must_grow_many_times(rng: np.random.Generator) -> None:
    """Ever lower preferences: each asks for further neighbours of most rows."""
    vectors = vectors_of(rng, "blobs", 150)
    preferences = np.full(150, -0.1)
    dense, lists = (
        dense_messages(vectors, preferences, 0.5),
        list_messages(vectors, preferences, 0.5, length=1),
    )
    scale = float(similarity_matrix(vectors).abs().max())
    sizes = []
    for step in range(10):
        preferences = -(3.0**step) * rng.uniform(0.1, 0.11, size=150)
        for passed in (dense, lists):
            passed.set_preferences(preferences)
        for _ in range(5):
            assert_close(lists.round(), dense.round(), scale + abs(preferences).max())
        sizes.append(lists.lists.entries)
    assert lists.grown > 2 * 150
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 5


def test_unlisted_pairs_follow_the_formulas_of_the_docstring(rng: np.random.Generator) -> None:
    """r(i,k) = (1 - d^t) s(i,k) - M(i) and a(i,k) = background(k), against whole rows that keep them all."""
    users, damping = 100, 0.7
    vectors = vectors_of(rng, "normal", users)
    preferences = -rng.uniform(3, 4, size=users)
    dense = dense_messages(vectors, preferences, damping)
    lists = list_messages(vectors, preferences, damping)
    similarities = similarity_matrix(vectors).numpy()
    reach_mean, background = np.zeros(users), np.zeros(users)
    for number in range(1, 31):
        background = damping * background + (1 - damping) * np.minimum(dense.column_sums_U, 0.0)
        dense.round()
        lists.round()
        first = np.maximum(dense._first_R, dense._second_R)
        reach_mean = damping * reach_mean + (1 - damping) * first
        unlisted = np.ones((users, users), dtype=bool)
        np.fill_diagonal(unlisted, False)
        for row in range(users):
            unlisted[row, lists.lists.columns_of(row)] = False
        assert unlisted.sum() > users * users / 4
        responsibilities = (1 - damping**number) * similarities - reach_mean[:, None]
        availabilities = np.broadcast_to(background, (users, users))
        np.testing.assert_allclose(
            dense.responsibilities_RU[unlisted], responsibilities[unlisted], rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(
            dense.availabilities_RU[unlisted], availabilities[unlisted], rtol=1e-4, atol=1e-4
        )
        # what follows from it: they reach nobody
        assert (dense.responsibilities_RU[unlisted] <= 1e-4).all()
        # and the numbers that lists keep instead
        np.testing.assert_allclose(lists.reach_mean_R, reach_mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(lists.background_U, background, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(lists.weight_R, 1 - damping**number)


def test_a_bound_that_equals_the_second_largest_value_asks_for_nothing() -> None:
    """Three equal points, preference 0: the row's second value is 0, the bound 0; one entry is enough."""
    similarities = VectorSimilarities(torch.zeros(3, 2))
    lists = ExactNeighbours(similarities).lists(3, 1)
    lists.bound_R[:] = 0.0
    passed = ListMessages(lists, 3, 0, np.zeros(3), 0.5, source=ExactNeighbours(similarities))
    passed.round()
    assert passed.grown == 0


def test_without_a_source_rows_are_counted_and_nothing_grows(rng: np.random.Generator) -> None:
    vectors = vectors_of(rng, "normal", 80)
    preferences = np.full(80, -15.0)
    with_source = list_messages(vectors, preferences, 0.5, length=3)
    without = list_messages(vectors, preferences, 0.5, length=3)
    without.source = None
    # the first round: all availabilities are 0, the second largest value follows from three neighbours and oneself
    with_source.round()
    without.round()
    similarities = similarity_matrix(vectors).numpy()
    np.fill_diagonal(similarities, -15.0)
    ordered = -np.sort(-similarities, axis=1)
    listed_second = np.where(ordered[:, 0] > -15.0, np.maximum(ordered[:, 1], -15.0), ordered[:, 0])
    # where oneself is the fourth, the fourth neighbour is left out
    short = [row for row in range(80) if without.lists.bound_R[row] > listed_second[row]]
    assert without.unproven == len(short)
    for _ in range(10):
        without.round()
    assert without.unproven > 0
    assert without.grown == 0
    assert without.lists.entries == 80 * 3
    for _ in range(10):
        with_source.round()
    assert with_source.unproven == 0
    assert with_source.grown > 0


def torch_messages(vectors: torch.Tensor, preferences: np.ndarray, damping: float) -> TorchMessages:
    return TorchMessages(similarity_matrix(vectors), preferences, damping)


MAKERS: dict[str, Callable[..., Messages]] = {
    "dense": dense_messages,
    "lists": list_messages,
    "torch": torch_messages,
}


@pytest.mark.parametrize("kind", ["dense", "lists", "torch"])
def test_a_run_that_is_restored_goes_on_with_the_same_bits(rng: np.random.Generator, kind: str) -> None:
    vectors = vectors_of(rng, "normal", 90)
    preferences = -rng.uniform(4, 9, size=90)
    run = MAKERS[kind](vectors, preferences, 0.6)
    for _ in range(7):
        run.round()
    state = {name: values.copy() for name, values in run.state().items()}
    wanted = [run.round() for _ in range(9)]
    other = MAKERS[kind](vectors, np.full(90, -1.0), 0.6)
    other.round()
    other.restore(state)
    assert {n: v.tobytes() for n, v in other.state().items()} == {n: v.tobytes() for n, v in state.items()}
    assert [b.tobytes() for b in wanted] == [other.round().tobytes() for _ in range(9)]
    # the state that was taken has not changed on the way
    again = MAKERS[kind](vectors, preferences, 0.6)
    again.restore(state)
    assert again.round().tobytes() == wanted[0].tobytes()


def test_a_warm_start_goes_on_from_the_messages_with_its_own_preferences(rng: np.random.Generator) -> None:
    vectors = vectors_of(rng, "normal", 90)
    first, then = -rng.uniform(4, 9, size=90), -rng.uniform(9, 20, size=90)
    source = ExactNeighbours(VectorSimilarities(vectors))
    lists = source.lists(90, 4)
    cold = ListMessages(lists, 90, 0, first, 0.6, source=source)
    dense = dense_messages(vectors, first, 0.6)
    for _ in range(10):
        cold.round()
        dense.round()
    warm = ListMessages(lists, 90, 0, then, 0.8, source=source)
    warm.warm_start(cold)
    # whole rows that are handed the same messages
    other = dense_messages(vectors, then, 0.8)
    other.restore(dense.state() | {"preferences": then})
    held = cold.responsibilities_M.copy()
    for _ in range(20):
        assert_close(warm.round(), other.round(), 50.0)
    assert np.array_equal(cold.responsibilities_M, held)


class Sum:
    """Adds up the column sums of ranges that do their rounds in threads of their own."""

    def __init__(self, ranges: int) -> None:
        self._barrier = threading.Barrier(ranges)
        self._sums: dict[int, np.ndarray] = {}

    def of(self, rank: int) -> Reduce:
        def reduce(sums: np.ndarray) -> np.ndarray:
            self._sums[rank] = sums
            self._barrier.wait(30)
            total = np.sum([self._sums[r] for r in sorted(self._sums)], axis=0)
            self._barrier.wait(30)
            return total

        return reduce


@pytest.mark.parametrize("kind", ["dense", "lists"])
@pytest.mark.parametrize("bounds", [[0, 40, 81], [0, 1, 30, 81]])
def test_ranges_of_rows_that_add_up_their_sums_equal_one(
    rng: np.random.Generator, kind: str, bounds: list[int]
) -> None:
    vectors = vectors_of(rng, "blobs", 81)
    preferences, later = -rng.uniform(4, 9, size=81), -rng.uniform(20, 30, size=81)
    whole = MAKERS[kind](vectors, preferences, 0.6)
    total = Sum(len(bounds) - 1)
    parts = [
        MAKERS[kind](vectors, preferences, 0.6, rows=slice(low, high), reduce=total.of(rank))
        for rank, (low, high) in enumerate(pairwise(bounds))
    ]
    assert [p.own for p in parts] == [slice(a, b) for a, b in pairwise(bounds)]
    with ThreadPoolExecutor(len(parts)) as threads:
        for number in range(30):
            if number == 15:
                for passed in (whole, *parts):
                    passed.set_preferences(later)
            belief = np.concatenate(list(threads.map(lambda part: part.round(), parts)))
            np.testing.assert_allclose(belief, whole.round(), rtol=1e-6, atol=1e-5)


def test_lists_of_equal_length() -> None:
    lists = NeighbourLists.of_equal_length(
        np.array([[1, 2], [0, 2], [0, 1]]), -np.arange(6.0).reshape(3, 2), np.array([-1.0, -3.0, -5.0])
    )
    assert (lists.rows, lists.entries) == (3, 6)
    assert lists.starts_R.tolist() == [0, 2, 4, 6]
    assert lists.columns_of(1).tolist() == [0, 2]
    assert (lists.columns_M.dtype, lists.similarities_M.dtype, lists.bound_R.dtype) == (
        np.int32,
        np.float32,
        np.float32,
    )


def test_lengthening_lists_of_some_rows(rng: np.random.Generator) -> None:
    counts, rows = rng.integers(0, 5, size=20), np.array([0, 3, 4, 11, 19])
    added = rng.integers(0, 4, size=5)
    extra = np.zeros(20, dtype=np.int64)
    extra[rows] = added
    starts, added_starts = (np.concatenate([[0], np.cumsum(c)]) for c in (counts, added))
    longer = np.concatenate([[0], np.cumsum(counts + extra)])
    old = rng.normal(size=starts[-1]).astype(np.float32)
    new = rng.normal(size=added_starts[-1]).astype(np.float32)
    found = np.concatenate([old, np.full(3 + added.sum(), np.nan, dtype=np.float32)])
    kernels.lengthen_lists(starts, found, rows, added_starts, new, longer)
    parts = [old[a:b] for a, b in pairwise(starts)]
    for n, row in enumerate(rows):
        parts[row] = np.concatenate([parts[row], new[added_starts[n] : added_starts[n + 1]]])
    np.testing.assert_array_equal(found[: longer[-1]], np.concatenate(parts))
    assert np.isnan(found[-3:]).all()


def test_a_belief_that_is_rounding_is_exactly_zero(rng: np.random.Generator) -> None:
    """Two equal users and a third far away: which of the two is an exemplar is undecided for ever."""
    vectors = torch.tensor([[0.3, 0.1], [0.3, 0.1], [90.0, 7.0]])
    preferences = np.full(3, -5.0)
    for passed in (dense_messages(vectors, preferences, 0.5), list_messages(vectors, preferences, 0.5, 1)):
        for _ in range(60):
            belief = passed.round()
        # two users at a distance of 0 are each other's exemplar as readily as their own: r(k,k) + a(k,k) -> 0
        assert belief[0] == belief[1]
        assert belief[2] > 0
