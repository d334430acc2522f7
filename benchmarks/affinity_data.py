"""Vectors for `bench_affinity` where no file is given, and the numbers it computes by itself.

Shapes:  U users, D width of the vectors, E exemplars.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_BLOCK_USERS = 100_000

USERS_PER_BLOB = 40

LEAST_MEMBERS = 4
"""Of a planted cluster."""


def write_blobs(path: Path, users: int, width: int, seed: int) -> None:
    """Vectors of length about 1 around one centre for every 40 users, a quarter of the variance within."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0.0, width**-0.5, (max(1, users // USERS_PER_BLOB), width))
    _write_around(path, centres, rng.integers(0, len(centres), users), 0.5 * width**-0.5, rng)


def plant(users: int, clusters: int, seed: int) -> np.ndarray:
    """The cluster of each user: `clusters` of uneven size (log-normal weights, at least 4 members), in random order.

    Raises:
        ValueError: too few users for so many clusters.
    """
    if users < LEAST_MEMBERS * clusters:
        raise ValueError(
            f"{clusters:,} clusters need at least {LEAST_MEMBERS * clusters:,} users, got {users:,}"
        )
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0.0, 0.7, clusters)
    sizes = LEAST_MEMBERS + rng.multinomial(users - LEAST_MEMBERS * clusters, weights / weights.sum())
    return rng.permutation(np.repeat(np.arange(clusters), sizes))


def write_planted(path: Path, plant_U: np.ndarray, width: int, seed: int) -> None:
    """Points N(centre, 1) around centres N(0, 3^2)."""
    rng = np.random.default_rng(seed + 1)
    centres = rng.normal(0.0, 3.0, (int(plant_U.max()) + 1, width))
    _write_around(path, centres, plant_U, 1.0, rng)


def _write_around(
    path: Path, centres: np.ndarray, cluster_U: np.ndarray, spread: float, rng: np.random.Generator
) -> None:
    shape = (len(cluster_U), centres.shape[1])
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    centres = centres.astype(np.float32)
    for low in range(0, len(cluster_U), _BLOCK_USERS):
        own = cluster_U[low : low + _BLOCK_USERS]
        noise = rng.standard_normal((len(own), shape[1]), dtype=np.float32)
        vectors[low : low + len(own)] = centres[own] + np.float32(spread) * noise
    vectors.flush()


def net_similarity(
    vectors_UD: np.ndarray, exemplars_E: np.ndarray, labels_U: np.ndarray, preference: float
) -> float:
    """By definition, in float64: minus the squared distances of users to their exemplar, plus a preference for each."""
    total = preference * len(exemplars_E)
    for low in range(0, len(vectors_UD), _BLOCK_USERS):
        rows = slice(low, low + _BLOCK_USERS)
        own = vectors_UD[exemplars_E[labels_U[rows]]].astype(np.float64)
        total -= float(np.square(vectors_UD[rows] - own).sum())
    return total


def fit_power(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Exponent and factor of `value = factor * size ** exponent`, least squares in the logarithms.

    Raises:
        ValueError: fewer than two different sizes, or a value that is not positive.
    """
    if len(set(sizes)) < 2 or min(values) <= 0.0:
        raise ValueError(
            f"needs two different sizes and positive values, got {list(sizes)} and {list(values)}"
        )
    exponent, constant = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(exponent), float(np.exp(constant))
