"""Preferences: the median against numpy's, the search for a share, what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distributed_mi.exemplars import preference as module
from distributed_mi.exemplars.affinity import affinity_propagation, settle
from distributed_mi.exemplars.preference import (
    median_similarity,
    preference_for_share,
    resolve_preference,
    typical_distance,
)
from distributed_mi.exemplars.problem import LocalProblem, Solver, SparseProblem
from distributed_mi.exemplars.similarity import (
    MatrixSimilarities,
    VectorSimilarities,
    row_blocks,
    similarity_matrix,
)


def median_of(vectors: torch.Tensor) -> float:
    """By numpy, of the whole matrix."""
    return float(np.median(similarity_matrix(vectors).double().numpy()))


@pytest.mark.parametrize("users", [1, 2, 3, 4, 7, 50, 51])
def test_the_median_of_all_pairs(rng: np.random.Generator, users: int) -> None:
    # users^2 similarities: an odd number of them for odd users; the users' own zeros count, as in scikit-learn
    vectors = torch.from_numpy(rng.normal(size=(users, 3))).float()
    assert median_similarity(VectorSimilarities(vectors)) == pytest.approx(median_of(vectors), rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.integers(1, 3)),
        elements=st.one_of(st.integers(-3, 3), st.floats(-1e4, 1e4, width=32)),
    )
)
def test_the_median_of_any_vectors(points: np.ndarray) -> None:
    """Ties, zeros and wide ranges."""
    vectors = torch.from_numpy(points)
    assert median_similarity(VectorSimilarities(vectors)) == median_of(vectors)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda n: arrays(
            np.float32,
            (n, n),
            elements=st.one_of(st.integers(-2, 2), st.floats(-(2.0**99), 2.0**99, width=32)),
        )
    )
)
def test_the_median_of_any_matrix(values: np.ndarray) -> None:
    """Similarities above zero too; the diagonal counts as 0, whatever stands there."""
    wanted = values.copy()
    np.fill_diagonal(wanted, 0.0)
    found = median_similarity(MatrixSimilarities(torch.from_numpy(values)))
    assert found == np.median(wanted.astype(np.float64))


def test_the_median_in_blocks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.from_numpy(rng.integers(0, 4, size=(41, 2))).float()
    monkeypatch.setattr(module, "row_blocks", lambda rows, width: row_blocks(rows, width, 6 * width))
    assert median_similarity(VectorSimilarities(vectors)) == median_of(vectors)


def test_the_median_of_many_users_is_that_of_some_of_them(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MEDIAN_ALL", 800)
    vectors = torch.from_numpy(rng.normal(size=(900, 6))).float()
    found = median_similarity(VectorSimilarities(vectors))
    assert found == pytest.approx(median_of(vectors), rel=0.1)
    assert found == median_similarity(VectorSimilarities(vectors))


def test_preferences_by_hand() -> None:
    similarities = VectorSimilarities(torch.arange(3.0)[:, None])
    assert resolve_preference(-4, similarities).tolist() == [-4.0] * 3
    assert resolve_preference(torch.tensor([-4.0]), similarities).tolist() == [-4.0] * 3
    assert resolve_preference(torch.tensor([1.0, 2.0, 3.0]), similarities).tolist() == [1.0, 2.0, 3.0]
    # 0 0 0, -1 four times, -4 twice: the middle of nine is -1
    for name in ("median", None):
        assert resolve_preference(name, similarities).tolist() == [-1.0] * 3
    assert resolve_preference(-4.0, similarities).dtype == torch.float64


def test_the_resolved_preferences_are_a_copy() -> None:
    given_U = torch.zeros(3, dtype=torch.float64)
    resolve_preference(given_U, VectorSimilarities(torch.zeros(3, 1)))[0] = -1.0
    assert given_U.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ("mean", "'mean'"),
        (math.nan, "one finite number"),
        (-math.inf, "one finite number"),
        (torch.zeros(2), "one for each of 3 users"),
        (torch.zeros(0), "one for each of 3 users"),
        (torch.tensor([0.0, math.nan, 0.0]), "one finite number"),
    ],
)
def test_a_bad_preference_is_refused(preference: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_preference(preference, VectorSimilarities(torch.zeros(3, 2)))  # type: ignore[arg-type]


# the search for a share


def blobs(rng: np.random.Generator, centres: int, each: int, width: int = 3) -> torch.Tensor:
    middle = rng.normal(size=(centres, 1, width)) * 10
    return torch.from_numpy((middle + rng.normal(size=(centres, each, width))).reshape(-1, width)).float()


@pytest.mark.parametrize("solver", ["lists", "dense", "torch"])
@pytest.mark.parametrize("share", [0.04, 0.1, 0.25, 0.6])
def test_the_share_is_reached(rng: np.random.Generator, solver: Solver, share: float) -> None:
    vectors = blobs(rng, 12, 25)
    steps: list[tuple[int, float, float]] = []
    with LocalProblem(vectors, solver=solver) as problem:
        preference, tried = preference_for_share(
            problem, share, tolerance=0.05, on_step=lambda *told: steps.append(told)
        )
    assert [(p, s) for _, p, s in steps] == tried
    assert [n for n, _, _ in steps] == list(range(1, len(tried) + 1))
    assert len(tried) <= 24
    assert preference < 0
    reached = dict(tried)[preference]
    assert reached == pytest.approx(share, rel=0.05)
    # a run of its own has confirmed it
    result = affinity_propagation(vectors, preference, damping=0.7)
    assert result.share == reached


@pytest.mark.parametrize(("share", "count"), [(1.0, 60), (1e-9, 1), (1 / 60, 1)])
def test_the_ends_of_the_range(rng: np.random.Generator, share: float, count: int) -> None:
    vectors = torch.from_numpy(rng.normal(size=(60, 3))).float()
    with LocalProblem(vectors) as problem:
        preference, tried = preference_for_share(problem, share, tolerance=1e-3)
        assert dict(tried)[preference] == count / 60


def test_a_graph_has_shares_too(rng: np.random.Generator) -> None:
    vectors = blobs(rng, 12, 25)
    with SparseProblem(vectors, neighbours=20) as problem:
        preference, tried = preference_for_share(problem, 0.08, tolerance=0.05)
        assert dict(tried)[preference] == pytest.approx(0.08, rel=0.05)


def test_a_share_that_cannot_be_reached_is_approached(rng: np.random.Generator) -> None:
    """Two groups of equal users: one, two or all can be exemplars, not half of them."""
    vectors = torch.tensor([[0.0], [1.0]]).repeat(10, 1)
    with LocalProblem(vectors) as problem:
        preference, tried = preference_for_share(problem, 0.5, max_steps=10)
    assert len(tried) <= 10
    assert (preference, dict(tried)[preference]) in tried


def test_each_step_goes_on_from_the_last(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    warm: list[bool] = []

    def watched(*arguments: object, **options: object) -> object:
        warm.append(options["warm"] is not None)
        return settle(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("distributed_mi.exemplars.affinity.settle", watched)
    with LocalProblem(blobs(rng, 10, 12), solver="lists") as problem:
        preference_for_share(problem, 0.3, tolerance=0.001, max_steps=6)
    # the first has nothing to go on from; in the end runs from the beginning decide
    first_cold = warm.index(False, 1)
    assert warm == [False] + [True] * (first_cold - 1) + [False] * (len(warm) - first_cold)
    assert first_cold > 1


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_a_bad_share_is_refused(share: float) -> None:
    with (
        LocalProblem(torch.zeros(3, 1)) as problem,
        pytest.raises(ValueError, match=r"share must be in \(0, 1\]"),
    ):
        preference_for_share(problem, share)


def test_typical_distance_by_hand(rng: np.random.Generator) -> None:
    # squared distances 0 1 4, 1 0 1, 4 1 0: medians 1 1 1
    assert typical_distance(VectorSimilarities(torch.arange(3.0)[:, None])) == 1.0
    assert typical_distance(VectorSimilarities(torch.zeros(3, 1))) == 1e-12
