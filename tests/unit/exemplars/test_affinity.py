"""Affinity propagation: hand cases, degenerate input, determinism, what happens without convergence."""

import math

import numpy as np
import pytest
import torch

from distributed_mi.exemplars import affinity
from distributed_mi.exemplars.affinity import affinity_propagation, fit
from distributed_mi.exemplars.similarity import similarity_matrix


def blobs(rng: np.random.Generator, centres: int = 4, each: int = 10, width: int = 3) -> torch.Tensor:
    middle = rng.normal(size=(centres, 1, width)) * 20
    return torch.from_numpy((middle + rng.normal(size=(centres, each, width))).reshape(-1, width)).float()


def test_two_triples_on_a_line_by_hand() -> None:
    """Points 0 1 2 and 10 11 12. With the middles as exemplars four users are 1 away: -4 plus two preferences of -5."""
    result = affinity_propagation(torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]]), -5.0)
    assert result.exemplars_E.tolist() == [1, 4]
    assert result.labels_U.tolist() == [0, 0, 0, 1, 1, 1]
    assert result.converged
    assert result.net_similarity == pytest.approx(-4 - 10)
    assert result.preference == -5.0


def test_the_example_of_scikit_learns_documentation() -> None:
    vectors = torch.tensor([[1, 2], [1, 4], [1, 0], [4, 2], [4, 4], [4, 0]], dtype=torch.float32)
    result = affinity_propagation(vectors, "median")
    assert result.exemplars_E.tolist() == [0, 3]
    assert result.labels_U.tolist() == [0, 0, 0, 1, 1, 1]


def test_one_user_is_his_own_exemplar() -> None:
    result = affinity_propagation(torch.ones(1, 4), -10.0)
    assert (result.exemplars_E.tolist(), result.labels_U.tolist()) == ([0], [0])
    assert result.converged
    assert result.rounds == 0


@pytest.mark.parametrize(("preference", "wanted"), [(-3.0, [0, 1]), (-5.0, [0])])
def test_two_users(preference: float, wanted: list[int]) -> None:
    # squared distance 4: together when a preference costs more
    assert affinity_propagation(torch.tensor([[0.0], [2.0]]), preference).exemplars_E.tolist() == wanted


def test_all_users_equal() -> None:
    result = affinity_propagation(torch.full((5, 3), 0.1), -1.0)
    assert result.exemplars_E.tolist() == [0]
    assert result.net_similarity == -1.0
    assert len(affinity_propagation(torch.full((5, 3), 0.1), 1.0).exemplars_E) == 5


def test_preference_above_every_similarity_makes_everyone_an_exemplar(rng: np.random.Generator) -> None:
    result = affinity_propagation(blobs(rng), 0.0)
    assert result.exemplars_E.tolist() == list(range(40))
    assert result.labels_U.tolist() == list(range(40))


def test_preference_far_below_leaves_the_one_nearest_to_the_mean(rng: np.random.Generator) -> None:
    vectors = torch.from_numpy(rng.normal(size=(60, 3))).float()
    result = affinity_propagation(vectors, -1000.0, damping=0.9, max_iter=1000)
    nearest = int((vectors - vectors.mean(dim=0)).square().sum(dim=1).argmin())
    assert result.converged
    assert result.exemplars_E.tolist() == [nearest]


def test_duplicates_share_the_lowest_of_them() -> None:
    vectors = torch.tensor([[0.0, 0.0], [5.0, 5.0]]).repeat(4, 1)
    result = affinity_propagation(vectors, -1.0)
    assert result.exemplars_E.tolist() == [0, 1]
    assert result.labels_U.tolist() == [0, 1] * 4
    assert result.net_similarity == -2.0


def test_a_preference_for_each_user_decides_who_is_an_exemplar() -> None:
    vectors = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    preferences = torch.tensor([-2.0, -50.0, -50.0, -50.0, -50.0, -2.0])
    result = affinity_propagation(vectors, preferences)
    # 0 and 12 are cheap enough to beat the middles: each costs 1 + 4 in distance and 2, a middle 2 and 50
    assert result.exemplars_E.tolist() == [0, 5]
    assert result.net_similarity == pytest.approx(-14.0)


def test_blocks_change_nothing(rng: np.random.Generator) -> None:
    vectors = blobs(rng)
    whole = affinity_propagation(vectors, -30.0)
    for rows in (1, 7, 1000):
        blocked = affinity_propagation(vectors, -30.0, block_rows=rows)
        assert blocked.exemplars_E.tolist() == whole.exemplars_E.tolist()
        assert blocked.labels_U.tolist() == whole.labels_U.tolist()


def test_the_same_input_gives_the_same_result(rng: np.random.Generator) -> None:
    vectors = torch.from_numpy(rng.integers(0, 3, size=(80, 2))).float()
    first, second = (affinity_propagation(vectors, -1.0) for _ in range(2))
    assert first.exemplars_E.tolist() == second.exemplars_E.tolist()
    assert (first.rounds, first.net_similarity) == (second.rounds, second.net_similarity)


def test_given_similarities_are_used_and_left_as_they_were(rng: np.random.Generator) -> None:
    vectors = blobs(rng)
    matrix = similarity_matrix(vectors)
    before = matrix.clone()
    from_matrix = affinity_propagation(None, -30.0, similarities=matrix)
    assert from_matrix.labels_U.tolist() == affinity_propagation(vectors, -30.0).labels_U.tolist()
    torch.testing.assert_close(matrix, before, rtol=0, atol=0)


def test_median_is_the_default_of_scikit_learn(rng: np.random.Generator) -> None:
    vectors = blobs(rng)
    median = float(np.median(similarity_matrix(vectors).numpy()))
    assert affinity_propagation(vectors, None).preference == pytest.approx(median)
    assert affinity_propagation(vectors, "median").preference == pytest.approx(median)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_vector_is_refused_and_its_row_is_named(bad: float) -> None:
    vectors = torch.zeros(4, 2)
    vectors[2, 1] = bad
    with pytest.raises(ValueError, match="user row 2"):
        affinity_propagation(vectors, -1.0)


@pytest.mark.parametrize("damping", [0.49, 1.0, -1.0, math.nan])
def test_damping_out_of_range_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be in"):
        affinity_propagation(torch.zeros(3, 1), -1.0, damping=damping)


def test_other_bad_input_is_refused() -> None:
    vectors = torch.arange(3.0)[:, None]
    with pytest.raises(ValueError, match="at least one user"):
        affinity_propagation(torch.zeros(0, 3), -1.0)
    with pytest.raises(ValueError, match="square"):
        affinity_propagation(None, -1.0, similarities=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="row 0 has a NaN"):
        affinity_propagation(None, -1.0, similarities=torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="needs vectors_UD or similarities"):
        affinity_propagation(None, -1.0)
    with pytest.raises(ValueError, match="one for each of 3 users"):
        affinity_propagation(vectors, torch.zeros(2))
    with pytest.raises(ValueError, match="preference"):
        affinity_propagation(vectors, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_iter"):
        affinity_propagation(vectors, -1.0, max_iter=0)


def test_without_convergence_the_best_so_far_is_returned_and_flagged(rng: np.random.Generator) -> None:
    vectors = blobs(rng)
    result = affinity_propagation(vectors, -30.0, max_iter=6)
    assert not result.converged
    assert result.rounds == 6
    assert len(result.exemplars_E) >= 1
    assert result.labels_U.shape == (40,)
    assert result.labels_U[result.exemplars_E].tolist() == list(range(len(result.exemplars_E)))


def test_without_any_exemplar_the_central_user_is_taken(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = torch.from_numpy(rng.normal(size=(30, 3))).float()
    monkeypatch.setattr(affinity._Messages, "round", lambda self: torch.zeros(30, dtype=torch.bool))
    result = affinity_propagation(vectors, -5.0, max_iter=20)
    nearest = int((vectors - vectors.mean(dim=0)).square().sum(dim=1).argmin())
    assert not result.converged
    assert result.exemplars_E.tolist() == [nearest]


def test_fit_raises_the_damping_until_it_converges(rng: np.random.Generator) -> None:
    similarities = similarity_matrix(blobs(rng))
    started: list[tuple[float, int]] = []
    rounds: list[tuple[int, int]] = []

    def on_attempt(damping: float, max_iter: int) -> affinity.OnRound:
        started.append((damping, max_iter))
        return lambda exemplars, changed: rounds.append((exemplars, changed))

    schedule = [(0.5, 3), (0.7, 200), (0.9, 400)]
    result, attempts = fit(similarities, -30.0, schedule=schedule, on_attempt=on_attempt)
    assert result.converged
    assert result.damping == 0.7
    assert [a.converged for a in attempts] == [False, True]
    assert started == schedule[:2]
    assert len(rounds) == 3 + result.rounds
    assert rounds[-1] == (len(result.exemplars_E), 0)


def test_fit_keeps_the_best_attempt_when_none_converges(rng: np.random.Generator) -> None:
    similarities = similarity_matrix(blobs(rng))
    result, attempts = fit(similarities, -30.0, schedule=[(0.5, 4), (0.7, 4), (0.9, 4)])
    assert not result.converged
    assert len(attempts) == 3
    assert result.net_similarity == max(a.net_similarity for a in attempts)


def test_refinement_takes_the_member_nearest_to_the_mean() -> None:
    vectors = torch.tensor([[0.0], [1.0], [5.0], [20.0]])
    similarities = similarity_matrix(vectors)
    similarities.fill_diagonal_(-100.0)
    # cluster of exemplar 0 is {0, 1, 5}: mean 2, nearest member 1
    exemplars, labels, net = affinity.refine(similarities, torch.tensor([0, 3]))
    assert exemplars.tolist() == [1, 3]
    assert labels.tolist() == [0, 0, 0, 1]
    assert net == pytest.approx(-1 - 16 - 200)


def test_convergence_is_not_declared_before_scikit_learn_would(rng: np.random.Generator) -> None:
    # everyone is an exemplar from the first round on, yet convergence_iter + 1 rounds are done
    assert affinity_propagation(blobs(rng), 0.0, convergence_iter=15).rounds == 16
    assert affinity_propagation(blobs(rng), 0.0, convergence_iter=3).rounds == 4


def test_the_number_of_threads_changes_no_bit(rng: np.random.Generator) -> None:
    similarities = similarity_matrix(torch.from_numpy(rng.normal(size=(150, 8)).astype(np.float32)))
    similarities.fill_diagonal_(-20.0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            messages = affinity._Messages(similarities, 0.5, None)
            for _ in range(12):
                messages.round()
            results.append((messages.responsibilities, messages.availabilities, messages.column_sums))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
