"""Affinity propagation: hand cases, degenerate input, certificate, determinism, what happens without convergence."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch

from distributed_mi.exemplars import affinity, messages, problem
from distributed_mi.exemplars.affinity import AffinityResult, affinity_propagation, fit, settle
from distributed_mi.exemplars.lists import ListMessages, ListsTooLongError
from distributed_mi.exemplars.messages import DenseMessages, Messages, TorchMessages
from distributed_mi.exemplars.neighbours import ExactNeighbours
from distributed_mi.exemplars.problem import LocalProblem, Solver, SparseProblem
from distributed_mi.exemplars.similarity import VectorSimilarities, similarity_matrix

SOLVERS: tuple[Solver, ...] = ("lists", "dense", "torch")
LINE = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])

every_solver = pytest.mark.parametrize("solver", SOLVERS)


def blobs(rng: np.random.Generator, centres: int = 4, each: int = 10, width: int = 3) -> torch.Tensor:
    middle = rng.normal(size=(centres, 1, width)) * 20
    return torch.from_numpy((middle + rng.normal(size=(centres, each, width))).reshape(-1, width)).float()


def normal(rng: np.random.Generator, users: int, width: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(users, width))).float()


def nearest_to_mean(vectors: torch.Tensor) -> int:
    return int((vectors - vectors.mean(dim=0)).square().sum(dim=1).argmin())


def same(first: AffinityResult, second: AffinityResult) -> bool:
    return torch.equal(first.exemplars_E, second.exemplars_E) and torch.equal(first.labels_U, second.labels_U)


@every_solver
def test_two_triples_on_a_line_by_hand(solver: Solver) -> None:
    """Points 0 1 2 and 10 11 12. With the middles as exemplars four users are 1 away: -4 plus two preferences of -5."""
    result = affinity_propagation(LINE, -5.0, solver=solver)
    assert result.exemplars_E.tolist() == [1, 4]
    assert result.labels_U.tolist() == [0, 0, 0, 1, 1, 1]
    assert result.converged
    assert result.net_similarity == pytest.approx(-4 - 10)
    assert result.preference == -5.0
    assert result.damping == 0.5
    assert result.share == pytest.approx(2 / 6)


def test_the_example_of_scikit_learns_documentation() -> None:
    vectors = torch.tensor([[1, 2], [1, 4], [1, 0], [4, 2], [4, 4], [4, 0]], dtype=torch.float32)
    result = affinity_propagation(vectors, "median")
    assert result.exemplars_E.tolist() == [0, 3]
    assert result.labels_U.tolist() == [0, 0, 0, 1, 1, 1]


@every_solver
def test_one_user_is_his_own_exemplar(solver: Solver) -> None:
    for preference in (-10.0, 10.0):
        result = affinity_propagation(torch.ones(1, 4), preference, solver=solver)
        assert (result.exemplars_E.tolist(), result.labels_U.tolist()) == ([0], [0])
        assert result.converged
        assert result.rounds == 0
        assert result.net_similarity == preference
    assert affinity_propagation(torch.ones(1, 4), "median").preference == 0.0


@every_solver
@pytest.mark.parametrize(("preference", "wanted"), [(-3.0, [0, 1]), (-5.0, [0])])
def test_two_users(solver: Solver, preference: float, wanted: list[int]) -> None:
    # squared distance 4: together when a preference costs more
    result = affinity_propagation(torch.tensor([[0.0], [2.0]]), preference, solver=solver)
    assert result.exemplars_E.tolist() == wanted


@every_solver
def test_two_users_with_preferences_of_their_own(solver: Solver) -> None:
    # one exemplar of -6 and a distance of 4 beats one of -7, and both: -13
    result = affinity_propagation(torch.tensor([[0.0], [2.0]]), torch.tensor([-7.0, -6.0]), solver=solver)
    assert (result.exemplars_E.tolist(), result.labels_U.tolist()) == ([1], [0, 0])
    assert result.net_similarity == pytest.approx(-10.0)


@every_solver
def test_all_users_equal(solver: Solver) -> None:
    result = affinity_propagation(torch.full((5, 3), 0.1), -1.0, solver=solver)
    assert result.exemplars_E.tolist() == [0]
    assert result.labels_U.tolist() == [0] * 5
    assert result.net_similarity == -1.0
    assert len(affinity_propagation(torch.full((5, 3), 0.1), 1.0, solver=solver).exemplars_E) == 5


@every_solver
def test_users_equally_far_from_each_other_are_one_cluster_or_none(solver: Solver) -> None:
    # corners of a simplex, all squared distances 2: scikit-learn compares the preference with the similarity
    assert affinity_propagation(torch.eye(7), -2.5, solver=solver).exemplars_E.tolist() == [0]
    assert affinity_propagation(torch.eye(7), -1.5, solver=solver).exemplars_E.tolist() == list(range(7))


@every_solver
def test_preference_above_every_similarity_makes_everyone_an_exemplar(
    rng: np.random.Generator, solver: Solver
) -> None:
    result = affinity_propagation(blobs(rng), 0.0, solver=solver)
    assert result.exemplars_E.tolist() == list(range(40))
    assert result.labels_U.tolist() == list(range(40))
    assert result.share == 1.0


@every_solver
def test_preference_far_below_leaves_the_one_nearest_to_the_mean(
    rng: np.random.Generator, solver: Solver
) -> None:
    vectors = normal(rng, 60, 3)
    result = affinity_propagation(vectors, -1000.0, damping=0.9, max_iter=1000, solver=solver)
    assert result.converged
    assert result.exemplars_E.tolist() == [nearest_to_mean(vectors)]


@every_solver
def test_duplicates_share_the_lowest_of_them(solver: Solver) -> None:
    vectors = torch.tensor([[0.0, 0.0], [5.0, 5.0]]).repeat(4, 1)
    result = affinity_propagation(vectors, -1.0, solver=solver)
    assert result.exemplars_E.tolist() == [0, 1]
    assert result.labels_U.tolist() == [0, 1] * 4
    assert result.net_similarity == -2.0


@every_solver
def test_a_preference_for_each_user_decides_who_is_an_exemplar(solver: Solver) -> None:
    preferences = torch.tensor([-2.0, -50.0, -50.0, -50.0, -50.0, -2.0])
    result = affinity_propagation(LINE, preferences, solver=solver)
    # 0 and 12 are cheap enough to beat the middles: each costs 1 + 4 in distance and 2, a middle 2 and 50
    assert result.exemplars_E.tolist() == [0, 5]
    assert result.net_similarity == pytest.approx(-14.0)
    assert result.preference == pytest.approx(float(preferences.mean()))


def best_by_trying_all(vectors: torch.Tensor, preferences: torch.Tensor) -> tuple[list[int], float]:
    """The exemplars with the highest net similarity among all sets of users."""
    matrix, best = similarity_matrix(vectors).double().numpy(), ([0], -math.inf)
    users = range(len(vectors))
    for count in range(1, len(vectors) + 1):
        for chosen in map(list, itertools.combinations(users, count)):
            nearest = matrix[:, chosen].max(axis=1)
            nearest[chosen] = preferences[chosen]
            if nearest.sum() > best[1]:
                best = chosen, float(nearest.sum())
    return best


@every_solver
def test_finds_the_best_of_all_sets_of_exemplars_with_preferences_per_user(solver: Solver) -> None:
    """11 users: 2,047 sets. Max-sum is a heuristic; on separated clusters it finds the optimum."""
    rng = np.random.default_rng(5)
    vectors = blobs(rng, centres=3, each=4)[:11]
    preferences = torch.from_numpy(-rng.uniform(5, 15, size=11))
    result = affinity_propagation(vectors, preferences, solver=solver)
    exemplars, net = best_by_trying_all(vectors, preferences)
    assert result.exemplars_E.tolist() == exemplars
    assert result.net_similarity == pytest.approx(net, rel=1e-6)


@pytest.mark.parametrize("users", [90, 250])
def test_solvers_agree_on_preferences_per_user(rng: np.random.Generator, users: int) -> None:
    vectors = normal(rng, users, 4)
    preferences = torch.from_numpy(-rng.uniform(2, 9, size=users))
    results = [affinity_propagation(vectors, preferences, damping=0.7, solver=s) for s in SOLVERS]
    assert results[0].converged
    assert 1 < len(results[0].exemplars_E) < users
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert results[0].rounds == results[1].rounds
    assert results[0].net_similarity == pytest.approx(results[1].net_similarity, rel=1e-6)
    assert results[0].pairs < results[1].pairs == users**2


def test_the_same_input_gives_the_same_result(rng: np.random.Generator) -> None:
    vectors = torch.from_numpy(rng.integers(0, 3, size=(80, 2))).float()
    first, second = (affinity_propagation(vectors, -1.0) for _ in range(2))
    assert same(first, second)
    assert (first.rounds, first.net_similarity) == (second.rounds, second.net_similarity)


def test_numpy_and_float64_vectors_are_taken(rng: np.random.Generator) -> None:
    vectors = blobs(rng)
    wanted = affinity_propagation(vectors, -30.0)
    assert same(affinity_propagation(vectors.numpy(), -30.0), wanted)
    assert same(affinity_propagation(vectors.double(), -30.0), wanted)


def test_given_similarities_are_used_and_left_as_they_were(rng: np.random.Generator) -> None:
    vectors = blobs(rng)
    matrix = similarity_matrix(vectors)
    matrix.fill_diagonal_(-77.0)
    before = matrix.clone()
    for solver in ("auto", *SOLVERS):
        from_matrix = affinity_propagation(None, -30.0, similarities=matrix, solver=solver)
        assert same(from_matrix, affinity_propagation(vectors, -30.0))
        torch.testing.assert_close(matrix, before, rtol=0, atol=0)


def test_similarities_need_not_be_symmetric() -> None:
    """Users 1 and 2 are like 0, who is like nobody: only 0 can be their exemplar."""
    matrix = torch.full((3, 3), -20.0)
    matrix[1:, 0] = -1.0
    for solver in SOLVERS:
        result = affinity_propagation(None, -5.0, similarities=matrix, solver=solver)
        assert result.exemplars_E.tolist() == [0]
        assert result.net_similarity == pytest.approx(-7.0)


def test_median_is_the_default_of_scikit_learn(rng: np.random.Generator) -> None:
    vectors = blobs(rng)
    median = float(np.median(similarity_matrix(vectors).numpy()))
    assert affinity_propagation(vectors, None).preference == pytest.approx(median)
    assert affinity_propagation(vectors, "median").preference == pytest.approx(median)


@every_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_vector_is_refused_and_its_row_is_named(bad: float, solver: Solver) -> None:
    vectors = torch.zeros(4, 2)
    vectors[2, 1] = bad
    with pytest.raises(ValueError, match="user row 2 has a NaN or an infinity"):
        affinity_propagation(vectors, -1.0, solver=solver)
    with pytest.raises(ValueError, match="user row 2"):
        SparseProblem(vectors)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_similarity_is_refused_and_its_row_is_named(bad: float) -> None:
    matrix = torch.zeros(3, 3)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match="row 1 has a NaN"):
        affinity_propagation(None, -1.0, similarities=matrix)


@pytest.mark.parametrize("damping", [0.49, 1.0, -1.0, math.nan])
def test_damping_out_of_range_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be in"):
        affinity_propagation(torch.zeros(3, 1), -1.0, damping=damping)


@every_solver
@pytest.mark.parametrize("damping", [0.5, 0.999])
def test_damping_at_its_limits(damping: float, solver: Solver) -> None:
    result = affinity_propagation(LINE, -5.0, damping=damping, max_iter=20_000, solver=solver)
    assert result.exemplars_E.tolist() == [1, 4]


def test_other_bad_input_is_refused() -> None:
    vectors = torch.arange(3.0)[:, None]
    with pytest.raises(ValueError, match="at least one user"):
        affinity_propagation(torch.zeros(0, 3), -1.0)
    with pytest.raises(ValueError, match=r"\[users, width\]"):
        affinity_propagation(torch.zeros(3), -1.0)
    with pytest.raises(ValueError, match=r"square matrix, got shape \[3, 4\]"):
        affinity_propagation(None, -1.0, similarities=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="square matrix"):
        affinity_propagation(None, -1.0, similarities=torch.zeros(0, 0))
    with pytest.raises(ValueError, match="float32"):
        affinity_propagation(None, -1.0, similarities=torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="needs vectors_UD or similarities"):
        affinity_propagation(None, -1.0)
    with pytest.raises(ValueError, match="one for each of 3 users"):
        affinity_propagation(vectors, torch.zeros(2))
    with pytest.raises(ValueError, match="preference"):
        affinity_propagation(vectors, "mean")  # type: ignore[arg-type]
    for counts in ({"max_iter": 0}, {"convergence_iter": 0}):
        with pytest.raises(ValueError, match="max_iter and convergence_iter"):
            affinity_propagation(vectors, -1.0, **counts)
    with pytest.raises(ValueError, match="neighbours must be at least 1"):
        SparseProblem(vectors, neighbours=0)


def test_more_neighbours_than_users_are_all_users(rng: np.random.Generator) -> None:
    vectors = blobs(rng)
    with SparseProblem(vectors, neighbours=1000) as sparse:
        assert sparse.pairs == 40 * 39
        result = settle(sparse, torch.full((40,), -30.0, dtype=torch.float64), damping=0.5)
    assert same(result, affinity_propagation(vectors, -30.0))


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_users_on_a_graph(count: int) -> None:
    vectors = torch.tensor([[0.0], [2.0]])[:count]
    with SparseProblem(vectors) as sparse:
        result = settle(sparse, torch.full((count,), -5.0, dtype=torch.float64), damping=0.5)
    assert result.exemplars_E.tolist() == [0]
    assert result.labels_U.tolist() == [0] * count


# certificate


@every_solver
def test_the_certificate_of_a_converged_result(rng: np.random.Generator, solver: Solver) -> None:
    seen: list[tuple[int, int]] = []
    result = affinity_propagation(
        blobs(rng),
        -30.0,
        solver=solver,
        on_round=lambda exemplars, changed: seen.append((exemplars, changed)),
    )
    assert result.converged
    assert len(seen) == result.rounds
    certificate = result.certificate
    assert set(certificate.changes) == {0}
    assert certificate.oscillating_users == 0
    assert certificate.fixed_point
    assert certificate.proven
    assert certificate.unproven_rows == 0


def test_the_changes_are_those_that_were_told(rng: np.random.Generator) -> None:
    seen: list[int] = []
    result = affinity_propagation(
        normal(rng, 80, 3),
        -4.0,
        max_iter=9,
        convergence_iter=15,
        on_round=lambda _, changed: seen.append(changed),
    )
    assert not result.converged
    # the first round has none before it
    assert result.certificate.changes == tuple(seen[1:])


class Scripted(Messages):
    """Beliefs written down by hand, repeated for ever."""

    def __init__(self, beliefs: list[list[float]]) -> None:
        super().__init__(len(beliefs[0]), 0, np.zeros(len(beliefs[0])), 0.5)
        self.beliefs = itertools.cycle(beliefs)

    def round(self) -> np.ndarray:
        return np.array(next(self.beliefs))

    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError


def settle_scripted(
    beliefs: list[list[float]], vectors: torch.Tensor = LINE, **options: int
) -> AffinityResult:
    with LocalProblem(vectors) as local:
        local.messages = lambda *_: Scripted(beliefs)  # type: ignore[method-assign]
        return settle(local, torch.full((len(vectors),), -5.0, dtype=torch.float64), damping=0.5, **options)


def test_the_certificate_of_an_oscillation() -> None:
    """Users 1 and 4 are exemplars in turn, user 5 always: two of six swing, in each round both."""
    one, two = [-1.0, 1, -1, -1, -1, 1], [-1.0, -1, -1, -1, 1, 1]
    result = settle_scripted([one, two], max_iter=20, convergence_iter=4)
    assert not result.converged
    assert result.rounds == 20
    assert set(result.certificate.changes) == {2}
    assert result.certificate.oscillating_users == 2
    # {1, 5} serves better: the cluster 10 11 12 then gets its middle in the last step
    assert result.exemplars_E.tolist() == [1, 4]
    assert result.net_similarity == pytest.approx(-14.0)
    assert result.certificate.fixed_point


def test_labels_that_are_no_fixed_point_are_told() -> None:
    """Points 0 1 3 9 10 11, exemplars 0 and 3: one refinement is not enough."""
    vectors = torch.tensor([[0.0], [1.0], [3.0], [9.0], [10.0], [11.0]])
    result = settle_scripted([[1.0, -1, 1, -1, -1, -1]], vectors, convergence_iter=3)
    # {0 1} keeps 0, {3 9 10 11} has its mean at 8.25 and takes 9; now 3 is nearer to 0, and the middle of {0 1 3} is 1
    assert result.converged
    assert result.exemplars_E.tolist() == [0, 3]
    assert result.labels_U.tolist() == [0, 0, 0, 1, 1, 1]
    assert not result.certificate.fixed_point


def test_what_a_graph_leaves_out_is_not_proven(rng: np.random.Generator) -> None:
    vectors = normal(rng, 100, 8)
    preferences = torch.full((100,), -60.0, dtype=torch.float64)
    with SparseProblem(vectors, neighbours=2, most_neighbours=2) as sparse:
        result = settle(sparse, preferences, damping=0.8)
    assert not result.certificate.proven
    assert 0 < result.certificate.unproven_rows <= 100
    assert result.pairs < 100 * 99 / 4


# without convergence


@every_solver
def test_without_convergence_the_best_so_far_is_returned_and_flagged(
    rng: np.random.Generator, solver: Solver
) -> None:
    vectors = blobs(rng)
    result = affinity_propagation(vectors, -30.0, max_iter=6, solver=solver)
    assert not result.converged
    assert result.rounds == 6
    assert len(result.certificate.changes) == 5
    assert len(result.exemplars_E) >= 1
    assert result.labels_U.shape == (40,)
    assert result.labels_U[result.exemplars_E].tolist() == list(range(len(result.exemplars_E)))


def test_without_any_exemplar_the_central_user_is_taken(rng: np.random.Generator) -> None:
    vectors = normal(rng, 30, 3)
    result = settle_scripted([[-1.0] * 30], vectors, max_iter=20)
    assert not result.converged
    assert result.exemplars_E.tolist() == [nearest_to_mean(vectors)]


def test_fit_raises_the_damping_until_it_converges(rng: np.random.Generator) -> None:
    started: list[tuple[float, int]] = []
    rounds: list[tuple[int, int]] = []

    def on_attempt(damping: float, max_iter: int) -> affinity.OnRound:
        started.append((damping, max_iter))
        return lambda exemplars, changed: rounds.append((exemplars, changed))

    schedule = [(0.5, 3), (0.7, 200), (0.9, 400)]
    with LocalProblem(blobs(rng)) as local:
        result, attempts = fit(local, -30.0, schedule=schedule, on_attempt=on_attempt)
    assert result.converged
    assert result.damping == 0.7
    assert [a.converged for a in attempts] == [False, True]
    assert started == schedule[:2]
    assert len(rounds) == 3 + result.rounds
    assert rounds[-1] == (len(result.exemplars_E), 0)


@every_solver
def test_fit_keeps_the_best_attempt_when_none_converges(rng: np.random.Generator, solver: Solver) -> None:
    with LocalProblem(blobs(rng), solver=solver) as local:
        result, attempts = fit(local, -30.0, schedule=[(0.5, 4), (0.7, 4), (0.9, 4)])
    assert not result.converged
    assert len(attempts) == 3
    assert result.net_similarity == max(a.net_similarity for a in attempts)


def test_convergence_is_not_declared_before_scikit_learn_would(rng: np.random.Generator) -> None:
    # everyone is an exemplar from the first round on, yet convergence_iter + 1 rounds are done
    assert affinity_propagation(blobs(rng), 0.0, convergence_iter=15).rounds == 16
    assert affinity_propagation(blobs(rng), 0.0, convergence_iter=3).rounds == 4


# lists that do not pay, memory that does not suffice


def test_lists_that_grow_too_long_go_on_as_whole_rows(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = normal(rng, 150, 6)
    wanted = affinity_propagation(vectors, -100.0, damping=0.7, solver="dense")
    monkeypatch.setattr(problem, "_LONG", 0.25)  # 5,625 pairs; 32 a row are 4,800 to begin with
    with LocalProblem(vectors, solver="lists") as local, caplog.at_level(logging.INFO):
        rounds: list[int] = []
        found = settle(
            local,
            torch.full((150,), -100.0, dtype=torch.float64),
            damping=0.7,
            on_round=lambda exemplars, changed: rounds.append(exemplars),
        )
        assert local.solver == "dense"
        assert local.lists is None
    assert "too long" in caplog.text
    assert same(found, wanted)
    assert found.rounds == wanted.rounds == len(rounds)
    assert found.pairs == 150**2
    assert found.certificate == wanted.certificate


def test_a_fall_back_to_whole_rows_keeps_the_preferences_that_changed_on_the_way(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = normal(rng, 120, 6)
    before, after = np.full(120, -2.0), -rng.uniform(50, 99, size=120)

    def beliefs(solver: Solver) -> list[np.ndarray]:
        with LocalProblem(vectors, solver=solver) as local:
            passed = local.messages(before, 0.6)
            found = [passed.round() for _ in range(5)]
            passed.set_preferences(after)
            found += [passed.round() for _ in range(12)]
            assert local.solver == "dense"
            return found

    # room for the lists of the first preference, not for those of the second
    monkeypatch.setattr(problem, "_LONG", 0.3)
    for ours, wanted in zip(beliefs("lists"), beliefs("dense"), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-3)


def test_too_long_lists_are_an_error_where_nobody_widens_them(rng: np.random.Generator) -> None:
    source = ExactNeighbours(VectorSimilarities(normal(rng, 60, 4)))
    lists = source.lists(60, 3)
    passed = ListMessages(lists, 60, 0, np.full(60, -500.0), 0.5, source=source, max_entries=60 * 3 + 1)
    # three neighbours and oneself: the second value of the first round is below the bound of many rows
    with pytest.raises(ListsTooLongError, match="at most 181 pay"):
        [passed.round() for _ in range(50)]


@pytest.mark.parametrize("solver", ["dense", "torch"])
def test_whole_rows_that_do_not_fit_are_refused(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, solver: Solver
) -> None:
    vectors = normal(rng, 100, 3)
    # 12 bytes a pair: 120,000
    monkeypatch.setattr(problem, "available_memory_bytes", lambda: 119_999)
    with pytest.raises(MemoryError, match=r"all pairs of 100 users.*sparse"):
        affinity_propagation(vectors, -5.0, solver=solver)
    monkeypatch.setattr(problem, "available_memory_bytes", lambda: 120_000)
    assert affinity_propagation(vectors, -5.0, solver=solver).pairs == 10_000
    monkeypatch.setattr(problem, "available_memory_bytes", lambda: None)
    assert affinity_propagation(vectors, -5.0, solver=solver).pairs == 10_000


def test_where_whole_rows_do_not_fit_lists_may(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = blobs(rng, centres=20, each=10)
    wanted = affinity_propagation(vectors, -3.0, damping=0.7, solver="dense")
    monkeypatch.setattr(problem, "available_memory_bytes", lambda: 12 * 200**2 - 1)
    assert same(affinity_propagation(vectors, -3.0, damping=0.7, solver="lists"), wanted)
    # nearly all pairs are needed
    with pytest.raises(MemoryError, match="all pairs of 200 users"):
        affinity_propagation(vectors, -1e5, damping=0.7, solver="lists")


def test_auto_takes_lists_for_many_users_only(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem, "DENSE_USERS", 50)
    assert LocalProblem(normal(rng, 50, 3)).solver == "dense"
    assert LocalProblem(normal(rng, 51, 3)).solver == "lists"
    assert LocalProblem(None, similarities=similarity_matrix(normal(rng, 51, 3))).solver == "dense"


# determinism


def make(kind: str, vectors: torch.Tensor, preferences: np.ndarray) -> Messages:
    if kind == "lists":
        source = ExactNeighbours(VectorSimilarities(vectors))
        lists = source.lists(len(vectors), 4)
        return ListMessages(lists, len(vectors), 0, preferences, 0.5, source=source)
    matrix = similarity_matrix(vectors)
    if kind == "dense":
        return DenseMessages(matrix.numpy(), 0, preferences, 0.5)
    return TorchMessages(matrix, preferences, 0.5)


@pytest.mark.parametrize("kind", ["dense", "lists", "torch"])
def test_the_number_of_threads_changes_no_bit(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    vectors, preferences = normal(rng, 150, 8), np.full(150, -20.0)
    states = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(messages, "num_threads", lambda threads=threads: threads)
        passed = make(kind, vectors, preferences)
        beliefs = [passed.round() for _ in range(12)]
        states.append(passed.state() | {"beliefs": np.stack(beliefs)})
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        for name, values in states[0].items():
            assert values.tobytes() == other[name].tobytes(), name


@every_solver
def test_torchs_number_of_threads_changes_no_label(rng: np.random.Generator, solver: Solver) -> None:
    """Its matrix products may differ in a last bit, and with them the bounds of lists."""
    vectors = normal(rng, 150, 8)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(affinity_propagation(vectors, -20.0, solver=solver))
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], other) for other in results[1:])
    assert len({r.rounds for r in results}) == 1


def test_the_size_of_a_block_changes_next_to_nothing(rng: np.random.Generator) -> None:
    matrix = similarity_matrix(normal(rng, 60, 4))
    preferences = np.full(60, -8.0)
    found = []
    for rows in (1, 7, 1000, None):
        passed = TorchMessages(matrix.clone(), preferences, 0.5, block_rows=rows)
        found.append(np.stack([passed.round() for _ in range(20)]))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-5)
