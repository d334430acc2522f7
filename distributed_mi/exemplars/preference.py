"""How eager users are to be exemplars: a number, one for each, the median similarity, or what a wanted share asks for.

Shapes:  U users.
"""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from distributed_mi.exemplars import kernels
from distributed_mi.exemplars.similarity import Similarities, row_blocks

if TYPE_CHECKING:
    from distributed_mi.exemplars.problem import Problem

logger = logging.getLogger(__name__)

Preference = float | Tensor | Literal["median"] | None

_CLOSE = math.log(1.5)
"""Warm steps end when the preference is known up to this factor."""

_MEDIAN_ALL = 32_768
"""Up to so many users all similarities are looked at; above, those of so many users drawn at random."""


def resolve_preference(preference: Preference, similarities: Similarities) -> Tensor:
    """One float64 preference per user; see `affinity.affinity_propagation` for the choices.

    Raises:
        ValueError: a tensor of another length, or a preference that is not finite.
    """
    users = similarities.users
    if preference is None or isinstance(preference, str):
        if preference not in (None, "median"):
            raise ValueError(
                f'preference must be a number, one number per user, or "median", got {preference!r}'
            )
        preference = median_similarity(similarities)
    values = torch.as_tensor(preference, device=similarities.device).to(torch.float64).flatten()
    if len(values) not in (1, users) or not torch.isfinite(values).all():
        raise ValueError(
            f"preference must be one finite number, or one for each of {users} users, got {preference}"
        )
    return values.expand(users).clone()


def median_similarity(similarities: Similarities) -> float:
    """The median of all similarities, those of users to themselves (0) included as in scikit-learn.

    Exact up to 32,768 users, in two passes over blocks of rows: float32 numbers order like their bits but for the sign,
    so a histogram of the upper half and then one of the lower half of the bits find the middle.
    """
    users = similarities.users
    ids = torch.arange(users)
    if users > _MEDIAN_ALL:
        ids = torch.randperm(users, generator=torch.Generator().manual_seed(0))[: _MEDIAN_ALL // 16]
    total = len(ids) * users
    ranks = sorted({(total - 1) // 2, total // 2})

    def histogram(high: int | None) -> np.ndarray:
        counts = np.zeros(1 << 16, dtype=np.int64)
        for low, stop in row_blocks(len(ids), 8 * users):
            values = similarities.rows(ids[low:stop].to(similarities.device)).cpu().numpy().ravel()
            if high is None:
                kernels.count_high_bits(values, counts)
            else:
                kernels.count_low_bits(values, np.uint32(high), counts)
        return counts

    upper = np.cumsum(histogram(None))
    found = []
    lower: dict[int, np.ndarray] = {}
    for rank in ranks:
        high = int(np.searchsorted(upper, rank, side="right"))
        if high not in lower:
            lower[high] = np.cumsum(histogram(high))
        before = int(upper[high - 1]) if high else 0
        low = int(np.searchsorted(lower[high], rank - before, side="right"))
        key = high << 16 | low
        bits = key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF)
        found.append(float(np.array([bits], dtype=np.uint32).view(np.float32)[0]))
    return sum(found) / len(found)


def preference_for_share(
    problem: "Problem",
    share: float,
    *,
    tolerance: float = 0.02,
    max_steps: int = 24,
    damping: float = 0.7,
    max_iter: int = 60,
    cold_iter: int = 200,
    on_step: Callable[[int, float, float], None] | None = None,
) -> tuple[float, list[tuple[float, float]]]:
    """The preference that makes a wanted share of the users exemplars, by bisection of its logarithm.

    First steps go on from the messages of the one before (a warm start), so that they need few rounds. What such a step
    finds is near to what a run of its own would, but not the same. So when they have come close, runs from the
    beginning take over the bisection, until one is within `tolerance` of the share.

    Args:
        problem: similarities and where their messages are kept.
        share: wanted exemplars per user, in (0, 1].
        tolerance: relative difference to the wanted share that will do.
        max_steps: steps of widening and bisection.
        damping: of the search; higher than a final run needs, because preferences jump.
        max_iter: rounds of a warm step.
        cold_iter: rounds of a run from the beginning.
        on_step: told about each step: its number, the preference, the share found.

    Returns:
        The preference, and all (preference, share) that were tried. It is the best of the runs from the beginning.

    Raises:
        ValueError: `share` out of range.
    """
    from distributed_mi.exemplars.affinity import settle

    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    users = problem.similarities.users
    wanted = max(1.0, share * users)

    def distance(step: tuple[float, float]) -> float:
        return abs(math.log(step[1] * users / wanted))

    tried: list[tuple[float, float]] = []
    colds: list[tuple[float, float]] = []
    messages: Any = None
    cold = False
    low, high = -math.inf, math.inf  # log of -preference: too many exemplars at `low`, too few at `high`
    point, stride = math.log(typical_distance(problem.similarities)), math.log(4.0)
    for step in range(1, max_steps + 1):
        cold = cold or step == max_steps
        preference = -math.exp(point)
        result = settle(
            problem,
            torch.full((users,), preference, dtype=torch.float64, device=problem.similarities.device),
            damping=damping,
            max_iter=cold_iter if cold else max_iter,
            convergence_iter=15 if cold else 6,
            warm=None if cold else messages,
        )
        messages = problem.last
        count = len(result.exemplars_E)
        tried.append((preference, count / users))
        if on_step:
            on_step(step, preference, count / users)
        near = abs(count - wanted) <= tolerance * wanted or count == round(wanted)
        if cold:
            colds.append(tried[-1])
            if near:
                break
        if count > wanted:
            low = point
        else:
            high = point
        if not cold and (near or high - low < _CLOSE):
            cold, stride = True, _CLOSE / 4
            low, high = -math.inf, math.inf
            if not near:
                point = math.log(-min(tried, key=distance)[0])
            continue
        if high - low < 1e-3:
            break
        if math.isinf(low):
            point, stride = point - stride, 2 * stride if cold else stride
        elif math.isinf(high):
            point, stride = point + stride, 2 * stride if cold else stride
        else:
            point = (low + high) / 2
    best = min(colds, key=distance)
    logger.info(
        "preference %.6g gives %.2f%% exemplars, %.2f%% are wanted", best[0], 100 * best[1], 100 * share
    )
    return best[0], tried


def typical_distance(similarities: Similarities) -> float:
    """Median squared distance of 512 evenly spaced users to all: where a search for a preference begins."""
    ids = torch.arange(0, similarities.users, max(1, similarities.users // 512), device=similarities.device)
    medians = [float(-similarities.rows(i[None]).median()) for i in ids[:512]]
    return max(float(np.median(medians)), 1e-12)
