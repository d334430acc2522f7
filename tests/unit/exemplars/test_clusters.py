"""Labels, the most central members, the last refinement; with lists and without, from vectors and from a matrix."""

import numpy as np
import pytest
import torch

from distributed_mi.exemplars import clusters as module
from distributed_mi.exemplars.clusters import is_fixed_point, label, most_central, net_similarity, refine
from distributed_mi.exemplars.neighbours import ExactNeighbours
from distributed_mi.exemplars.similarity import (
    MatrixSimilarities,
    Similarities,
    VectorSimilarities,
    row_blocks,
    similarity_matrix,
)

KINDS = ("normal", "duplicates", "grid", "line")


def vectors_of(rng: np.random.Generator, kind: str, users: int = 90) -> torch.Tensor:
    if kind == "normal":
        points = rng.normal(size=(users, 4))
    elif kind == "duplicates":
        points = rng.normal(size=(users // 4, 3))[rng.integers(users // 4, size=users)]
    elif kind == "grid":
        points = rng.integers(0, 5, size=(users, 2)).astype(np.float64)
    else:
        points = rng.integers(0, 99, size=(users, 1)) * np.ones((1, 2))
    return torch.from_numpy(points).float()


def exemplars_of(rng: np.random.Generator, users: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.sort(rng.choice(users, size=count, replace=False)))


def both(vectors: torch.Tensor) -> list[Similarities]:
    matrix = similarity_matrix(vectors)
    matrix.fill_diagonal_(-123.0)  # scratch: nobody looks at it
    return [VectorSimilarities(vectors), MatrixSimilarities(matrix)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 9, 90])
def test_labels_are_the_first_of_the_nearest(rng: np.random.Generator, kind: str, count: int) -> None:
    vectors, exemplars = vectors_of(rng, kind), exemplars_of(rng, 90, count)
    points = vectors.double()
    distances = (points[:, None] - points[None, exemplars]).square().sum(dim=2).numpy()
    wanted = distances.argmin(axis=1)
    wanted[exemplars] = np.arange(count)
    for similarities in both(vectors):
        labels, nearest = label(similarities, exemplars)
        if kind != "duplicates":  # whole numbers or nothing ties: float32 decides as float64 does
            assert labels.tolist() == wanted.tolist()
        np.testing.assert_allclose(nearest.numpy(), -distances[np.arange(90), wanted], rtol=1e-5, atol=1e-6)
        assert (nearest[exemplars] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5, 30, 89])
@pytest.mark.parametrize("count", [1, 9, 90])
def test_labels_with_lists_are_those_without(
    rng: np.random.Generator, kind: str, length: int, count: int
) -> None:
    vectors, exemplars = vectors_of(rng, kind), exemplars_of(rng, 90, count)
    similarities = VectorSimilarities(vectors)
    lists = ExactNeighbours(similarities).lists(90, length)
    without, nearest = label(similarities, exemplars)
    with_lists, also_nearest = label(similarities, exemplars, lists)
    assert with_lists.tolist() == without.tolist()
    torch.testing.assert_close(also_nearest, nearest, rtol=1e-6, atol=1e-6)


def test_with_lists_little_is_computed(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = vectors_of(rng, "normal")
    similarities = VectorSimilarities(vectors)
    asked: list[int] = []
    to = similarities.to
    monkeypatch.setattr(
        similarities, "to", lambda ids, exemplars: asked.append(len(ids)) or to(ids, exemplars)
    )
    exemplars = exemplars_of(rng, 90, 30)
    label(similarities, exemplars)
    assert sum(asked) == 60
    asked.clear()
    label(similarities, exemplars, ExactNeighbours(similarities).lists(90, 30))
    # a list of 30 of 89 lacks all of 30 exemplars for next to nobody
    assert sum(asked) < 6


def test_labels_in_blocks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, exemplars = vectors_of(rng, "grid"), exemplars_of(rng, 90, 9)
    whole = [label(s, exemplars) for s in both(vectors)]
    monkeypatch.setattr(module, "row_blocks", lambda rows, width: row_blocks(rows, width, 7 * width))
    for similarities, (labels, nearest) in zip(both(vectors), whole, strict=True):
        blocked = label(similarities, exemplars)
        assert torch.equal(blocked[0], labels)
        torch.testing.assert_close(blocked[1], nearest)


@pytest.mark.parametrize("kind", ["normal", "grid"])
def test_the_most_central_member_is_nearest_to_the_mean(rng: np.random.Generator, kind: str) -> None:
    vectors = vectors_of(rng, kind)
    labels = torch.from_numpy(rng.integers(0, 7, size=90))
    preferences = torch.full((90,), -3.0, dtype=torch.float64)
    wanted = []
    for cluster in range(7):
        members = (labels == cluster).nonzero().flatten()
        points = vectors[members].double()
        distances = (points - points.mean(dim=0)).square().sum(dim=1)
        # the first of those at the same distance
        wanted.append(int(members[(distances <= distances.min() + 1e-9).nonzero()[0, 0]]))
    assert most_central(VectorSimilarities(vectors), labels, 7, preferences).tolist() == sorted(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_matrix_agree(rng: np.random.Generator, kind: str) -> None:
    vectors, exemplars = vectors_of(rng, kind), exemplars_of(rng, 90, 8)
    preferences = torch.from_numpy(-rng.uniform(1, 5, size=90))
    of_vectors, of_matrix = (refine(s, exemplars, preferences) for s in both(vectors))
    assert of_vectors[0].tolist() == of_matrix[0].tolist()
    assert of_vectors[1].tolist() == of_matrix[1].tolist()
    assert of_vectors[2] == pytest.approx(of_matrix[2], rel=1e-6)


def test_the_lowest_of_equally_central_members_is_taken() -> None:
    # a square: all corners are at the same distance from the middle; a pair; three equal points
    square = torch.tensor([[1.3, 1.3], [0.3, 1.3], [1.3, 0.3], [0.3, 0.3]])
    pair = torch.tensor([[50.1, 0.0], [50.4, 0.0]])
    equal = torch.full((3, 2), -40.7)
    vectors = torch.cat([square, pair, equal])
    labels = torch.tensor([0] * 4 + [1] * 2 + [2] * 3)
    preferences = torch.full((9,), -1.0, dtype=torch.float64)
    assert most_central(VectorSimilarities(vectors), labels, 3, preferences).tolist() == [0, 4, 6]
    whole = MatrixSimilarities(similarity_matrix((vectors * 10).round()))
    assert most_central(whole, labels, 3, preferences).tolist() == [0, 4, 6]


def test_the_preference_counts_as_similarity_to_oneself() -> None:
    """Points 0 1 2: 1 is the middle, sums -5 -2 -5. A preference that is 4 better makes 2 as good as -1."""
    vectors, labels = torch.arange(3.0)[:, None], torch.zeros(3, dtype=torch.int64)
    for similarities in both(vectors):
        for extra, wanted in ((2.9, 1), (3.1, 2)):
            preferences = torch.tensor([-9.0, -9.0, -9.0 + extra], dtype=torch.float64)
            assert most_central(similarities, labels, 1, preferences).tolist() == [wanted]


def test_refinement_takes_the_member_nearest_to_the_mean() -> None:
    vectors = torch.tensor([[0.0], [1.0], [5.0], [20.0]])
    preferences = torch.full((4,), -100.0, dtype=torch.float64)
    for similarities in both(vectors):
        # cluster of exemplar 0 is {0, 1, 5}: mean 2, nearest member 1
        exemplars, labels, net = refine(similarities, torch.tensor([0, 3]), preferences)
        assert exemplars.tolist() == [1, 3]
        assert labels.tolist() == [0, 0, 0, 1]
        assert net == pytest.approx(-1 - 16 - 200)
        assert is_fixed_point(similarities, exemplars, labels, preferences)
        assert not is_fixed_point(similarities, torch.tensor([0, 3]), labels, preferences)


def test_net_similarity_by_hand() -> None:
    nearest = torch.tensor([0.0, -1.0, -2.5, 0.0])
    preferences = torch.tensor([-10.0, -20.0, -30.0, -40.0], dtype=torch.float64)
    assert net_similarity(nearest, torch.tensor([0, 3]), preferences) == -53.5
    assert nearest.tolist() == [0.0, -1.0, -2.5, 0.0]
