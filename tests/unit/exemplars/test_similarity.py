"""Similarities: exactness, centring, bounded blocks; from vectors and from a matrix the same answers."""

import numpy as np
import pytest
import torch

from distributed_mi.exemplars import similarity
from distributed_mi.exemplars.similarity import (
    MatrixSimilarities,
    Similarities,
    Similarity,
    VectorSimilarities,
    row_blocks,
    similarity_matrix,
)


def test_equals_the_definition(rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(30, 5))
    wanted = -((vectors[:, None] - vectors[None]) ** 2).sum(axis=2)
    found = similarity_matrix(torch.from_numpy(vectors.astype(np.float32)))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_close_users_far_from_the_origin_keep_their_distance() -> None:
    # squared norms of 1e8, a squared distance of 1: float32 sums would lose it
    vectors = torch.tensor([[1e4, 0.0], [1e4 + 1.0, 0.0], [1e4, 2.0]])
    wanted = torch.tensor([[0.0, -1.0, -4.0], [-1.0, 0.0, -5.0], [-4.0, -5.0, 0.0]])
    torch.testing.assert_close(similarity_matrix(vectors), wanted, rtol=1e-6, atol=1e-6)


def test_equal_vectors_have_a_similarity_of_exactly_zero(rng: np.random.Generator) -> None:
    one = torch.from_numpy(rng.normal(size=(1, 384)).astype(np.float32)) * 30
    other = torch.from_numpy(rng.normal(size=(1, 384)).astype(np.float32))
    matrix = similarity_matrix(torch.cat([one, other, one]))
    assert matrix[0, 2] == 0.0
    assert matrix[0, 1] < 0.0


def test_blocks_change_nothing(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.from_numpy(rng.normal(size=(23, 4)).astype(np.float32))
    whole = similarity_matrix(vectors)
    monkeypatch.setattr(similarity, "row_blocks", lambda rows, width: row_blocks(rows, width, 3 * width))
    torch.testing.assert_close(similarity_matrix(vectors), whole)
    torch.testing.assert_close(Similarity(vectors).rows(vectors[4:9]), whole[4:9], rtol=1e-6, atol=1e-6)


def test_row_blocks_cover_every_row_once() -> None:
    assert list(row_blocks(7, 10, 30)) == [(0, 3), (3, 6), (6, 7)]
    assert list(row_blocks(2, 10**9, 1)) == [(0, 1), (1, 2)]
    assert list(row_blocks(0, 1)) == []


def both(vectors: torch.Tensor) -> list[Similarities]:
    """From vectors, and from a matrix whose diagonal is scratch."""
    matrix = similarity_matrix(vectors)
    matrix.fill_diagonal_(-torch.inf)
    return [VectorSimilarities(vectors), MatrixSimilarities(matrix)]


def definition(vectors: torch.Tensor) -> np.ndarray:
    points = vectors.double().numpy()
    return -np.square(points[:, None] - points[None]).sum(axis=2)


@pytest.mark.parametrize("kind", ["normal", "far"])
def test_every_question_against_the_definition(rng: np.random.Generator, kind: str) -> None:
    offset = 0.0 if kind == "normal" else 1e4
    vectors = torch.from_numpy(rng.normal(size=(40, 6)) + offset).float()
    wanted = definition(vectors)
    ids, exemplars = torch.tensor([3, 17, 0]), torch.tensor([2, 17, 30])
    own, others = np.array([1, 5, 5, 9]), np.array([2, 5, 39, 0], dtype=np.int32)
    for similarities in both(vectors):
        np.testing.assert_allclose(similarities.rows(ids).numpy(), wanted[ids], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            similarities.pairs(own[others != own], others[others != own]),
            wanted[own, others][others != own],
            rtol=1e-6,
        )
        found = similarities.to(ids, exemplars).numpy()
        found[1, 1] = 0.0  # its own: 0 or the preference
        np.testing.assert_allclose(found, wanted[np.ix_(ids, exemplars)], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(similarities.sums().numpy(), wanted.sum(axis=1), rtol=1e-6)
        similarities.rows(ids).fill_(7.0)  # the caller may write into it
        np.testing.assert_allclose(similarities.rows(ids).numpy(), wanted[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 64, 700])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_what_orders_like_similarities_is_off_by_no_more_than_it_says(
    rng: np.random.Generator, width: int, spread: float
) -> None:
    """Two clusters far from each other, each `spread` wide: the worst for float32 sums."""
    points = rng.normal(size=(80, width)) * spread + 1e3 * (np.arange(80) % 2)[:, None]
    vectors = torch.from_numpy(points).float()
    values, shift, error = VectorSimilarities(vectors).ordered_rows(torch.arange(80))
    off = (values.double() + shift.double()[:, None] - torch.from_numpy(definition(vectors))).abs()
    assert (off <= error.double()[:, None]).all()
    matrix = similarity_matrix(vectors)
    values, shift, error = MatrixSimilarities(matrix).ordered_rows(torch.arange(80))
    assert torch.equal(values, matrix)
    assert not shift.any()
    assert not error.any()


def test_pairs_of_equal_users_are_exactly_zero(rng: np.random.Generator) -> None:
    vectors = torch.from_numpy(rng.normal(size=(5, 384)) * 30).float().repeat(2, 1)
    similarities = VectorSimilarities(vectors)
    assert (similarities.pairs(np.arange(5), np.arange(5, 10)) == 0.0).all()
    assert len(similarities.pairs(np.empty(0, np.int64), np.empty(0, np.int32))) == 0


def test_similarities_to_exemplars_are_those_of_whole_rows(rng: np.random.Generator) -> None:
    """Bit for bit, so that a tie is one whatever is asked."""
    vectors = torch.from_numpy(rng.integers(0, 3, size=(60, 3))).float() + 0.1
    similarities = VectorSimilarities(vectors)
    ids = torch.arange(60)
    rows = similarities.rows(ids)
    for exemplars in (torch.tensor([1, 4, 30]), torch.tensor([0]), torch.tensor([5, 6, 7, 59])):
        assert torch.equal(similarities.to(ids, exemplars), rows[:, exemplars])


def test_the_central_member_by_hand(rng: np.random.Generator) -> None:
    # 0 1 2 3: mean 1.5, sums of squared distances 14 6 6 14: the first of the middles
    vectors = torch.tensor([[9.0], [0.0], [1.0], [50.0], [2.0], [3.0]])
    members, preferences = torch.tensor([1, 2, 4, 5]), torch.full((4,), -1.0, dtype=torch.float64)
    for similarities in both(vectors):
        assert similarities.central(members, preferences) == 1
        # 8.5 more make the last as good as 5.5
        better = preferences + torch.tensor([0.0, 0.0, 0.0, 8.5], dtype=torch.float64)
        assert similarities.central(members, better) == 3


def test_rows_are_kept_where_memory_allows_it(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = similarity.VectorSimilarities(torch.from_numpy(rng.normal(size=(50, 3)).astype(np.float32)))
    monkeypatch.setattr(similarity, "available_memory_bytes", lambda: 8 * 50 * 50)
    kept = similarity.kept_in_memory(made)
    assert isinstance(kept, similarity.MatrixSimilarities)
    torch.testing.assert_close(kept.rows(torch.arange(50)), made.rows(torch.arange(50)), rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(similarity, "available_memory_bytes", lambda: 8 * 50 * 50 - 1)
    assert similarity.kept_in_memory(made) is made
