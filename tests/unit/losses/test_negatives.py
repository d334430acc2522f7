"""Negative sampling: pure in (seed, step), inside the catalogue, with the stated probabilities."""

import numpy as np
import pytest
import torch

from distributed_mi.core.errors import ConfigError, InputError
from distributed_mi.losses.config import NegativesConfig
from distributed_mi.losses.negatives import NegativeSampler

V = 21
COUNTS = np.array([99, *range(20, 0, -1)])


def sampler(name: str, num_negatives: int = 50, power: float = 1.0, seed: int = 1) -> NegativeSampler:
    config = NegativesConfig(name=name, num_negatives=num_negatives, popularity_power=power)
    return NegativeSampler(config, num_rows=V, seed=seed, num_train_events_V=COUNTS)


@pytest.mark.parametrize("name", ["uniform", "log_uniform", "popularity"])
def test_draws_are_a_function_of_seed_and_step(name: str) -> None:
    one, two = sampler(name), sampler(name)
    two.draw(0)  # the order of calls does not matter
    assert torch.equal(one.draw(7).ids_N, two.draw(7).ids_N)
    assert not torch.equal(one.draw(7).ids_N, one.draw(8).ids_N)
    assert not torch.equal(one.draw(7).ids_N, sampler(name, seed=2).draw(7).ids_N)


@pytest.mark.parametrize("name", ["uniform", "log_uniform", "popularity"])
def test_frequencies_follow_log_q_and_padding_is_never_drawn(name: str) -> None:
    n = 200_000
    negatives = sampler(name, num_negatives=n).draw(3)
    assert negatives.ids_N.dtype == torch.int64
    frequency = torch.bincount(negatives.ids_N, minlength=V).double() / n
    assert frequency[0] == 0
    q = sampler(name).log_q(torch.arange(1, V)).double().exp()
    assert q.sum().item() == pytest.approx(1.0, abs=1e-6)
    # Five standard errors of a frequency.
    assert ((frequency[1:] - q).abs() < 5 * (q * (1 - q) / n).sqrt()).all()
    assert torch.equal(negatives.log_q_N, sampler(name).log_q(negatives.ids_N))


def test_log_uniform_probabilities_by_hand() -> None:
    q = sampler("log_uniform").log_q(torch.tensor([1, 20])).exp().tolist()
    assert q == pytest.approx([np.log(2) / np.log(21), np.log(21 / 20) / np.log(21)], rel=1e-5)


def test_popularity_power() -> None:
    q = sampler("popularity", power=0.5).log_q(torch.tensor([1, 20])).exp()
    assert (q[0] / q[1]).item() == pytest.approx(20**0.5, rel=1e-5)


def test_items_without_training_events_are_never_drawn_and_keep_a_finite_log_q() -> None:
    counts = np.zeros(V)
    counts[[3, 5]] = [1, 3]
    config = NegativesConfig(name="popularity", num_negatives=1000, popularity_power=0.0)
    negatives = NegativeSampler(config, num_rows=V, seed=0, num_train_events_V=counts)
    assert set(negatives.draw(0).ids_N.tolist()) == {3, 5}
    assert torch.isfinite(negatives.log_q(torch.arange(V))).all()


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(ConfigError, match="popularity needs"):
        NegativeSampler(NegativesConfig(name="popularity"), num_rows=V, seed=0)
    with pytest.raises(InputError, match="need 21 finite counts"):
        NegativeSampler(
            NegativesConfig(name="popularity"), num_rows=V, seed=0, num_train_events_V=COUNTS[:-1]
        )
    with pytest.raises(InputError, match="no item has training events"):
        NegativeSampler(NegativesConfig(name="popularity"), num_rows=V, seed=0, num_train_events_V=COUNTS * 0)
    with pytest.raises(InputError, match="nothing to sample"):
        NegativeSampler(NegativesConfig(), num_rows=1, seed=0)


def test_the_smallest_catalogue() -> None:
    for name in ("uniform", "log_uniform"):
        config = NegativesConfig(name=name, num_negatives=5)
        assert NegativeSampler(config, num_rows=2, seed=0).draw(0).ids_N.tolist() == [1] * 5
