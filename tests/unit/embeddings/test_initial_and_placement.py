"""First values depend on seed and row alone; a placement is a bijection."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed_mi.embeddings.initial import normal_rows
from distributed_mi.embeddings.placement import Modulo


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
