"""Affinity propagation on Ray actors: the labels of one process, also when actors die or checkpoints fail."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayError

from distributed_mi.core.errors import StageError
from distributed_mi.exemplars.affinity import AffinityResult, fit, settle
from distributed_mi.exemplars.distributed import Blocks, DistributedProblem, Kind
from distributed_mi.exemplars.problem import LocalProblem, Problem, SparseProblem

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

USERS = 300
NEIGHBOURS = 24
PREFERENCE = -12.0

OnRound = Callable[[int, int], None]


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    """30 clusters that overlap."""
    rng = np.random.default_rng(7)
    points = rng.normal(size=(30, 8))[rng.integers(30, size=USERS)] * 2 + rng.normal(size=(USERS, 8)) * 0.7
    return torch.from_numpy(points).float()


def solve(problem: Problem, on_round: OnRound | None = None) -> AffinityResult:
    return settle(
        problem, torch.full((USERS,), PREFERENCE, dtype=torch.float64), damping=0.6, on_round=on_round
    )


@pytest.fixture(scope="module")
def alone(vectors: torch.Tensor) -> Callable[[Kind], AffinityResult]:
    """What one process finds."""
    found: dict[str, AffinityResult] = {}

    def of(kind: Kind) -> AffinityResult:
        if kind not in found:
            with problem_of(vectors, kind) as problem:
                found[kind] = solve(problem)
            assert found[kind].converged
            assert 5 < len(found[kind].exemplars_E) < USERS / 2
        return found[kind]

    return of


def problem_of(vectors: torch.Tensor, kind: Kind) -> Problem:
    if kind == "sparse":
        return SparseProblem(vectors, neighbours=NEIGHBOURS, most_neighbours=NEIGHBOURS)
    return LocalProblem(vectors, solver=kind)


def blocks(kind: Kind, **options: Any) -> Blocks:
    defaults: dict[str, Any] = {"num_actors": 2, "neighbours": NEIGHBOURS, "checkpoint_every": 4}
    return Blocks(kind=kind, **(defaults | options))


def assert_same(found: AffinityResult, wanted: AffinityResult) -> None:
    assert found.exemplars_E.tolist() == wanted.exemplars_E.tolist()
    assert found.labels_U.tolist() == wanted.labels_U.tolist()
    assert found.converged == wanted.converged
    assert found.rounds == wanted.rounds
    assert found.net_similarity == pytest.approx(wanted.net_similarity, rel=1e-6)


def kill_after(problem: DistributedProblem, *rounds: int, ranks: tuple[int, ...] = (0,)) -> OnRound:
    """Kill actors once after each of some rounds, counted from 1."""
    done = iter(range(1, 10_000))
    left = set(rounds)

    def on_round(exemplars: int, changed: int) -> None:
        if (number := next(done)) in left:
            left.remove(number)
            for rank in ranks:
                kill(problem.actors[rank])

    return on_round


def kill(actor: Any) -> None:
    """Kill -9, and wait until Ray knows, so that the next call meets a dead actor for certain."""
    os.kill(ray.get(actor.ping.remote(), timeout=30), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            ray.get(actor.ping.remote(), timeout=30)
        except RayError:
            return
        time.sleep(0.05)
    pytest.fail("the actor answers after kill -9")


@pytest.mark.parametrize(
    ("kind", "num_actors"),
    [
        ("lists", 2),
        pytest.param("dense", 2, marks=pytest.mark.slow),
        pytest.param("sparse", 2, marks=pytest.mark.slow),
        pytest.param("dense", 4, marks=pytest.mark.slow),
        pytest.param("lists", 4, marks=pytest.mark.slow),
        pytest.param("sparse", 4, marks=pytest.mark.slow),
    ],
)
def test_labels_are_those_of_one_process(
    vectors: torch.Tensor, alone: Callable[[Kind], AffinityResult], kind: Kind, num_actors: int
) -> None:
    with DistributedProblem(vectors, blocks(kind, num_actors=num_actors)) as problem:
        assert len(problem.actors) == num_actors
        result = solve(problem)
        assert problem.deaths == 0
    assert_same(result, alone(kind))
    assert result.certificate == alone(kind).certificate
    if kind != "lists":  # blocks of other rows may ask for a few more neighbours
        assert result.pairs == alone(kind).pairs
    assert result.certificate.proven or kind == "sparse"
    assert problem.actors == []
    assert len(problem.peak_bytes) == num_actors
    assert min(problem.peak_bytes) > 1 << 20


@pytest.mark.slow
def test_one_actor_and_more_actors_than_users(
    vectors: torch.Tensor, alone: Callable[[Kind], AffinityResult]
) -> None:
    with DistributedProblem(vectors, blocks("lists", num_actors=1)) as problem:
        assert_same(solve(problem), alone("lists"))
    with DistributedProblem(torch.tensor([[0.0], [2.0]]), blocks("dense", num_actors=4)) as few:
        assert len(few.actors) == 2
        result = settle(few, torch.full((2,), -5.0, dtype=torch.float64), damping=0.5)
    assert result.exemplars_E.tolist() == [0]
    with pytest.raises(ValueError, match="num_actors must be at least 1"):
        DistributedProblem(vectors, blocks("lists", num_actors=0))
    bad = vectors.clone()
    bad[17, 3] = torch.nan
    with pytest.raises(ValueError, match="user row 17"):
        DistributedProblem(bad, blocks("lists"))


@pytest.mark.slow
def test_several_attempts_use_the_same_actors(vectors: torch.Tensor, tmp_path: Path) -> None:
    schedule = [(0.5, 3), (0.6, 200)]
    with LocalProblem(vectors, solver="dense") as local:
        wanted, _ = fit(local, PREFERENCE, schedule=schedule)
    with DistributedProblem(vectors, blocks("dense", checkpoint_dir=str(tmp_path))) as problem:
        before = list(problem.actors)
        result, attempts = fit(problem, PREFERENCE, schedule=schedule)
        assert problem.actors == before
    assert [a.converged for a in attempts] == [False, True]
    assert_same(result, wanted)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("kind", "ranks", "at", "checkpoints"),
    [
        ("lists", (0,), 10, True),
        pytest.param("dense", (1,), 6, True, marks=pytest.mark.slow),
        pytest.param("dense", (1,), 6, False, marks=pytest.mark.slow),
        pytest.param("lists", (0, 1), 8, True, marks=pytest.mark.slow),
        pytest.param("lists", (0, 1), 8, False, marks=pytest.mark.slow),
        pytest.param("sparse", (1,), 3, False, marks=pytest.mark.slow),
    ],
)
def test_an_actor_that_dies_changes_no_label(
    vectors: torch.Tensor,
    alone: Callable[[Kind], AffinityResult],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: Kind,
    ranks: tuple[int, ...],
    at: int,
    checkpoints: bool,
) -> None:
    folder = str(tmp_path / "checkpoints") if checkpoints else None
    with DistributedProblem(vectors, blocks(kind, checkpoint_dir=folder)) as problem:
        result = solve(problem, kill_after(problem, at, ranks=ranks))
        assert problem.deaths == len(ranks)
    assert_same(result, alone(kind))
    # a checkpoint after each fourth round
    since = at - at % 4 if checkpoints else 0
    assert f"going on from round {since}, {at - since} rounds are done again" in caplog.text
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_deaths_in_several_rounds(
    vectors: torch.Tensor, alone: Callable[[Kind], AffinityResult], tmp_path: Path
) -> None:
    with DistributedProblem(vectors, blocks("lists", num_actors=4, checkpoint_dir=str(tmp_path))) as problem:
        result = solve(problem, kill_after(problem, 2, 7, 12, ranks=(2,)))
        assert problem.deaths == 3
    assert_same(result, alone("lists"))


class Deaf:
    """Kills an actor just before a method is called on all of them, once."""

    def __init__(self, problem: DistributedProblem, method: str, skip: int = 0) -> None:
        self.problem, self.method, self.skip, self.killed = problem, method, skip, False
        self.call = problem.call
        problem.call = self  # type: ignore[method-assign]

    def __call__(self, method: str, *arguments: Any) -> list[Any]:
        if method == self.method and not self.killed:
            if self.skip == 0:
                self.killed = True
                kill(self.problem.actors[-1])
            self.skip -= 1
        return self.call(method, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "skip"), [("save", 0), ("save", 1), ("begin", 0), ("pairs", 0), ("unproven", 0)]
)
def test_an_actor_may_die_at_any_time(
    vectors: torch.Tensor,
    alone: Callable[[Kind], AffinityResult],
    tmp_path: Path,
    method: str,
    skip: int,
) -> None:
    with DistributedProblem(vectors, blocks("lists", checkpoint_dir=str(tmp_path))) as problem:
        deaf = Deaf(problem, method, skip)
        assert_same(solve(problem), alone("lists"))
        assert deaf.killed
        assert problem.deaths == 1


@pytest.mark.slow
def test_an_actor_may_die_while_the_others_recover(
    vectors: torch.Tensor, alone: Callable[[Kind], AffinityResult], tmp_path: Path
) -> None:
    with DistributedProblem(vectors, blocks("lists", checkpoint_dir=str(tmp_path))) as problem:
        deaf = Deaf(problem, "restore")
        assert_same(solve(problem, kill_after(problem, 6)), alone("lists"))
        assert deaf.killed
        assert problem.deaths == 2


def beliefs(
    problem: Problem, preferences: np.ndarray, later: np.ndarray, kill_at: tuple[int, ...] = ()
) -> Iterator[np.ndarray]:
    """14 rounds with other preferences from the ninth on; an actor dies after some of them."""
    messages = problem.messages(preferences, 0.6)
    for number in range(14):
        if number in kill_at and isinstance(problem, DistributedProblem):
            kill(problem.actors[0])
        if number == 8:
            messages.set_preferences(later)
        yield messages.round()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "checkpoint_every"), [((8,), 4), ((11,), 4), ((5, 8, 10), 4), ((9,), 100)]
)
def test_preferences_that_changed_on_the_way_are_not_forgotten(
    vectors: torch.Tensor, tmp_path: Path, kill_at: tuple[int, ...], checkpoint_every: int
) -> None:
    """A checkpoint after round 8, just before the change, or none at all; deaths before, at and after it."""
    rng = np.random.default_rng(3)
    preferences, later = np.full(USERS, PREFERENCE), PREFERENCE * rng.uniform(1, 2, size=USERS)
    with LocalProblem(vectors, solver="dense") as local:
        wanted = list(beliefs(local, preferences, later))
    with DistributedProblem(
        vectors, blocks("dense", checkpoint_dir=str(tmp_path), checkpoint_every=checkpoint_every)
    ) as problem:
        found = list(beliefs(problem, preferences, later, kill_at))
        assert problem.deaths == len(kill_at)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("die", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_checkpoint_that_cannot_be_written_is_only_a_warning(
    vectors: torch.Tensor,
    alone: Callable[[Kind], AffinityResult],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    die: bool,
) -> None:
    """As on a full disk: the folder is to lie below a file."""
    (tmp_path / "file").write_text("in the way")
    config = blocks("lists", checkpoint_dir=str(tmp_path / "file" / "checkpoints"))
    with DistributedProblem(vectors, config) as problem, caplog.at_level(logging.WARNING):
        result = solve(problem, kill_after(problem, 9) if die else None)
        assert problem.deaths == die
    assert_same(result, alone("lists"))
    assert "no checkpoint after round 4" in caplog.text
    assert "no checkpoint after round 8" in caplog.text
    assert ("going on from round 0, 9 rounds are done again" in caplog.text) == die
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.slow
def test_the_last_checkpoint_survives_one_that_cannot_be_written(
    vectors: torch.Tensor,
    alone: Callable[[Kind], AffinityResult],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The place of the checkpoint of round 8 is taken by a file."""
    place = tmp_path / "damping-0.6"
    place.mkdir()
    (place / "round-8").write_text("in the way")
    with DistributedProblem(vectors, blocks("lists", checkpoint_dir=str(tmp_path))) as problem:
        assert_same(solve(problem, kill_after(problem, 10)), alone("lists"))
    assert "no checkpoint after round 8" in caplog.text
    assert "going on from round 4, 6 rounds are done again" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("max_restarts", [0, 2])
def test_too_many_deaths_end_the_run(vectors: torch.Tensor, max_restarts: int) -> None:
    with DistributedProblem(vectors, blocks("dense", max_restarts=max_restarts)) as problem:
        with pytest.raises(StageError, match=f"at most {max_restarts} are put up with"):
            solve(problem, kill_after(problem, *range(2, 3 + max_restarts)))
        assert problem.deaths == max_restarts + 1


@pytest.mark.slow
@pytest.mark.parametrize("max_restarts", [0, 1])
def test_an_actor_may_die_before_it_has_met_the_others(
    vectors: torch.Tensor,
    alone: Callable[[Kind], AffinityResult],
    max_restarts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call, met = DistributedProblem.call, []

    def dying(problem: DistributedProblem, method: str, *arguments: Any) -> list[Any]:
        if method == "join":
            if not met:
                kill(problem.actors[1])
            met.append(method)
        return call(problem, method, *arguments)

    monkeypatch.setattr(DistributedProblem, "call", dying)
    if max_restarts == 0:
        with pytest.raises(StageError, match="at most 0 are put up with"):
            DistributedProblem(vectors, blocks("lists", max_restarts=0))
        return
    with DistributedProblem(vectors, blocks("lists", max_restarts=max_restarts)) as problem:
        assert problem.deaths == 1
        assert_same(solve(problem), alone("lists"))
    assert len(met) == 2


@pytest.mark.slow
@pytest.mark.parametrize("die", [False, True])
def test_the_next_day_begins_from_a_summary(vectors: torch.Tensor, die: bool) -> None:
    """As in one process, also after a death without a checkpoint, from which all rounds are done again."""
    preferences_U = torch.full((USERS,), PREFERENCE, dtype=torch.float64)
    with DistributedProblem(vectors, blocks("lists", num_actors=3)) as problem:
        first = solve(problem)
        summary = problem.summary
    assert summary is not None
    assert {len(v) for v in summary.values()} == {USERS}
    with LocalProblem(vectors, solver="lists", length=NEIGHBOURS) as problem:
        wanted = settle(problem, preferences_U, damping=0.6, warm=summary)
    with DistributedProblem(vectors, blocks("lists")) as problem:
        on_round = kill_after(problem, 3) if die else None
        again = settle(problem, preferences_U, damping=0.6, warm=summary, on_round=on_round)
        assert problem.deaths == int(die)
    assert_same(again, wanted)
    assert again.converged
    assert again.rounds < first.rounds


def test_an_error_that_is_no_death_is_raised_as_it_is(
    vectors: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DistributedProblem(vectors, blocks("dense")) as problem:
        messages = problem.messages(np.full(USERS, PREFERENCE), 0.6)
        messages.round()
        call, actors = problem.call, list(problem.actors)
        monkeypatch.setattr(
            problem,
            "call",
            lambda method, *rest: (
                call("restore", str(tmp_path / "nowhere")) if method == "round" else call(method, *rest)
            ),
        )
        with pytest.raises(FileNotFoundError):
            messages.round()
        monkeypatch.undo()
        assert problem.deaths == 0
        assert problem.actors == actors
