"""Neighbours against brute force: lists, bounds that must hold, growth, faiss indexes, edges both ways."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_mi.exemplars import neighbours as module
from distributed_mi.exemplars.lists import NeighbourLists
from distributed_mi.exemplars.neighbours import (
    ExactNeighbours,
    IndexNeighbours,
    NeighbourIndex,
    concatenate,
    measure,
    merge_found,
    nearest_lists,
    reverse_edges,
    with_edges,
)
from distributed_mi.exemplars.similarity import (
    MatrixSimilarities,
    Similarities,
    VectorSimilarities,
    row_blocks,
    similarity_matrix,
)

KINDS = ("normal", "duplicates", "grid", "far", "equal")


def vectors_of(rng: np.random.Generator, kind: str, users: int = 70) -> torch.Tensor:
    if kind == "normal":
        points = rng.normal(size=(users, 5))
    elif kind == "duplicates":
        points = rng.normal(size=(users // 5, 3))[rng.integers(users // 5, size=users)]
    elif kind == "grid":
        points = rng.integers(0, 4, size=(users, 2)).astype(np.float64)
    elif kind == "far":  # from the origin, in clusters far from each other: sums of squares drown in float32
        points = 1e3 * rng.integers(0, 5, size=(users, 1)) + rng.normal(size=(users, 4)) * 0.1 + 1e4
    else:
        points = np.full((users, 3), 0.7)
    return torch.from_numpy(points.astype(np.float32))


def exact(vectors: torch.Tensor) -> np.ndarray:
    """Similarities in float64 by the definition; -inf to oneself."""
    points = vectors.double().numpy()
    matrix = -np.square(points[:, None] - points[None]).sum(axis=2)
    np.fill_diagonal(matrix, -np.inf)
    return matrix


def check_bounds(lists: NeighbourLists, matrix: np.ndarray, first_row: int = 0) -> None:
    """Nobody outside of a list is more similar than its bound; nobody is listed twice, nor oneself."""
    for row in range(lists.rows):
        columns = lists.columns_of(row)
        assert len(set(columns.tolist())) == len(columns)
        assert first_row + row not in columns
        outside = np.setdiff1d(np.arange(matrix.shape[1]), [*columns, first_row + row])
        if len(outside):
            assert matrix[first_row + row, outside].max() <= lists.bound_R[row]
        listed = lists.similarities_M[lists.starts_R[row] : lists.starts_R[row + 1]]
        np.testing.assert_allclose(listed, matrix[first_row + row, columns], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 6, 68, 69])
def test_lists_hold_the_nearest(rng: np.random.Generator, kind: str, length: int) -> None:
    vectors = vectors_of(rng, kind)
    matrix = exact(vectors)
    lists = ExactNeighbours(VectorSimilarities(vectors)).lists(70, length)
    assert lists.entries == 70 * length
    check_bounds(lists, matrix)
    if length == 69:
        assert np.isneginf(lists.bound_R).all()
    if kind == "far":  # float32 cannot tell who is near here: the bounds above say so
        return
    # the wanted similarities, whoever of equals is taken
    wanted = -np.sort(-matrix, axis=1)[:, :length]
    found = -np.sort(-lists.similarities_M.reshape(70, length), axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_more_neighbours_than_users_are_all_users(rng: np.random.Generator) -> None:
    source = ExactNeighbours(VectorSimilarities(vectors_of(rng, "normal", 9)))
    lists = source.lists(9, 100)
    assert lists.entries == 9 * 8
    assert np.isneginf(lists.bound_R).all()
    assert all(set(lists.columns_of(row)) == set(range(9)) - {row} for row in range(9))


def test_one_user_has_no_neighbours() -> None:
    lists = ExactNeighbours(VectorSimilarities(torch.zeros(1, 2))).lists(1, 32)
    assert (lists.rows, lists.entries) == (1, 0)
    assert np.isneginf(lists.bound_R).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["vectors", "matrix"])
def test_a_range_of_rows(
    rng: np.random.Generator, kind: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = vectors_of(rng, kind)
    similarities: Similarities = VectorSimilarities(vectors)
    if of == "matrix":
        similarities = MatrixSimilarities(similarity_matrix(vectors))
    monkeypatch.setattr(module, "row_blocks", lambda rows, width: row_blocks(rows, width, 7 * width))
    told: list[int] = []
    lists = ExactNeighbours(similarities, 20).lists(33, 5, told.append)
    assert sum(told) == 33
    assert len(told) == 5
    check_bounds(lists, exact(vectors) if of == "vectors" else _hide(similarity_matrix(vectors)), 20)


def _hide(matrix: torch.Tensor) -> np.ndarray:
    return matrix.fill_diagonal_(-torch.inf).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_row", [0, 20])
def test_further_neighbours_leave_none_out_above_the_threshold(
    rng: np.random.Generator, kind: str, first_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = vectors_of(rng, kind)
    matrix = exact(vectors)
    source = ExactNeighbours(VectorSimilarities(vectors), first_row)
    lists = source.lists(70 - first_row, 3)
    monkeypatch.setattr(module, "row_blocks", lambda rows, width: row_blocks(rows, width, 4 * width))
    rows = np.flatnonzero(rng.random(70 - first_row) < 0.5)
    known = lists.take(rows)
    # thresholds among the similarities, at them, below all
    above = np.array(
        [rng.choice(matrix[first_row + row][np.isfinite(matrix[first_row + row])]) for row in rows]
    )
    above[::3] = -1e30
    above[1::5] = -np.inf
    further = source.further(rows, known, above)
    assert known.rows == further.rows == len(rows)
    for i, (row, bound, threshold) in enumerate(zip(rows, further.bound_R, above, strict=True)):
        old, new, values = lists.columns_of(row), further.columns_of(i), similarities_of(further, i)
        assert known.columns_of(i).tolist() == old.tolist()
        own = first_row + row
        everyone = [*old, *new, own]
        assert len(set(everyone)) == len(everyone)
        outside = np.setdiff1d(np.arange(70), everyone)
        assert (matrix[own, outside] <= threshold).all()
        assert (matrix[own, outside] <= bound).all()
        np.testing.assert_allclose(values, matrix[own, new], rtol=1e-6, atol=1e-12)
        assert np.isneginf(bound) == (len(outside) == 0)
        # the next call finds more than one: lists grow by a share
        assert len(new) >= 1 or len(outside) == 0


# indexes


@pytest.mark.parametrize("limit", [20_000, 100], ids=["flat", "cells"])
def test_an_index_finds_the_nearest(
    rng: np.random.Generator, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FLAT_LIMIT", limit)
    vectors = rng.normal(size=(600, 3)).astype(np.float32)
    matrix = -np.square(vectors[:, None].astype(np.float64) - vectors[None]).sum(axis=2)
    # 4 sqrt(600) = 97 cells; those who look into all of them miss nobody
    index = NeighbourIndex(vectors, first_row=50, probes=97)
    assert hasattr(index.index, "nprobe") == (limit == 100)
    columns, similarities = index.search(vectors[:40], 8)
    np.testing.assert_allclose(similarities, -np.sort(-matrix[:40], axis=1)[:, :8], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(matrix[:40], columns - 50, axis=1), similarities, rtol=1e-4, atol=1e-5
    )


def test_an_index_with_cells_finds_most_and_marks_what_it_does_not(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FLAT_LIMIT", 100)
    vectors = rng.normal(size=(600, 3)).astype(np.float32)
    matrix = -np.square(vectors[:, None] - vectors[None]).sum(axis=2)
    columns, similarities = NeighbourIndex(vectors, probes=16).search(vectors, 10)
    wanted = np.argsort(-matrix, axis=1)[:, :10]
    found = np.mean([len(set(a) & set(b)) for a, b in zip(columns, wanted, strict=True)]) / 10
    assert found >= 0.9
    # one cell of about six users does not hold 500
    columns, similarities = NeighbourIndex(vectors, probes=1).search(vectors, 500)
    missing = columns == -1
    assert missing.any(axis=1).all()
    assert np.isneginf(similarities[missing]).all()
    assert np.isfinite(similarities[~missing]).all()
    again = NeighbourIndex(vectors, probes=1).search(vectors, 500)
    assert np.array_equal(again[0], columns)


def test_an_index_gives_no_more_than_it_has(rng: np.random.Generator) -> None:
    index = NeighbourIndex(rng.normal(size=(3, 2)).astype(np.float32), first_row=10)
    columns, _ = index.search(np.zeros((2, 2), dtype=np.float32), 50)
    assert np.sort(columns, axis=1).tolist() == [[10, 11, 12]] * 2


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("kind", ["normal", "duplicates", "grid"])
def test_merged_shards_give_the_lists_of_brute_force(
    rng: np.random.Generator, kind: str, shards: int
) -> None:
    vectors = vectors_of(rng, kind)
    matrix = exact(vectors)
    cuts = [70 * s // shards for s in range(shards + 1)]
    indexes = [NeighbourIndex(vectors[low:high].numpy(), first_row=low) for low, high in pairwise(cuts)]
    own = np.arange(25, 60)
    lists = merge_found([i.search(vectors[own].numpy(), 7) for i in indexes], own, 6)
    assert np.diff(lists.starts_R).tolist() == [6] * 35
    wanted = -np.sort(-matrix[own], axis=1)[:, :6]
    found = -np.sort(-lists.similarities_M.reshape(35, 6), axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    for row in range(35):
        assert own[row] not in lists.columns_of(row)
        assert len(set(lists.columns_of(row).tolist())) == 6
        assert lists.bound_R[row] == lists.similarities_M[6 * row : 6 * row + 6].min()


def test_rows_for_which_few_were_found_have_short_lists() -> None:
    columns = np.array([[0, 4, -1], [7, -1, -1], [-1, -1, -1]])
    values = np.array([[0.0, -2.0, -np.inf], [-3.0, -np.inf, -np.inf], [-np.inf] * 3], dtype=np.float32)
    lists = merge_found([(columns, values)], np.array([0, 1, 2]), 2)
    assert lists.starts_R.tolist() == [0, 1, 2, 2]
    assert lists.columns_M.tolist() == [4, 7]
    # nothing is known of who else may be near to a row without a list
    assert lists.bound_R.tolist() == [-2.0, -3.0, 0.0]


def test_lists_from_one_index_in_blocks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = vectors_of(rng, "normal")
    index = NeighbourIndex(vectors.numpy())
    whole = nearest_lists(vectors.numpy(), index, slice(10, 63), 5)
    told: list[int] = []
    monkeypatch.setattr(module, "row_blocks", lambda rows, width, _: row_blocks(rows, width, 6 * width))
    parts = nearest_lists(vectors.numpy(), index, slice(10, 63), 5, told.append)
    assert told == [6] * 8 + [5]
    for name in ("starts_R", "columns_M", "bound_R"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    np.testing.assert_allclose(parts.similarities_M, whole.similarities_M, rtol=1e-5)
    check_nearest = exact(vectors)[10:63]
    wanted = np.argsort(-check_nearest, axis=1)[:, :5]
    assert whole.columns_M.reshape(53, 5).tolist() == wanted.tolist()


def test_ranges_one_after_the_other(rng: np.random.Generator) -> None:
    lists = ExactNeighbours(VectorSimilarities(vectors_of(rng, "normal")))
    whole = lists.lists(70, 4)
    source = ExactNeighbours(VectorSimilarities(vectors_of(np.random.default_rng(20240501), "normal")))
    parts = [source.lists(30, 4), ExactNeighbours(source.similarities, 30).lists(40, 4)]
    joined = concatenate(parts)
    np.testing.assert_array_equal(joined.starts_R, whole.starts_R)
    np.testing.assert_array_equal(joined.columns_M, whole.columns_M)


# edges


def similarities_of(lists: NeighbourLists, row: int) -> np.ndarray:
    return lists.similarities_M[lists.starts_R[row] : lists.starts_R[row + 1]]


def listing(columns: list[np.ndarray]) -> NeighbourLists:
    """Lists of which only the columns matter."""
    starts = np.cumsum([0] + [len(c) for c in columns])
    found = np.concatenate(columns).astype(np.int32)
    return NeighbourLists(starts, found, np.zeros(len(found), np.float32), np.zeros(len(columns), np.float32))


def lists_of(pairs: dict[tuple[int, int], float], rows: int, first_row: int) -> NeighbourLists:
    ordered = [sorted((c, s) for (r, c), s in pairs.items() if r == first_row + row) for row in range(rows)]
    starts = np.cumsum([0] + [len(o) for o in ordered])
    flat = [pair for o in ordered for pair in o]
    return NeighbourLists(
        starts.astype(np.int64),
        np.array([c for c, _ in flat], dtype=np.int32),
        np.array([s for _, s in flat], dtype=np.float32),
        np.full(rows, -1.0, dtype=np.float32),
    )


def pairs_of(lists: NeighbourLists, first_row: int) -> dict[tuple[int, int], float]:
    found = {}
    for row in range(lists.rows):
        for e in range(lists.starts_R[row], lists.starts_R[row + 1]):
            pair = (first_row + row, int(lists.columns_M[e]))
            assert pair not in found
            found[pair] = float(lists.similarities_M[e])
    return found


edge_sets = st.dictionaries(
    st.tuples(st.integers(3, 8), st.integers(0, 12)).filter(lambda pair: pair[0] != pair[1]),
    st.integers(-9, 0).map(float),
    max_size=30,
)


@settings(max_examples=80, deadline=None)
@given(old=edge_sets, added=st.lists(st.tuples(st.integers(3, 8), st.integers(0, 12)), max_size=30))
def test_added_edges_against_a_set(old: dict[tuple[int, int], float], added: list[tuple[int, int]]) -> None:
    """Rows 3 to 8 of 13 users; added pairs may be known already and may come twice, with the same similarity."""
    rows = np.array([r for r, _ in added], dtype=np.int64)
    columns = np.array([c for _, c in added], dtype=np.int32)
    values = np.array([-float(r + c) for r, c in added], dtype=np.float32)
    lists = with_edges(lists_of(old, 6, 3), 3, rows, columns, values)
    assert pairs_of(lists, 3) == {(r, c): -float(r + c) for r, c in added} | old
    assert lists.columns_M.dtype == np.int32
    assert lists.similarities_M.dtype == np.float32
    assert lists.bound_R.tolist() == [-1.0] * 6


@settings(max_examples=40, deadline=None)
@given(old=edge_sets)
def test_reversed_edges_against_a_set(old: dict[tuple[int, int], float]) -> None:
    rows, columns, values = reverse_edges(lists_of(old, 6, 3), 3)
    found = {(int(r), int(c)): float(v) for r, c, v in zip(rows, columns, values, strict=True)}
    assert found == {(c, r): s for (r, c), s in old.items()}


def test_a_graph_made_symmetric_is(rng: np.random.Generator) -> None:
    lists = ExactNeighbours(VectorSimilarities(vectors_of(rng, "duplicates"))).lists(70, 3)
    before = pairs_of(lists, 0)
    after = pairs_of(with_edges(lists, 0, *reverse_edges(lists, 0)), 0)
    assert after == before | {(c, r): s for (r, c), s in before.items()}


# growth from an index


def test_lists_from_an_index_double_up_to_the_limit(rng: np.random.Generator) -> None:
    vectors = vectors_of(rng, "normal")
    matrix = exact(vectors)
    index = NeighbourIndex(vectors.numpy())
    start = nearest_lists(vectors.numpy(), index, slice(0, 70), 4)
    source = IndexNeighbours(VectorSimilarities(vectors), index.search, 0, 10)
    known = {row: start.columns_of(row) for row in (3, 40, 41)}
    lengths = []
    for _ in range(3):
        rows = np.array(list(known))
        further = source.further(rows, listing(list(known.values())), np.full(3, -99.0))
        for i, (row, bound) in enumerate(zip(rows, further.bound_R, strict=True)):
            new, found = further.columns_of(i), similarities_of(further, i)
            np.testing.assert_allclose(found, matrix[row, new], rtol=1e-6)
            known[int(row)] = np.concatenate([known[int(row)], new])
            everyone = known[int(row)].tolist()
            assert len(set(everyone)) == len(everyone)
            nearest = np.argsort(-matrix[row])[: len(everyone)]
            assert set(everyone) == set(nearest.tolist())
            if len(new):
                assert bound == pytest.approx(matrix[row, nearest[-1]], rel=1e-4)
            else:
                assert np.isneginf(bound)
        lengths.append({len(k) for k in known.values()})
    assert lengths == [{8}, {10}, {10}]
    assert source.stopped == 3


def test_rows_of_a_range_and_of_different_lengths_grow_together(rng: np.random.Generator) -> None:
    vectors = vectors_of(rng, "duplicates")
    index = NeighbourIndex(vectors.numpy())
    source = IndexNeighbours(VectorSimilarities(vectors), index.search, 30, 8)
    rows, known = np.array([0, 5, 9]), [np.array([1], np.int32), np.array([2, 3, 4], np.int32), np.arange(8)]
    further = source.further(rows, listing(known), np.zeros(3))
    columns = [further.columns_of(i) for i in range(3)]
    values = [similarities_of(further, i) for i in range(3)]
    # 2, 6 and 8 entries are wanted: the nearest so many that are not listed yet, the last has enough
    assert len(columns[2]) == 0
    assert source.stopped == 1
    assert np.isneginf(further.bound_R[2])
    for i, most in ((0, 2), (1, 6)):
        own = 30 + int(rows[i])
        assert own not in columns[i]
        assert not set(columns[i].tolist()) & set(known[i].tolist())
        assert 1 <= len(columns[i]) <= most + 1
        np.testing.assert_allclose(values[i], exact(vectors)[own, columns[i]], rtol=1e-6, atol=1e-12)


def test_an_index_that_has_nothing_more_ends_the_growth() -> None:
    vectors = torch.arange(6.0)[:, None]

    def search(queries: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds everybody's two neighbours and no one else."""
        own = queries[:, 0].astype(np.int64)
        found = np.stack([own, own - 1, own + 1] + [np.full(len(own), -1)] * (length - 3), axis=1)
        values = np.where(found < 0, -np.inf, -np.square(found - own[:, None])).astype(np.float32)
        return found, values

    source = IndexNeighbours(VectorSimilarities(vectors), search, 0, 5)
    further = source.further(np.array([2]), listing([np.array([1, 3])]), np.array([-50.0]))
    assert further.starts_R.tolist() == [0, 0]
    assert len(further.columns_M) == len(further.similarities_M) == 0
    assert np.isneginf(further.bound_R[0])


def test_cells_in_order_change_no_list(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FLAT_LIMIT", 100)
    vectors = rng.normal(size=(600, 3)).astype(np.float32)
    index = NeighbourIndex(vectors, probes=97)
    order = index.order()
    assert order is not None
    assert sorted(order.tolist()) == list(range(600))
    _, cells = index.index.quantizer.search(vectors[order], 1)
    assert (np.diff(cells[:, 0]) >= 0).all()
    lists = nearest_lists(vectors, index, slice(100, 400), 5)
    matrix = exact(torch.from_numpy(vectors))[100:400]
    assert lists.columns_M.reshape(300, 5).tolist() == np.argsort(-matrix, axis=1)[:, :5].tolist()


def test_rows_asked_in_any_order_grow_alike(rng: np.random.Generator) -> None:
    vectors = vectors_of(rng, "normal")
    index = NeighbourIndex(vectors.numpy())
    start = nearest_lists(vectors.numpy(), index, slice(0, 70), 4)
    rows = np.array([2, 3, 40, 41, 69])
    found = [
        IndexNeighbours(VectorSimilarities(vectors), index.search, 0, 10, order).further(
            rows, start.take(rows), np.full(5, -99.0)
        )
        for order in (None, rng.permutation(70))
    ]
    assert pairs_of(found[0], 0) == pairs_of(found[1], 0)
    assert found[0].bound_R.tolist() == found[1].bound_R.tolist()


def test_measured_pairs_are_exact(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = vectors_of(rng, "normal")
    lists = ExactNeighbours(VectorSimilarities(vectors), 20).lists(33, 5)
    wanted = lists.similarities_M.copy()
    lists.similarities_M[:] = 0.0
    monkeypatch.setattr(module, "row_blocks", lambda rows, width: row_blocks(rows, width, 7 * width))
    measure(lists, VectorSimilarities(vectors), 20)
    assert lists.similarities_M.tolist() == wanted.tolist()
