"""First values depend on seed and row alone; a placement is a bijection."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed_mi.core.errors import InputError
from distributed_mi.embeddings.initial import normal_rows
from distributed_mi.embeddings.placement import Hashed, Modulo, Placement, Ranges, expected_load


def test_a_row_depends_on_seed_and_row_only() -> None:
    whole = normal_rows(np.arange(1000), 7, seed=5, std=0.5)
    some = np.array([999, 0, 17, 512])
    assert np.array_equal(normal_rows(some, 7, seed=5, std=0.5), whole[some])
    assert not np.array_equal(normal_rows(some, 7, seed=6, std=0.5)[0], whole[999])
    # A wider table begins with the same columns.
    assert np.array_equal(normal_rows(some, 9, seed=5, std=0.5)[:, :6], whole[some, :6])


def test_values_are_standard_normal() -> None:
    n = 20_000 * 16
    values = normal_rows(np.arange(1, 20_001), 16, seed=0, std=2.0).astype(np.float64) / 2.0
    # Five standard errors: of the mean 1/sqrt(n), of the variance sqrt(2/n), of the fourth moment sqrt(96/n).
    assert abs(values.mean()) < 5 / n**0.5
    assert abs((values**2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / n) ** 0.5
    # P(|z| > 1.96) = 0.05.
    assert abs((np.abs(values) > 1.959964).mean() - 0.05) < 5 * (0.05 * 0.95 / n) ** 0.5


def test_rows_columns_and_seeds_are_not_correlated() -> None:
    a = normal_rows(np.arange(1, 4001), 8, seed=0, std=1.0)
    b = normal_rows(np.arange(1, 4001), 8, seed=1, std=1.0)
    limit = 5 / 4000**0.5
    columns = np.corrcoef(np.concatenate([a, b], axis=1).T) - np.eye(16)
    assert np.abs(columns).max() < limit
    assert abs(np.corrcoef(a[1:].ravel(), a[:-1].ravel())[0, 1]) < 5 / (3999 * 8) ** 0.5


def test_padding_is_zero_and_the_standard_deviation_scales() -> None:
    rows = normal_rows(np.array([0, 1]), 4, seed=0, std=1.0)
    assert rows[0].tolist() == [0.0] * 4
    np.testing.assert_allclose(normal_rows(np.array([1]), 4, seed=0, std=3.0)[0], 3 * rows[1], rtol=1e-6)


@given(num_rows=st.integers(2, 200), workers=st.integers(1, 9))
def test_modulo_is_a_bijection_with_ascending_slots(num_rows: int, workers: int) -> None:
    placement = Modulo(num_rows, workers)
    ids = torch.arange(num_rows)
    owned = [placement.owned(w) for w in range(workers)]
    assert sorted(torch.cat(owned).tolist()) == ids.tolist()
    assert max(len(o) for o in owned) == placement.capacity
    for worker, mine in enumerate(owned):
        assert placement.owner(mine).tolist() == [worker] * len(mine)
        assert placement.slot(mine).tolist() == list(range(len(mine)))
    assert len(set(placement.key(ids).tolist())) == num_rows


def test_modulo_spreads_popular_rows() -> None:
    # Zipf weights, most popular first. Equal ranges would give the first of four workers H(250) / H(1000) = 6.10 / 7.49
    # = 81% of the lookups of 1,000 items; modulo gives the one with item 1 a third.
    weight = 1 / torch.arange(1, 1001, dtype=torch.float64)
    owner = Modulo(1001, 4).owner(torch.arange(1, 1001))
    share = torch.zeros(4, dtype=torch.float64).index_add_(0, owner, weight) / weight.sum()
    assert (weight[:250].sum() / weight.sum()).item() == pytest.approx(0.81, abs=0.01)
    assert share.max() < 1 / 3


@given(st.integers(2, 300), st.integers(1, 7))
def test_hashed_is_a_bijection(num_rows: int, workers: int) -> None:
    check_bijection(Hashed(num_rows, workers))


@given(st.lists(st.floats(0, 1e6), min_size=7, max_size=200), st.integers(1, 7))
def test_ranges_are_a_bijection_within_their_bound(load: list[float], workers: int) -> None:
    placement = Ranges.balanced(np.array(load), workers)
    check_bijection(placement)
    assert placement.capacity <= max(1, 2 * len(load) // workers) or workers == 1


def check_bijection(placement: Placement) -> None:
    ids = torch.arange(placement.num_rows)
    owner, slot = placement.owner(ids), placement.slot(ids)
    for worker in range(placement.num_workers):
        owned = placement.owned(worker)
        assert torch.equal(slot[owned], torch.arange(len(owned)))
        assert bool((owner[owned] == worker).all())
        assert len(owned) <= placement.capacity
    assert torch.equal(
        torch.cat([placement.owned(w) for w in range(placement.num_workers)]).sort().values, ids
    )
    assert (int(owner[0]), int(slot[0])) == (0, 0)


def test_ranges_balance_the_load_of_distinct_ids() -> None:
    load = expected_load(1 / np.arange(1, 1001), 500)

    def largest(placement: Placement) -> float:
        owner = placement.owner(torch.arange(1000)).numpy()
        return float((np.bincount(owner, weights=load, minlength=4) / load.sum()).max())

    assert largest(Ranges.balanced(load, 4, max_rows=3)) < 0.26
    assert largest(Ranges.balanced(load, 4)) < 0.29  # bound to 500 rows, the last range cannot take its share
    # Four equal ranges would give the first one this much of it.
    assert load[:250].sum() / load.sum() > 0.4


def test_expected_load_is_the_mean_number_of_distinct_draws() -> None:
    counts = np.array([0.0, 5.0, 3.0, 1.0, 1.0])
    rng = np.random.default_rng(0)
    drawn = rng.choice(5, size=(20_000, 4), p=counts / counts.sum())
    seen = np.stack([(drawn == item).any(axis=1).mean() for item in range(5)])
    assert np.abs(seen - expected_load(counts, 4)).max() < 0.01


def test_bounds_that_do_not_ascend_and_too_few_rows_are_refused() -> None:
    with pytest.raises(InputError, match="must ascend from 0"):
        Ranges([0, 5, 5])
    with pytest.raises(InputError, match="3 rows are too few for 4 workers"):
        Ranges.balanced(np.ones(3), 4)
    with pytest.raises(InputError, match="hashed holds at most"):
        Hashed(4_000_000_000, 2)
