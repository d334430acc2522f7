"""Affinity propagation: choose exemplars by passing messages between users.

Frey and Dueck, "Clustering by Passing Messages Between Data Points", Science 315 (2007); updates, damping, stop
rule and final refinement as in scikit-learn's `AffinityPropagation`. The equations stand in `messages.py`, what is
kept of the messages in `messages.py` and `lists.py`, the treatment of ties in `ties.py`.

Shapes:  U users, E exemplars.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distributed_mi.exemplars.clusters import is_fixed_point, refine
from distributed_mi.exemplars.messages import Messages
from distributed_mi.exemplars.preference import Preference, resolve_preference
from distributed_mi.exemplars.problem import LocalProblem, Problem, Warm
from distributed_mi.exemplars.ties import equal_sums, tie_break

_MOSTLY_TIED = 0.5
"""Share of users in ties above which a second order of breaking them is tried."""

OnRound = Callable[[int, int], None]
"""Called after each round with the number of exemplars and how many users became or ceased to be one."""


@dataclass(frozen=True)
class Certificate:
    """What speaks for a result, or against it."""

    changes: tuple[int, ...]
    """Users that became or ceased to be an exemplar from each of the last `convergence_iter` rounds to the next, the
    newest last: one number fewer than rounds."""
    oscillating_users: int
    """Users that did so in any of these rounds; 0 after convergence."""
    fixed_point: bool
    """Whether each user is with its most similar exemplar and each exemplar is the most central of its cluster."""
    proven: bool
    """Whether no pair of users that was left out could have changed a message."""
    unproven_rows: int = 0
    """Users whose messages a pair that was left out could have changed in the last round."""


@dataclass(frozen=True)
class AffinityResult:
    """Exemplars and labels, and how they came about."""

    exemplars_E: Tensor
    """int64, positions in U, ascending."""
    labels_U: Tensor
    """int64, positions in E; an exemplar has its own."""
    converged: bool
    """Whether the exemplars stayed the same for `convergence_iter` rounds."""
    rounds: int
    """Message rounds done; 0 when all similarities are equal and there was nothing to pass on."""
    net_similarity: float
    """Sum of the similarities of users to their exemplar and of the exemplars' preferences; higher is better."""
    preference: float
    """The preference used (the mean when every user has his own)."""
    damping: float
    """The damping used."""
    certificate: Certificate
    """Oscillation of the last rounds, and whether the labels are a fixed point."""
    pairs: int
    """Pairs of users whose messages were kept."""

    @property
    def share(self) -> float:
        """Exemplars per user."""
        return len(self.exemplars_E) / len(self.labels_U)


def affinity_propagation(
    vectors_UD: Tensor | np.ndarray | None,
    preference: Preference,
    *,
    damping: float = 0.5,
    max_iter: int = 200,
    convergence_iter: int = 15,
    similarities: Tensor | None = None,
    solver: Literal["auto", "lists", "dense", "torch"] = "auto",
    all_tied: bool = False,
    on_round: OnRound | None = None,
) -> AffinityResult:
    """Choose exemplar users by message passing (Frey and Dueck, Science 2007).

    Similarity is the negative squared Euclidean distance; the self-similarity is `preference`. Labels equal
    scikit-learn's `AffinityPropagation` on the same input (`tests/parity/test_affinity.py`), in float32. Nothing of
    size U x U is kept unless it must be: see `lists.py`, which keeps the pairs that can matter and proves the rest
    away.

    Args:
        vectors_UD: one text vector per user. None when `similarities` is given.
        preference: eagerness of a user to be an exemplar; lower gives fewer. A number, one number per user,
            or "median" (also None, as in scikit-learn): the median of all similarities. EIMF uses -10 on BERT vectors.
        damping: weight of the previous message, in [0.5, 1). Raise it when `converged` is False.
        max_iter: message rounds before giving up.
        convergence_iter: rounds with unchanged exemplars that count as converged.
        similarities: `[U, U]` float32 instead of the vectors. Its diagonal is used as scratch and put back.
        solver: `lists` keeps the pairs that can matter, `dense` all of them (12 U^2 bytes, for CPUs), `torch` all of
        them
            on the device of the input. `auto`: `torch` on a GPU, `dense` for a matrix or few users, else `lists`, and
            `dense` after all where the lists would be longer than they pay.
        all_tied: treat all users as tied, which helps local symmetries that are not recognised to settle.
        on_round: told about each round.

    Returns:
        The result. Without convergence the best exemplars of the last `convergence_iter` rounds (of the user nearest to
        the mean, when there were none) are returned and `converged` is False.

    Raises:
        ValueError: a NaN or infinity (its row is named), no users, a similarity matrix that is not square, or a
            `damping`, `max_iter` or `convergence_iter` out of range.
        MemoryError: neither the lists nor the whole matrices fit.
    """
    with LocalProblem(vectors_UD, similarities=similarities, solver=solver) as problem:
        return settle(
            problem,
            resolve_preference(preference, problem.similarities),
            damping=damping,
            max_iter=max_iter,
            convergence_iter=convergence_iter,
            all_tied=all_tied,
            on_round=on_round,
        )


def fit(
    problem: Problem,
    preference: Preference,
    *,
    schedule: list[tuple[float, int]],
    convergence_iter: int = 15,
    on_attempt: Callable[[float, int], OnRound] | None = None,
    warm: Warm | None = None,
) -> tuple[AffinityResult, list[AffinityResult]]:
    """Try dampings in turn until the messages converge; without that, keep the best net similarity.

    Args:
        problem: similarities and where their messages are kept, shared by all attempts.
        preference: as in `affinity_propagation`.
        schedule: (damping, most rounds) of each attempt. From the second on all users are treated as tied.
        convergence_iter: as in `affinity_propagation`.
        on_attempt: called at the start of an attempt; returns its `on_round`.
        warm: what the first attempt begins from instead of nothing; see `problem.Warm`.

    Returns:
        The result, and the results of all attempts in order.
    """
    preferences_U = resolve_preference(preference, problem.similarities)
    attempts: list[AffinityResult] = []
    for damping, max_iter in schedule:
        attempts.append(
            settle(
                problem,
                preferences_U,
                damping=damping,
                max_iter=max_iter,
                convergence_iter=convergence_iter,
                all_tied=bool(attempts),
                on_round=on_attempt(damping, max_iter) if on_attempt else None,
                warm=None if attempts else warm,
            )
        )
        if attempts[-1].converged:
            return attempts[-1], attempts
    return max(attempts, key=lambda a: a.net_similarity), attempts


def settle(
    problem: Problem,
    preferences_U: Tensor,
    *,
    damping: float,
    max_iter: int = 200,
    convergence_iter: int = 15,
    all_tied: bool = False,
    on_round: OnRound | None = None,
    warm: Warm | None = None,
) -> AffinityResult:
    """Pass messages until the exemplars settle; arguments and result as in `affinity_propagation`.

    Args:
        problem: similarities and where their messages are kept.
        preferences_U: self-similarities, float64.
        damping: as in `affinity_propagation`, like the arguments that follow.
        max_iter: see there.
        convergence_iter: see there.
        all_tied: see there.
        on_round: see there.
        warm: what to begin from instead of nothing; see `problem.Warm`.
    """
    if not 0.5 <= damping < 1.0:
        raise ValueError(f"damping must be in [0.5, 1), got {damping}")
    if max_iter < 1 or convergence_iter < 1:
        raise ValueError(
            f"max_iter and convergence_iter must be at least 1, got {max_iter} and {convergence_iter}"
        )
    users, similarities = problem.similarities.users, problem.similarities
    mean = float(preferences_U.mean())

    def result(
        exemplars: Tensor, recent: list[np.ndarray], *, converged: bool, rounds: int
    ) -> AffinityResult:
        exemplars, labels, net = refine(similarities, exemplars, preferences_U, problem.lists)
        changes = tuple(int((a != b).sum()) for a, b in pairwise(recent))
        oscillating = int((np.stack(recent) != recent[-1]).any(axis=0).sum()) if recent else 0
        fixed = is_fixed_point(similarities, exemplars, labels, preferences_U)
        unproven = problem.unproven
        certificate = Certificate(changes, oscillating, fixed, problem.exact and unproven == 0, unproven)
        return AffinityResult(
            exemplars, labels, converged, rounds, net, mean, damping, certificate, problem.pairs
        )

    common = problem.common_similarity(preferences_U)
    if common is not None:
        alone = bool(preferences_U[0] > common)
        chosen = torch.arange(users if alone else 1, device=similarities.device)
        return result(chosen, [], converged=True, rounds=0)

    sums_U = similarities.sums() + preferences_U
    groups = torch.zeros_like(sums_U, dtype=torch.int64) if all_tied else equal_sums(sums_U)
    size = max(float(preferences_U.abs().max()), 0.1 * float(sums_U.mean().abs()) / users)
    lowered_U = preferences_U - tie_break(groups).double() * size
    outcome = _rounds(
        problem.messages(lowered_U.cpu().numpy(), damping, warm),
        lowered_U.cpu().numpy(),
        size,
        max_iter,
        convergence_iter,
        on_round or (lambda exemplars, changed: None),
    )
    recent, converged, rounds = outcome
    if converged:
        chosen = torch.from_numpy(np.flatnonzero(recent[-1])).to(similarities.device)
        found = result(chosen, recent, converged=True, rounds=rounds)
        if all_tied or float((groups >= 0).float().mean()) <= _MOSTLY_TIED:
            return found
        # in a set made of ties the order in which they are broken decides: of two orders the better counts
        other = settle(
            problem,
            preferences_U,
            damping=damping,
            max_iter=max_iter,
            convergence_iter=convergence_iter,
            all_tied=True,
            on_round=on_round,
        )
        better = other.converged and other.net_similarity > found.net_similarity
        return other if better else found
    sets = {r.tobytes(): r for r in recent if r.any()}
    candidates = [
        torch.from_numpy(np.flatnonzero(r)).to(similarities.device) for r in reversed(sets.values())
    ]
    results = [
        result(c, recent, converged=False, rounds=rounds)
        for c in candidates or [similarities.sums().argmax(keepdim=True)]
    ]
    return max(results, key=lambda r: r.net_similarity)


def _rounds(
    messages: Messages,
    preferences_U: np.ndarray,
    size: float,
    max_iter: int,
    convergence_iter: int,
    on_round: OnRound,
) -> tuple[list[np.ndarray], bool, int]:
    """Rounds until the exemplars stay the same.

    Returns:
        is_exemplar `[U]` bool of the last rounds, the newest last; whether they settled; the number of rounds.
    """
    recent: deque[np.ndarray] = deque(maxlen=convergence_iter)
    unchanged, ties_looked_for = 0, False
    for number in range(1, max_iter + 1):
        belief_U = messages.round()
        is_exemplar = belief_U > 0
        changed = int((is_exemplar != recent[-1]).sum()) if recent else messages.users
        unchanged = unchanged + 1 if changed == 0 else 1
        recent.append(is_exemplar)
        found = int(is_exemplar.sum())
        on_round(found, changed)
        # scikit-learn looks for the first time after convergence_iter + 1 rounds
        if not found or unchanged < convergence_iter or number <= convergence_iter:
            continue
        undecided = np.flatnonzero(belief_U == 0)
        if ties_looked_for or len(undecided) == 0:
            return list(recent), True, number
        # users for and against whom the messages say equally much are tied with each other
        ties_looked_for, unchanged = True, 0
        groups = torch.zeros(len(undecided), dtype=torch.int64)
        preferences_U[undecided] -= tie_break(groups).double().numpy() * size
        messages.set_preferences(preferences_U)
    return list(recent), False, max_iter
