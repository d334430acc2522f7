"""Ranked lists -> metrics, per user and over all, with bootstrap intervals.

Shapes:  U users, M metrics, R resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distributed_mi.core.errors import ConfigError
from distributed_mi.core.registry import resolve
from distributed_mi.core.seeding import stream
from distributed_mi.evaluation.config import MetricSpec, parse_metric
from distributed_mi.evaluation.metrics.base import Floats, Metric, RankedLists, UserMetric

_DRAWS_AT_ONCE = 4_000_000
"""Resampled users held in memory at once: 32 MB of indices."""


@dataclass(frozen=True)
class Scores:
    """What was measured.

    Args:
        values: metric -> value over all users; None when the data cannot have it (categories are missing).
        per_user: metric -> float64 `[U]`, for the metrics that have a value for each user.
    """

    values: dict[str, float | None]
    per_user: dict[str, Floats]


def build(specs: Sequence[str]) -> dict[MetricSpec, Metric]:
    """Metric objects of `name@k` strings.

    Raises:
        ConfigError: a string is malformed, or names something that is not a metric. UnknownNameError: no such metric.
    """
    metrics: dict[MetricSpec, Metric] = {}
    for text in specs:
        spec = parse_metric(text)
        found = resolve("metric", spec.name)
        if not (isinstance(found, type) and issubclass(found, Metric)):
            raise ConfigError(f'metric "{spec.name}" is {found!r}, not a subclass of Metric')
        metrics[spec] = found()
    return metrics


def longest(specs: Sequence[str]) -> int:
    """The largest k of `name@k` strings: how long the ranked lists must be."""
    return max(parse_metric(text).k for text in specs)


def score(lists: RankedLists, specs: Sequence[str]) -> Scores:
    """Compute every metric on one set of ranked lists."""
    values: dict[str, float | None] = {}
    per_user: dict[str, Floats] = {}
    for spec, metric in build(specs).items():
        name = str(spec)
        if metric.needs_categories and not lists.catalogue.has_categories:
            values[name] = None
        elif isinstance(metric, UserMetric):
            per_user[name] = metric.per_user(lists, spec.k)
            values[name] = float(per_user[name].mean()) if lists.num_users else 0.0
        else:
            values[name] = metric.value(lists, spec.k)
    return Scores(values, per_user)


def resampled_means(values_UM: Floats, samples: int, seed: int) -> Floats:
    """Means over users drawn with replacement.

    All metrics see the same resamples, in blocks that keep memory bounded; the draws depend on seed, U and `samples`.

    Returns:
        float64 `[R, M]`.
    """
    num_users = len(values_UM)
    generator = stream(seed, "bootstrap")
    blocks = []
    for size in _blocks(samples, max(1, _DRAWS_AT_ONCE // max(num_users, 1))):
        weights_RU = np.empty((size, num_users))
        for row in weights_RU:
            row[:] = np.bincount(generator.integers(num_users, size=num_users), minlength=num_users)
        blocks.append(weights_RU @ values_UM / num_users)
    return np.concatenate(blocks)


def _blocks(total: int, size: int) -> Iterator[int]:
    while total > 0:
        yield min(size, total)
        total -= size


def intervals(per_user: dict[str, Floats], samples: int, seed: int) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals over users (Efron and Tibshirani 1993, chapter 13).

    Args:
        per_user: metric -> float64 `[U]`.
        samples: resamples; 0 gives no intervals.
        seed: of the resampling.
    """
    names = [name for name, values in per_user.items() if len(values)]
    if not names or samples == 0:
        return {}
    means_RM = resampled_means(np.stack([per_user[n] for n in names], axis=1), samples, seed)
    low, high = np.percentile(means_RM, [2.5, 97.5], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
