"""The cost model's counts, by hand and by drawing."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.cost_model import Job, Law, Machine, billion_rows, predict

MACHINE = Machine(flops=1e9, memory=1e8, link=1e7, latency=1e-3)
JOB = Job(
    rows=1_000,
    law=Law.uniform(1_000),
    users=10,
    history=9,
    negatives=5,
    width=8,
    attention=4,
    interests=2,
    state=1,
    dense=100,
)


def test_distinct_rows_of_counts_are_the_mean_over_drawings() -> None:
    counts = np.array([50.0, 20.0, 20.0, 5.0, 5.0])
    rng = np.random.default_rng(0)
    drawn = rng.choice(5, size=(20_000, 6), p=counts / counts.sum())
    mean = np.mean([len(set(row)) for row in drawn.tolist()])
    assert Law.of_counts(counts).distinct(6) == pytest.approx(mean, rel=0.01)


def test_a_grouped_zipf_law_is_the_law_of_its_rows() -> None:
    exact = Law.of_counts(np.arange(1, 50_001, dtype=np.float64) ** -1.05)
    for draws in (10, 1_000, 100_000):
        assert Law.zipf(50_000, 1.05).distinct(draws) == pytest.approx(exact.distinct(draws), rel=0.01)


def test_counts_of_one_worker_by_hand() -> None:
    cost = predict(JOB, MACHINE, 1)
    unique = 1_000 * (1 - 0.999**100)
    negatives = 1_000 * (1 - 0.999**5)
    assert cost.unique_ids == pytest.approx(unique + negatives * (1 - unique / 1_000))
    assert cost.exchanged_bytes == cost.dense_bytes == cost.latency_s == 0
    assert cost.operations == 6 * (10 * 9 * 4 * (8 + 2) + 10 * 5 * 8)
    assert cost.table_resident_bytes == 4 * 1_000 * 9


def test_two_workers_halve_the_work_and_exchange_half_of_their_rows() -> None:
    one, two = predict(JOB, MACHINE, 1), predict(JOB, MACHINE, 2)
    assert two.operations == one.operations / 2
    assert two.exchanged_bytes == pytest.approx(two.unique_ids * (8 + 2 * 4 * 8) / 2)
    assert two.dense_bytes == 400
    assert two.latency_s == pytest.approx(5e-3)
    assert predict(replace(JOB, number_bytes=2), MACHINE, 2).exchanged_bytes < two.exchanged_bytes


def test_what_a_user_costs_beside_products_is_shared_by_the_workers() -> None:
    machine = replace(MACHINE, per_user=0.1, fixed=0.5)
    assert predict(JOB, machine, 2).other_s == pytest.approx(0.5 + 0.5)


def test_a_billion_rows_fit_and_more_gpus_hold_less_each() -> None:
    resident = [cost.table_resident_bytes for _, _, cost in billion_rows()]
    assert resident == sorted(resident, reverse=True)
    assert resident[0] == pytest.approx(4 * 1e9 * 129 / 64)
