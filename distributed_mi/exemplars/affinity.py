"""Exact affinity propagation in float32 row blocks.

Frey and Dueck, "Clustering by Passing Messages Between Data Points", Science 315 (2007); updates, damping, stop
rule and final refinement as in scikit-learn's `AffinityPropagation`.

    r(i,k) <- s(i,k) - max_{k' != k} (a(i,k') + s(i,k'))
    a(i,k) <- min(0, r(k,k) + sum_{i' not in {i,k}} max(0, r(i',k)))        a(k,k) <- sum_{i' != k} max(0, r(i',k))

A responsibility needs its row, an availability its row and one sum per column. So the availabilities of round t and the
responsibilities of round t + 1 are made in one pass over memory, block by block; only the column sums and the
two diagonals wait for the end of a round.

Ties. Interchangeable users (equal vectors, mirror images, an isolated pair) send equal messages: all would be exemplars
or none, or swing between the two. scikit-learn adds random noise to every similarity. Here the *preferences of tied
users alone* fall by up to a hundred-thousandth along the index, so that the lowest index wins, no result depends on a
seed, and where nothing ties nothing is changed. Ties are recognised by equal sums of similarities before the first
round, and by a belief r(k,k) + a(k,k) of zero when the messages have settled. Labels and net similarity are computed
without this aid.

Shapes:  U users, E exemplars, B rows of a block.
"""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distributed_mi.exemplars.similarity import row_blocks, similarity_matrix

Preference = float | Tensor | Literal["median"] | None
OnRound = Callable[[int, int], None]
"""Called after each round with the number of exemplars and how many users became or ceased to be one."""

_STRIPS = 32
"""Parts into which the rows are cut for threads; more than any number of cores that memory can feed."""

BLOCK_BYTES = 1 << 20
"""Size of one matrix's part of a block. Four of them are in use at a time and should stay in the cache."""

TIE_BREAK = 1e-5
"""Largest fall of a tied user's preference, as a share of the preference: about a hundred float32 steps."""

_EQUAL_SUMS = 3e-8
"""Relative difference of two users' sums of similarities that is float32 rounding of otherwise equal similarities."""

_ZERO_BELIEF = 3e-7
"""|r(k,k) + a(k,k)|, as a share of its two parts, that is float32 rounding of zero."""


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


def affinity_propagation(
    vectors_UD: Tensor | np.ndarray | None,
    preference: Preference,
    *,
    damping: float = 0.5,
    max_iter: int = 200,
    convergence_iter: int = 15,
    block_rows: int | None = None,
    similarities: Tensor | None = None,
    all_tied: bool = False,
    on_round: OnRound | None = None,
) -> AffinityResult:
    """Choose exemplar users by message passing (Frey and Dueck, Science 2007).

    Similarity is the negative squared Euclidean distance; the self-similarity is `preference`. Labels equal
    scikit-learn's `AffinityPropagation` on the same input (`tests/parity/test_affinity.py`), in float32 and row
    blocks: 12 * U * U bytes at the peak (similarities and both messages), 3.9 GB for U = 17,890.

    Args:
        vectors_UD: one text vector per user, float32. None when `similarities` is given.
        preference: eagerness of a user to be an exemplar; lower gives fewer. A number, one number per user,
            or "median" (also None, as in scikit-learn): the median of all similarities. EIMF uses -10 on BERT vectors.
        damping: weight of the previous message, in [0.5, 1). Raise it when `converged` is False.
        max_iter: message rounds before giving up.
        convergence_iter: rounds with unchanged exemplars that count as converged.
        block_rows: rows handled at a time; None: as many as keep a block in the cache.
        similarities: `[U, U]` float32 instead of the vectors. Its diagonal is used as scratch and put back.
        all_tied: treat all users as tied, which helps local symmetries that are not recognised to settle.
        on_round: told about each round.

    Returns:
        The result. Without convergence the best exemplars of the last `convergence_iter` rounds (of the user nearest to
        the mean, when there were none) are returned and `converged` is False.

    Raises:
        ValueError: a NaN or infinity (its row is named), no users, a similarity matrix that is not square, or a
            `damping`, `max_iter` or `convergence_iter` out of range.
    """
    _check_settings(damping, max_iter, convergence_iter)
    if similarities is not None:
        _check_similarities(similarities)
    elif vectors_UD is not None:
        similarities = similarity_matrix(check_vectors(vectors_UD))
    else:
        raise ValueError("affinity_propagation needs vectors_UD or similarities")
    diagonal = similarities.diagonal().clone()
    preferences = resolve_preference(preference, similarities)
    try:
        with torch.no_grad():
            return _propagate(
                similarities,
                preferences,
                damping=damping,
                max_iter=max_iter,
                convergence_iter=convergence_iter,
                block_rows=block_rows,
                all_tied=all_tied,
                on_round=on_round or (lambda exemplars, changed: None),
            )
    finally:
        similarities.diagonal().copy_(diagonal)


def fit(
    similarities: Tensor,
    preference: Preference,
    *,
    schedule: list[tuple[float, int]],
    convergence_iter: int = 15,
    on_attempt: Callable[[float, int], OnRound] | None = None,
) -> tuple[AffinityResult, list[AffinityResult]]:
    """Try dampings in turn until the messages converge; without that, keep the best net similarity.

    Args:
        similarities: `[U, U]` float32, computed once for all attempts.
        preference: as in `affinity_propagation`.
        schedule: (damping, most rounds) of each attempt. From the second on all users are treated as tied.
        convergence_iter: as in `affinity_propagation`.
        on_attempt: called at the start of an attempt; returns its `on_round`.

    Returns:
        The result, and the results of all attempts in order.
    """
    attempts: list[AffinityResult] = []
    for damping, max_iter in schedule:
        attempts.append(
            affinity_propagation(
                None,
                preference,
                damping=damping,
                max_iter=max_iter,
                convergence_iter=convergence_iter,
                similarities=similarities,
                all_tied=bool(attempts),
                on_round=on_attempt(damping, max_iter) if on_attempt else None,
            )
        )
        if attempts[-1].converged:
            return attempts[-1], attempts
    return max(attempts, key=lambda a: a.net_similarity), attempts


def check_vectors(vectors_UD: Tensor | np.ndarray) -> Tensor:
    """The vectors as a float32 matrix.

    Raises:
        ValueError: not two axes, no users, or a NaN or infinity; the first bad row is named.
    """
    vectors = torch.as_tensor(vectors_UD)
    if vectors.ndim != 2 or len(vectors) == 0:
        raise ValueError(
            f"vectors must be [users, width] with at least one user, got shape {list(vectors.shape)}"
        )
    vectors = vectors.to(torch.float32)
    bad = (~torch.isfinite(vectors).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"user row {int(bad[0])} has a NaN or an infinity ({len(bad):,} such rows in all)")
    return vectors


def _check_settings(damping: float, max_iter: int, convergence_iter: int) -> None:
    if not 0.5 <= damping < 1.0:
        raise ValueError(f"damping must be in [0.5, 1), got {damping}")
    if max_iter < 1 or convergence_iter < 1:
        raise ValueError(
            f"max_iter and convergence_iter must be at least 1, got {max_iter} and {convergence_iter}"
        )


def _check_similarities(similarities: Tensor) -> None:
    if similarities.ndim != 2 or similarities.shape[0] != similarities.shape[1] or not len(similarities):
        raise ValueError(f"similarities must be a square matrix, got shape {list(similarities.shape)}")
    if similarities.dtype != torch.float32:
        raise ValueError(f"similarities must be float32, got {similarities.dtype}")
    bad = (~torch.isfinite(_row_sums(similarities))).nonzero().flatten()
    if len(bad):
        raise ValueError(f"similarities: row {int(bad[0])} has a NaN or an infinity")


def resolve_preference(preference: Preference, similarities: Tensor) -> Tensor:
    """One float32 preference per user; see `affinity_propagation` for the choices.

    Raises:
        ValueError: a tensor of another length, or a preference that is not finite.
    """
    users = len(similarities)
    if preference is None or isinstance(preference, str):
        if preference not in (None, "median"):
            raise ValueError(
                f'preference must be a number, one number per user, or "median", got {preference!r}'
            )
        preference = float(np.median(similarities.cpu().numpy()))
    values = torch.as_tensor(preference, dtype=torch.float32, device=similarities.device).flatten()
    if len(values) not in (1, users) or not torch.isfinite(values).all():
        raise ValueError(
            f"preference must be one finite number, or one for each of {users} users, got {preference}"
        )
    return values.expand(users).contiguous()


def _propagate(
    similarities: Tensor,
    preferences_U: Tensor,
    *,
    damping: float,
    max_iter: int,
    convergence_iter: int,
    block_rows: int | None,
    all_tied: bool,
    on_round: OnRound,
) -> AffinityResult:
    similarities.diagonal().copy_(preferences_U)
    users = len(similarities)

    def result(exemplars: Tensor, *, converged: bool, rounds: int) -> AffinityResult:
        similarities.diagonal().copy_(preferences_U)
        exemplars, labels, net = refine(similarities, exemplars)
        mean = float(preferences_U.double().mean())
        return AffinityResult(exemplars, labels, converged, rounds, net, mean, damping)

    common = _common_similarity(similarities, preferences_U)
    if common is not None:
        alone = bool(preferences_U[0] > common)
        chosen = torch.arange(users if alone else 1, device=similarities.device)
        return result(chosen, converged=True, rounds=0)

    sums = _row_sums(similarities)
    groups = torch.zeros_like(sums, dtype=torch.int64) if all_tied else equal_sums(sums)
    size = max(float(preferences_U.abs().max()), 0.1 * float(sums.mean().abs()) / users)
    similarities.diagonal().sub_(tie_break(groups) * size)
    messages = _Messages(similarities, damping, block_rows)
    recent: deque[Tensor] = deque(maxlen=convergence_iter)
    unchanged, ties_looked_for = 0, False
    for number in range(1, max_iter + 1):
        is_exemplar = messages.round()
        changed = int((is_exemplar != recent[-1]).sum()) if recent else users
        unchanged = unchanged + 1 if changed == 0 else 1
        recent.append(is_exemplar)
        found = int(is_exemplar.sum())
        on_round(found, changed)
        # scikit-learn looks for the first time after convergence_iter + 1 rounds
        if not found or unchanged < convergence_iter or number <= convergence_iter:
            continue
        undecided = messages.undecided()
        if ties_looked_for or len(undecided) == 0:
            return result(is_exemplar.nonzero().flatten(), converged=True, rounds=number)
        ties_looked_for, unchanged = True, 0
        groups = torch.zeros_like(undecided)
        similarities.diagonal()[undecided] -= tie_break(groups) * size
    del messages
    candidates = {tuple(e.nonzero().flatten().tolist()): e for e in recent if bool(e.any())}
    chosen_sets = [e.nonzero().flatten() for e in reversed(candidates.values())] or [_central(similarities)]
    results = [result(e, converged=False, rounds=max_iter) for e in chosen_sets]
    return max(results, key=lambda r: r.net_similarity)


def _one_thread() -> None:
    """Run operations of the calling thread on one core."""
    torch.set_num_threads(1)


class _Messages:
    """Responsibilities and availabilities of all pairs: two `[U, U]` float32 matrices beside the similarities.

    Strips of rows go to threads, each of which computes on one core. Parallel operations on small blocks would meet at
    a barrier after each of them, and one busy core would then stop all (seen beside another program: 27 s a round,
    with strips 0.6 s). The number of strips is fixed and their column sums are added in order, so the number of
    threads changes no bit.
    """

    def __init__(self, similarities: Tensor, damping: float, block_rows: int | None) -> None:
        users, device = len(similarities), similarities.device
        self.similarities, self.damping = similarities, damping
        self.responsibilities = torch.zeros_like(similarities)
        self.availabilities = torch.zeros_like(similarities)
        self.block_bytes = block_rows * 4 * users if block_rows else BLOCK_BYTES
        self.strips = list(row_blocks(users, 1, max(1, -(-users // _STRIPS))))
        # what waits for the end of a round: r(k,k) + the positive r(i,k) of the others, and both diagonals, in float64
        self.column_sums = torch.zeros(users, dtype=torch.float64, device=device)
        self.self_responsibility = torch.zeros(users, dtype=torch.float64, device=device)
        self.self_availability = torch.zeros(users, dtype=torch.float64, device=device)
        on_cpu = device.type == "cpu"
        self.threads = ThreadPoolExecutor(torch.get_num_threads() if on_cpu else 1, initializer=_one_thread)

    def round(self) -> Tensor:
        """One round of both messages; returns `[U]` bool: whom the messages make an exemplar now."""
        totals = self.column_sums.to(torch.float32)
        sums = list(self.threads.map(lambda strip: self._strip(strip[0], strip[1], totals), self.strips))
        self.column_sums = torch.stack(sums).sum(dim=0)
        self.self_responsibility = self.responsibilities.diagonal().double()
        fresh = self.column_sums - self.self_responsibility
        self.self_availability.mul_(self.damping).add_(fresh, alpha=1.0 - self.damping)
        return self._belief() > 0

    def _strip(self, first: int, last: int, totals: Tensor) -> Tensor:
        """Both messages of the rows of a strip; returns their part of the column sums, float64 `[U]`."""
        users = len(self.similarities)
        with torch.inference_mode():  # belongs to the thread, not to the process
            sums = torch.zeros_like(self.column_sums)
            scratch = None
            for low, high in row_blocks(last - first, 4 * users, self.block_bytes):
                rows = slice(first + low, first + high)
                if scratch is None:
                    scratch = torch.empty_like(self.similarities[rows])
                part = scratch[: high - low]
                self._update_availabilities(rows, totals, part)
                self._update_responsibilities(rows, part)
                sums += self._block_sums(rows, part)
            return sums

    def undecided(self) -> Tensor:
        """Users for and against whom the messages say equally much, ascending: they are tied with each other."""
        return (self._belief() == 0).nonzero().flatten()

    def _belief(self) -> Tensor:
        """How much speaks for each user being an exemplar, `[U]`; exactly 0 where it is rounding."""
        belief = self.self_availability + self.self_responsibility
        size = self.self_availability.abs() + self.self_responsibility.abs()
        return belief.masked_fill(belief.abs() <= _ZERO_BELIEF * size, 0.0)

    def _update_availabilities(self, rows: slice, totals: Tensor, scratch: Tensor) -> None:
        """Availabilities of the round before, which had to wait for its column sums; zero in the first round."""
        block = self.availabilities[rows]
        torch.clamp_min(self.responsibilities[rows], 0.0, out=scratch)
        torch.sub(totals, scratch, out=scratch).clamp_(max=0.0)
        block.lerp_(scratch, 1.0 - self.damping)
        block[:, rows].diagonal().copy_(self.self_availability[rows])

    def _update_responsibilities(self, rows: slice, scratch: Tensor) -> None:
        similarities = self.similarities[rows]
        torch.add(self.availabilities[rows], similarities, out=scratch)
        best = scratch.argmax(dim=1, keepdim=True)
        first = scratch.gather(1, best)
        scratch.scatter_(1, best, -math.inf)
        second = scratch.amax(dim=1, keepdim=True)
        torch.sub(similarities, first, out=scratch)
        scratch.scatter_(1, best, similarities.gather(1, best) - second)
        self.responsibilities[rows].lerp_(scratch, 1.0 - self.damping)

    def _block_sums(self, rows: slice, scratch: Tensor) -> Tensor:
        block = self.responsibilities[rows]
        torch.clamp_min(block, 0.0, out=scratch)
        scratch[:, rows].diagonal().copy_(block[:, rows].diagonal())
        return scratch.sum(dim=0)


def _common_similarity(similarities: Tensor, preferences_U: Tensor) -> Tensor | None:
    """The similarity of all pairs when it is one and the same, and all preferences are equal; else None."""
    users = len(similarities)
    if users == 1:
        return torch.zeros((), device=similarities.device)
    if bool((preferences_U != preferences_U[0]).any()):
        return None
    value = similarities[0, 1]
    for low, high in row_blocks(users, 4 * users):
        differs = similarities[low:high] != value
        differs[:, low:high].fill_diagonal_(False)
        if bool(differs.any()):
            return None
    return value


def _row_sums(similarities: Tensor) -> Tensor:
    """Float64 sums, in blocks because torch would copy the whole matrix to float64."""
    users = len(similarities)
    blocks = row_blocks(users, 8 * users)
    return torch.cat([similarities[low:high].sum(dim=1, dtype=torch.float64) for low, high in blocks])


def equal_sums(sums_U: Tensor) -> Tensor:
    """Group of each user, `[U]` int64, -1 for a user alone: users whose similarities have the same sum.

    Equal vectors are in a group, and so are users that a symmetry of the whole set maps onto each other.
    """
    values, order = sums_U.sort(stable=True)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = values.diff() > _EQUAL_SUMS * values[1:].abs()
    number = starts.cumsum(0) - 1
    number = torch.where(number.bincount()[number] > 1, number, -1)
    return torch.empty_like(order).scatter_(0, order, number)


def tie_break(groups_U: Tensor) -> Tensor:
    """Share by which each preference is lowered, `[U]` float32: 0 for the first of a group and for users alone (-1)."""
    order = groups_U.argsort(stable=True)
    _, inverse, counts = torch.unique_consecutive(groups_U[order], return_inverse=True, return_counts=True)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[inverse]
    # the first stands clear of the others even in a group of more users than float32 has steps
    share = torch.where(rank > 0, 0.5 + 0.5 * rank / counts[inverse], 0.0)
    share = share.masked_fill(groups_U[order] < 0, 0.0)
    return torch.empty_like(share).scatter_(0, order, share).to(torch.float32) * TIE_BREAK


def _central(similarities: Tensor) -> Tensor:
    """The user with the largest sum of similarities: for squared distances, the one nearest to the mean of all."""
    return _column_sums(similarities).argmax(keepdim=True)


def _column_sums(similarities: Tensor, members: Tensor | None = None) -> Tensor:
    """Sums over the members' rows of the members' columns, float64, in blocks."""
    count = len(similarities) if members is None else len(members)
    sums = torch.zeros(count, dtype=torch.float64, device=similarities.device)
    for low, high in row_blocks(count, 4 * count):
        if members is None:
            sums += similarities[low:high].sum(dim=0, dtype=torch.float64)
        else:
            sums += similarities[members[low:high, None], members].sum(dim=0, dtype=torch.float64)
    return sums


def label(similarities: Tensor, exemplars_E: Tensor) -> tuple[Tensor, Tensor]:
    """Most similar exemplar of every user (the first among equals; an exemplar has itself) and that similarity.

    Returns:
        labels_U int64, positions in E; similarity_U float32, for an exemplar its own preference.
    """
    users = len(similarities)
    labels = torch.empty(users, dtype=torch.int64, device=similarities.device)
    for low, high in row_blocks(users, 4 * len(exemplars_E)):
        labels[low:high] = similarities[low:high].index_select(1, exemplars_E).argmax(dim=1)
    labels[exemplars_E] = torch.arange(len(exemplars_E), device=similarities.device)
    chosen = exemplars_E[labels]
    return labels, similarities.gather(1, chosen[:, None]).flatten()


def refine(similarities: Tensor, exemplars_E: Tensor) -> tuple[Tensor, Tensor, float]:
    """Make the most central member of each cluster its exemplar, then label again (scikit-learn's last step).

    For squared Euclidean distances the most central member is the one nearest to the cluster's mean, which is
    also EIMF's rule for a cluster without a centre. Ties go to the lowest index.

    Args:
        similarities: `[U, U]` with the preferences on the diagonal.
        exemplars_E: at least one position in U.

    Returns:
        exemplars_E ascending, labels_U, net similarity.
    """
    labels, _ = label(similarities, exemplars_E)
    order = torch.argsort(labels, stable=True)
    clusters = order.split(torch.bincount(labels, minlength=len(exemplars_E)).tolist())
    central = [members[_column_sums(similarities, members).argmax()] for members in clusters]
    exemplars_E = torch.stack(central).sort().values
    labels, own = label(similarities, exemplars_E)
    return exemplars_E, labels, float(own.sum(dtype=torch.float64))
