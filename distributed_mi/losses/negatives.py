"""Negatives of a step: a pure function of seed and step.

So every worker draws the same ones, and a resumed run continues as if it had not stopped.

    uniform       P(c) = 1 / (V - 1)
    log_uniform   P(c) = (log(c + 1) - log(c)) / log(V)      item 1 is the most popular
    popularity    P(c) proportional to count_c ^ power

for c = 1 .. V - 1; padding (0) is never drawn. Draws are with replacement and may contain targets: the losses mask
those (`mask_accidental_hits`). TensorFlow's ComiRec draws without replacement and can draw padding, REMI's code
draws uniformly from 0 .. V - 1.

Shapes:  V items with padding, N negatives.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.errors import ConfigError, InputError
from distributed_mi.core.seeding import stream
from distributed_mi.losses.config import NegativesConfig


@dataclass(frozen=True)
class Negatives:
    """The shared negatives of one step.

    Args:
        ids_N: int64 in 1 .. V - 1, may repeat.
        sampler: what drew them.
    """

    ids_N: Tensor
    sampler: "NegativeSampler"

    @cached_property
    def log_q_N(self) -> Tensor:
        """Log of the probability of drawing each in one draw, float32."""
        return self.sampler.log_q(self.ids_N)


class NegativeSampler:
    """Draws the shared negatives of each step."""

    def __init__(
        self,
        config: NegativesConfig,
        *,
        num_rows: int,
        seed: int,
        num_train_events_V: np.ndarray | None = None,
    ) -> None:
        """Prepare the distribution.

        Args:
            config: which distribution and how many.
            num_rows: V, padding included.
            seed: seed of the run.
            num_train_events_V: events of each item in training; needed by `popularity`.

        Raises:
            InputError: fewer than two rows, or `popularity` without usable counts.
        """
        if num_rows < 2:
            raise InputError(f"negative sampler: a catalogue of {num_rows - 1} items has nothing to sample")
        self.config, self.num_rows, self.seed = config, num_rows, seed
        self.num_negatives = config.num_negatives
        self._cumulative: np.ndarray | None = None
        probabilities = self._probabilities(num_train_events_V)
        floor = probabilities[probabilities > 0].min()
        self._log_q_V = torch.from_numpy(np.log(np.maximum(probabilities, floor)).astype(np.float32))
        if config.name == "popularity":
            self._cumulative = np.cumsum(probabilities)

    def _probabilities(self, counts_V: np.ndarray | None) -> np.ndarray:
        v = self.num_rows
        ids = np.arange(1, v, dtype=np.float64)
        if self.config.name == "uniform":
            body = np.full(v - 1, 1.0 / (v - 1))
        elif self.config.name == "log_uniform":
            body = np.log1p(1.0 / ids) / np.log(v)
        else:
            body = self._popularity(counts_V)
        return np.concatenate([[0.0], body])

    def _popularity(self, counts_V: np.ndarray | None) -> np.ndarray:
        if counts_V is None:
            raise ConfigError("negatives: popularity needs the number of training events of each item")
        counts = np.asarray(counts_V, dtype=np.float64)
        if counts.shape != (self.num_rows,) or not np.isfinite(counts).all() or counts.min() < 0:
            raise InputError(
                f"negatives: need {self.num_rows} finite counts of at least 0, got shape {counts.shape}"
            )
        weights = np.where(counts[1:] > 0, counts[1:] ** self.config.popularity_power, 0.0)
        if weights.sum() <= 0:
            raise InputError("negatives: no item has training events, so popularity cannot be sampled")
        return weights / weights.sum()

    def draw(self, step: int) -> Negatives:
        """The negatives of a step; the same for every worker and every attempt."""
        generator = stream(self.seed, "negatives", step)
        n, v = self.num_negatives, self.num_rows
        if self.config.name == "uniform":
            ids = generator.integers(1, v, size=n)
        elif self.config.name == "log_uniform":
            ids = np.minimum(np.exp(generator.random(n) * np.log(v)).astype(np.int64), v - 1)
        else:
            assert self._cumulative is not None
            drawn = np.searchsorted(
                self._cumulative, generator.random(n) * self._cumulative[-1], side="right"
            )
            ids = np.minimum(drawn, v - 1)
        return Negatives(torch.from_numpy(ids.astype(np.int64, copy=False)), self)

    def log_q(self, ids: Tensor) -> Tensor:
        """Log probability of drawing each id in one draw, float32.

        Ids that are never drawn (padding, items without training events) get the smallest probability of those that
        are, so that a correction stays finite.
        """
        return self._log_q_V[ids]
