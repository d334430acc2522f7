"""Greedy facility location against the definition, and its lazy shortcut against the plain greedy one."""

import numpy as np
import pytest
import torch

from distributed_mi.exemplars.facility import greedy_facility_location
from distributed_mi.exemplars.similarity import MatrixSimilarities, VectorSimilarities, similarity_matrix


def plain_greedy(similarities: np.ndarray, count: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(count):
        values = [
            -np.inf if k in chosen else similarities[:, [*chosen, k]].max(axis=1).sum()
            for k in range(len(similarities))
        ]
        chosen.append(int(np.argmax(values)))
    return sorted(chosen)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_equals_the_plain_greedy_choice(rng: np.random.Generator, count: int) -> None:
    vectors = torch.from_numpy(rng.normal(size=(40, 3))).float()
    matrix = similarity_matrix(vectors)
    wanted = plain_greedy(matrix.numpy().astype(np.float64), count)
    assert greedy_facility_location(VectorSimilarities(vectors), count).tolist() == wanted
    assert greedy_facility_location(MatrixSimilarities(matrix), count).tolist() == wanted


def test_by_hand_and_with_preferences_on_the_diagonal() -> None:
    """Points 0 1 2 and 10 11 12: sums of squared distances 370 304 250 250 304 370.

    The first of the equal ones is point 2. Then point 11 saves 63 + 81 + 99, more than 10 (64 + 80 + 96) does.
    """
    vectors = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    matrix = similarity_matrix(vectors)
    matrix.fill_diagonal_(-77.0)
    for similarities in (MatrixSimilarities(matrix), VectorSimilarities(vectors)):
        assert greedy_facility_location(similarities, 1).tolist() == [2]
        assert greedy_facility_location(similarities, 2).tolist() == [2, 4]
    assert (matrix.diagonal() == -77.0).all()


def test_duplicates_and_every_user() -> None:
    assert greedy_facility_location(VectorSimilarities(torch.zeros(4, 2)), 4).tolist() == [0, 1, 2, 3]


def test_tells_about_each_choice(rng: np.random.Generator) -> None:
    similarities = VectorSimilarities(torch.from_numpy(rng.normal(size=(9, 2))).float())
    calls: list[int] = []
    greedy_facility_location(similarities, 5, on_choice=lambda: calls.append(1))
    assert len(calls) == 5


@pytest.mark.parametrize("count", [0, 4])
def test_a_number_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 3"):
        greedy_facility_location(MatrixSimilarities(torch.zeros(3, 3)), count)
