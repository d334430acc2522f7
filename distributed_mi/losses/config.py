"""Configuration of the negative sampler."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from distributed_mi.core.config import ConfigModel


class NegativesConfig(ConfigModel):
    """Which items a step's targets are compared with."""

    name: Literal["uniform", "log_uniform", "popularity"] = "uniform"
    """`uniform` over the catalogue; `log_uniform` in the popularity rank (item 1 is the most popular);
    `popularity`: how often an item occurs in training, to the power of `popularity_power`."""
    num_negatives: PositiveInt = 1280
    """N, negatives of a step, drawn with replacement and shared by all users of the step."""
    popularity_power: NonNegativeFloat = 1.0
    """Exponent on the counts of `popularity`; 0 is uniform over the items that occur in training."""
    log_q: bool = False
    """Subtract the log of the sampling probability from the logits, which makes sampled softmax an estimate of the
    full one. Without effect for `uniform`."""
