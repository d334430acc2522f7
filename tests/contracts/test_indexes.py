"""What is asked of every file in `serving/indexes/`."""

import numpy as np
import pytest

from distributed_mi.core.errors import InputError
from distributed_mi.core.registry import choices, resolve
from distributed_mi.serving.indexes.base import ItemIndex

DIM, NUM_ITEMS = 6, 200


@pytest.fixture(params=choices("index"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str, dim: int = DIM) -> ItemIndex:
    owner = resolve("index", name)
    return owner(owner.Config(), dim)


@pytest.fixture
def items(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    ids = rng.permutation(NUM_ITEMS * 3)[:NUM_ITEMS] + 1
    return ids, rng.standard_normal((NUM_ITEMS, DIM)).astype(np.float32)


def test_scores_are_inner_products_in_descending_order(name: str, items, rng) -> None:
    ids, vectors = items
    index = make(name)
    index.add(ids, vectors)
    queries = rng.standard_normal((5, DIM)).astype(np.float32)
    scores, found = index.search(queries, 7)
    assert index.num_items == NUM_ITEMS
    assert scores.shape == found.shape == (5, 7)
    assert (scores.dtype, found.dtype) == (np.float32, np.int64)
    assert (np.diff(scores, axis=1) <= 0).all()
    row_of = {int(i): r for r, i in enumerate(ids)}
    for query, row_scores, row_ids in zip(queries, scores, found, strict=True):
        assert len(set(row_ids)) == 7
        expected = [vectors[row_of[int(i)]] @ query for i in row_ids]
        np.testing.assert_allclose(row_scores, expected, rtol=1e-5)


def test_finds_nearly_all_of_the_true_top(name: str, items, rng) -> None:
    ids, vectors = items
    index = make(name)
    index.add(ids, vectors)
    queries = rng.standard_normal((20, DIM)).astype(np.float32)
    _, found = index.search(queries, 10)
    truth = ids[np.argsort(-(queries @ vectors.T), axis=1)[:, :10]]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])
    assert recall == 1.0 if name == "exact" else recall >= 0.9


def test_places_beyond_the_items_are_empty(name: str) -> None:
    index = make(name)
    scores, found = index.search(np.ones((1, DIM), np.float32), 2)
    assert found.tolist() == [[0, 0]]
    assert np.isneginf(scores).all()
    index.add(np.array([4]), np.ones((1, DIM), np.float32))
    scores, found = index.search(np.ones((2, DIM), np.float32), 3)
    assert found.tolist() == [[4, 0, 0]] * 2
    assert scores[:, 0].tolist() == [DIM, DIM]
    assert np.isneginf(scores[:, 1:]).all()


def test_items_added_in_parts_are_found(name: str, items) -> None:
    ids, vectors = items
    parts, whole = make(name), make(name)
    whole.add(ids, vectors)
    parts.add(ids[:50], vectors[:50])
    parts.add(ids[50:], vectors[50:])
    for a, b in zip(parts.search(vectors[:3], 5), whole.search(vectors[:3], 5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_queries_give_no_rows(name: str, items) -> None:
    index = make(name)
    index.add(*items)
    scores, found = index.search(np.zeros((0, DIM), np.float32), 4)
    assert scores.shape == found.shape == (0, 4)


def test_ties_go_to_the_smaller_id() -> None:
    index = make("exact")
    index.add(np.array([9, 3, 5, 1]), np.array([[1, 0, 0, 0, 0, 0]] * 3 + [[0.5, 0, 0, 0, 0, 0]], np.float32))
    _, found = index.search(np.array([[2, 0, 0, 0, 0, 0]], np.float32), 2)
    assert found.tolist() == [[3, 5]]


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([0], np.ones((1, DIM)), "item id 0"),
        ([1, 2], np.ones((1, DIM)), "2 ids but vectors"),
        ([1], np.ones((1, DIM + 1)), "width must be 6"),
        ([7], np.full((1, DIM), np.nan), "vector of item 7"),
        ([5, 5], np.ones((2, DIM)), "item id 5 is added twice"),
    ],
)
def test_bad_items_are_refused(name: str, ids: list[int], vectors: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(name).add(np.array(ids), vectors.astype(np.float32))
