"""Similarity blocks: exactness, centring, bounded blocks."""

import numpy as np
import pytest
import torch

from distributed_mi.exemplars import similarity
from distributed_mi.exemplars.similarity import Similarity, row_blocks, similarity_matrix


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


def test_available_memory_is_read() -> None:
    available = similarity.available_memory_bytes()
    assert available is None or available > 1 << 20
