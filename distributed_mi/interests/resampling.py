"""Means over users with bootstrap intervals, and paired differences with p-values.

`evaluation` has the like for metrics that every user has. Here a user may lack a value (NaN), and users who share an
exemplar share its interests: they are not independent, so they are drawn together as one group.

Shapes:  U users, G groups of users, M metrics, B resamples.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distributed_mi.core.resampling import sign_flip_p_values
from distributed_mi.core.seeding import stream

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CELLS_AT_ONCE = 4_000_000
"""Numbers of a block of resamples: 32 MB."""


@dataclass(frozen=True)
class Estimate:
    """A mean over users."""

    value: float | None
    """None when no user has a value."""
    ci95: tuple[float, float] | None
    """95 % percentile bootstrap interval; None with fewer than two groups of users."""
    num_users: int
    """Users with a value."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "value": self.value,
            "ci95": list(self.ci95) if self.ci95 else None,
            "num_users": self.num_users,
        }


@dataclass(frozen=True)
class Difference:
    """Mean difference of two values of the same users: B minus A."""

    metric: str
    value_a: float | None
    value_b: float | None
    difference: float | None
    ci95: tuple[float, float] | None
    """As in `Estimate`; users are drawn in pairs."""
    p_value: float | None
    """Two-sided, from random sign flips of the groups' differences; None without users."""
    num_users: int
    """Users with a value on both sides."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"ci95": list(self.ci95) if self.ci95 else None}


def estimates(
    per_user: Mapping[str, Floats], groups_U: Ints | None = None, *, samples: int = 1000, seed: int = 7
) -> dict[str, Estimate]:
    """Means over the users that have a value, with bootstrap intervals (Efron and Tibshirani 1993, chapters 8 and 13).

    Args:
        per_user: metric -> float64 `[U]`, NaN where a user has no value.
        groups_U: users with equal numbers are drawn together; None: each alone.
        samples: B; 0 gives no intervals.
        seed: of the draws, which all metrics share.
    """
    if not per_user:
        return {}
    values_UM = np.stack(list(per_user.values()), axis=1)
    sums_GM, counts_GM = _group_sums(values_UM, groups_U)
    totals_M = counts_GM.sum(axis=0)
    bands = _percentiles(sums_GM, counts_GM, samples, seed)
    out = {}
    for m, name in enumerate(per_user):
        known = (counts_GM[:, m] > 0).sum()
        value = float(sums_GM[:, m].sum() / totals_M[m]) if known else None
        band = (float(bands[0, m]), float(bands[1, m])) if known > 1 and samples else None
        out[name] = Estimate(value, band, int(totals_M[m]))
    return out


def _group_sums(values_UM: Floats, groups_U: Ints | None) -> tuple[Floats, Floats]:
    """Sum and number of the known values of each group, `[G, M]` each."""
    known_UM = ~np.isnan(values_UM)
    values_UM = np.where(known_UM, values_UM, 0.0)
    if groups_U is None:
        return values_UM, known_UM.astype(np.float64)
    numbers, group_of_U = np.unique(groups_U, return_inverse=True)
    sums_GM, counts_GM = np.zeros((2, len(numbers), values_UM.shape[1]))
    np.add.at(sums_GM, group_of_U, values_UM)
    np.add.at(counts_GM, group_of_U, known_UM)
    return sums_GM, counts_GM


def _percentiles(sums_GM: Floats, counts_GM: Floats, samples: int, seed: int) -> Floats:
    """2.5 and 97.5 % points of the resampled means, `[2, M]`; NaN without groups or samples."""
    num_groups, num_metrics = sums_GM.shape
    if not num_groups or not samples:
        return np.full((2, num_metrics), np.nan)
    generator = stream(seed, "bootstrap")
    means_BM = np.empty((samples, num_metrics))
    step = max(1, _CELLS_AT_ONCE // num_groups)
    for low in range(0, samples, step):
        weights_BG = np.empty((min(step, samples - low), num_groups))
        for row in weights_BG:
            row[:] = np.bincount(generator.integers(num_groups, size=num_groups), minlength=num_groups)
        counts_BM = weights_BG @ counts_GM
        means_BM[low : low + step] = np.divide(
            weights_BG @ sums_GM, counts_BM, out=np.full_like(counts_BM, np.nan), where=counts_BM > 0
        )
    means_BM[:, np.isnan(means_BM).all(axis=0)] = 0.0  # no user has a value; not reported
    return np.asarray(np.nanpercentile(means_BM, [2.5, 97.5], axis=0))


def paired_differences(
    a: Mapping[str, Floats],
    b: Mapping[str, Floats],
    groups_U: Ints | None = None,
    *,
    samples: int = 1000,
    permutations: int = 10_000,
    seed: int = 7,
) -> list[Difference]:
    """Compare two sides user by user, so that what makes a user easy or hard for both cancels.

    Args:
        a: metric -> float64 `[U]`, NaN where a user has no value.
        b: of the same users in the same order; metrics that only one side has are left out.
        groups_U: users with equal numbers change sides, and are drawn, together; None: each alone.
        samples: bootstrap resamples.
        permutations: random sign assignments (Fisher's randomisation test). The observed one counts as one of them, so
            p is at least `1 / (permutations + 1)`.
        seed: of both.
    """
    names = [n for n in a if n in b]
    both = {n: ~np.isnan(a[n]) & ~np.isnan(b[n]) for n in names}
    sides = {n: [np.where(both[n], side[n], np.nan) for side in (a, b)] for n in names}
    found = estimates({n: y - x for n, (x, y) in sides.items()}, groups_U, samples=samples, seed=seed)
    p_values = {}
    if names:
        sums_GM, _ = _group_sums(np.stack([y - x for x, y in sides.values()], axis=1), groups_U)
        p_values = dict(zip(names, sign_flip_p_values(sums_GM, permutations, seed).tolist(), strict=True))
    out = []
    for n in names:
        values = [float(x[both[n]].mean()) if both[n].any() else None for x in sides[n]]
        e = found[n]
        p = p_values[n] if e.num_users else None
        out.append(Difference(n, values[0], values[1], e.value, e.ci95, p, e.num_users))
    return out
