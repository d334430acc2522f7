"""How far apart the user vectors are, and the one factor that brings them to the scale that the preference expects.

Model-facts behind the target: EIMF's printed exemplar shares fit vectors whose squared nearest-neighbour distances are
between 2 and 4.

Shapes:  U users, Q users asked for their neighbour, D width.
"""

import math

import numpy as np

from distributed_mi.core.seeding import stream

TARGET_SQUARED_NN_DISTANCE = 3.0
"""Median squared distance to the nearest other user after rescaling."""

_QUERIES = 5_000
_CANDIDATES = 200_000
_PAIRS = 200_000
_BLOCK_BYTES = 64 << 20
_ROUNDING = 1e-14


def squared_nn_distances(vectors_UD: np.ndarray, *, queries: int = _QUERIES) -> np.ndarray:
    """Squared Euclidean distance to the nearest other user, exact, for up to `queries` users drawn with a fixed seed.

    Among more than 200,000 users the neighbour is looked for in as many drawn ones.

    Returns:
        `[Q]` float64; empty when there is one user.
    """
    if len(vectors_UD) < 2:
        return np.empty(0)
    generator = stream(0, "text/distances")
    points = vectors_UD
    if len(points) > _CANDIDATES:
        points = points[np.sort(generator.choice(len(points), _CANDIDATES, replace=False))]
    chosen = np.arange(len(points))
    if len(points) > queries:
        chosen = np.sort(generator.choice(len(points), queries, replace=False))
    points = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    norms = np.einsum("ud,ud->u", points, points)
    step = max(1, _BLOCK_BYTES // (8 * len(points)))
    found = []
    for low in range(0, len(chosen), step):
        ids = chosen[low : low + step]
        sums = norms[ids, None] + norms
        distances = sums - 2.0 * (points[ids] @ points.T)
        distances[distances < _ROUNDING * sums] = 0.0
        distances[np.arange(len(ids)), ids] = np.inf
        found.append(distances.min(axis=1))
    return np.concatenate(found)


def median_squared_distance(vectors_UD: np.ndarray) -> float | None:
    """Median squared distance of two different users, over 200,000 pairs drawn with a fixed seed; None for one user."""
    users = len(vectors_UD)
    if users < 2:
        return None
    generator = stream(0, "text/pairs")
    first = generator.integers(users, size=_PAIRS)
    second = (first + generator.integers(1, users, size=_PAIRS)) % users
    found = []
    for low in range(0, _PAIRS, 20_000):
        difference = vectors_UD[first[low : low + 20_000]] - vectors_UD[second[low : low + 20_000]]
        found.append(np.einsum("pd,pd->p", difference, difference, dtype=np.float64))
    return float(np.median(np.concatenate(found)))


def scale_factor(squared_nn: np.ndarray) -> float:
    """Factor on the vectors that brings the median squared nearest-neighbour distance to the target.

    When more than half of the users have a twin the median is 0; then it is taken over the others.

    Returns:
        1.0 when no two users differ.
    """
    median = float(np.median(squared_nn)) if len(squared_nn) else 0.0
    if median <= 0.0:
        positive = squared_nn[squared_nn > 0.0]
        median = float(np.median(positive)) if len(positive) else TARGET_SQUARED_NN_DISTANCE
    return math.sqrt(TARGET_SQUARED_NN_DISTANCE / median)
