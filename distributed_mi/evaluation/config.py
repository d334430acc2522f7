"""Configuration of the evaluate stage."""

from typing import Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from distributed_mi.core.config import ConfigModel, runtime
from distributed_mi.core.errors import ConfigError
from distributed_mi.core.registry import require_known


class MetricSpec(NamedTuple):
    """A metric of the registry at one list length, written `recall@20`."""

    name: str
    k: int

    def __str__(self) -> str:
        return f"{self.name}@{self.k}"


def parse_metric(text: str) -> MetricSpec:
    """Read `name@k`.

    Args:
        text: a file name of `evaluation/metrics` (or `package.module:Attribute`), `@`, and a list length.

    Raises:
        ConfigError: there is no `@k`, or k is not a positive integer. UnknownNameError: no metric has that name.
    """
    name, _, length = text.rpartition("@")
    if not name or not length.isdecimal() or int(length) < 1:
        raise ConfigError(f'metric "{text}" must look like name@k with k at least 1, for example recall@20')
    if ":" not in name:
        require_known("metric", name)
    return MetricSpec(name, int(length))


class EvaluateConfig(ConfigModel):
    """Which users are evaluated, and what is measured."""

    split: Literal["test", "validation"] = "test"
    """Users to evaluate. The validation users have already chosen the checkpoint: report the test users."""
    metrics: list[str] = Field(
        default=[
            "recall@20",
            "recall@50",
            "hit_rate@20",
            "hit_rate@50",
            "ndcg@20",
            "ndcg@50",
            "ndcg_hits@20",
            "ndcg_hits@50",
            "coverage@50",
            "category_diversity@20",
        ],
        min_length=1,
    )
    """Metrics as name@k; names are the files of `evaluation/metrics`, k is a list length in items."""
    exclude_seen: bool = False
    """Leave the items of a user's history out of the list. The published tables keep them."""
    bootstrap_samples: NonNegativeInt = 1000
    """Resamples of the users behind each 95 % interval. 0: no intervals."""
    bootstrap_seed: int = 7
    """Seed of the resampling."""
    num_workers: PositiveInt | None = runtime(None)
    """Workers that rank. None: this process alone when the item table takes less than 64 MiB, because starting workers
    would take longer than ranking; else `scaling.num_workers`."""
    users_per_batch: PositiveInt = runtime(4096)
    """Users that a worker ranks at once, rounded up to a multiple of 64; the lists do not depend on it."""

    @field_validator("metrics")
    @classmethod
    def _metrics_exist(cls, value: list[str]) -> list[str]:
        for text in value:
            try:
                parse_metric(text)
            except ConfigError as error:  # pydantic collects ValueError only
                raise ValueError(str(error)) from error
        if len(set(value)) != len(value):
            raise ValueError("a metric is named twice")
        return value
