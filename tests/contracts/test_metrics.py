"""What is asked of every file in `evaluation/metrics/`."""

import inspect

import numpy as np
import pytest

from distributed_mi.core.registry import choices, resolve
from distributed_mi.evaluation.metrics.base import CatalogueInfo, Metric, RankedLists, UserMetric

NUM_USERS, LENGTH, NUM_ITEMS = 40, 12, 60
CUTS = (1, 2, 5, 12)
GROWS_WITH_K = {"recall", "hit_rate", "mrr", "coverage"}
READS_LABELS = {"recall", "hit_rate", "mrr", "ndcg", "ndcg_hits"}


def random_lists(rng: np.random.Generator) -> RankedLists:
    ranked = np.stack([rng.permutation(NUM_ITEMS)[:LENGTH] + 1 for _ in range(NUM_USERS)])
    ranked[0, 3:] = 0  # a short list
    counts = rng.integers(1, 6, size=NUM_USERS)
    labels = rng.integers(1, NUM_ITEMS + 1, size=counts.sum())
    catalogue = CatalogueInfo(NUM_ITEMS, np.concatenate([[-1], rng.integers(-1, 4, size=NUM_ITEMS)]))
    return RankedLists(ranked, labels, np.concatenate([[0], np.cumsum(counts)]), catalogue)


def reordered(lists: RankedLists, order: np.ndarray) -> RankedLists:
    parts = [lists.labels_S[lists.offsets[u] : lists.offsets[u + 1]] for u in order]
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])])
    return RankedLists(lists.ranked_UN[order], np.concatenate(parts), offsets, lists.catalogue)


@pytest.fixture(params=choices("metric"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def metric(name: str) -> Metric:
    return resolve("metric", name)()


@pytest.fixture
def lists(rng: np.random.Generator) -> RankedLists:
    return random_lists(rng)


def test_is_a_documented_metric(name: str, metric: Metric) -> None:
    doc = inspect.getdoc(type(metric)) or ""
    assert isinstance(metric, Metric)
    assert "Source:" in doc
    assert "@k =" in doc, "the docstring states the formula"


@pytest.mark.parametrize("k", CUTS)
def test_lies_between_0_and_1(metric: Metric, lists: RankedLists, k: int) -> None:
    assert 0.0 <= metric.value(lists, k) <= 1.0
    if isinstance(metric, UserMetric):
        values = metric.per_user(lists, k)
        assert values.shape == (NUM_USERS,)
        assert values.dtype == np.float64
        assert ((values >= 0) & (values <= 1)).all()
        assert metric.value(lists, k) == pytest.approx(values.mean())


def test_order_of_users_does_not_matter(metric: Metric, lists: RankedLists, rng: np.random.Generator) -> None:
    order = rng.permutation(NUM_USERS)
    shuffled = reordered(lists, order)
    assert metric.value(shuffled, 5) == pytest.approx(metric.value(lists, 5), abs=1e-12)
    if isinstance(metric, UserMetric):
        np.testing.assert_allclose(metric.per_user(shuffled, 5), metric.per_user(lists, 5)[order])


def test_grows_with_k_where_it_should(name: str, metric: Metric, lists: RankedLists) -> None:
    values = [metric.value(lists, k) for k in range(1, LENGTH + 1)]
    if name in GROWS_WITH_K:
        assert values == sorted(values)
        assert values[-1] > values[0]
    else:
        assert len(set(values)) > 1, "the cut-off must have an effect"


def test_reads_only_the_first_k_ranks(metric: Metric, lists: RankedLists) -> None:
    cut = RankedLists(lists.ranked_UN[:, :5], lists.labels_S, lists.offsets, lists.catalogue)
    assert metric.value(cut, 5) == metric.value(lists, 5)
    assert metric.value(cut, 50) == metric.value(lists, 5), "a list shorter than k is not an error"


def test_no_hits_give_0(name: str, metric: Metric, lists: RankedLists) -> None:
    if name not in READS_LABELS:
        pytest.skip("does not read labels")
    absent = RankedLists(lists.ranked_UN % 30 + 31, lists.labels_S % 30 + 1, lists.offsets, lists.catalogue)
    assert metric.value(absent, LENGTH) == 0.0


def test_perfect_list_gives_1(name: str, metric: Metric) -> None:
    if name not in READS_LABELS:
        pytest.skip("does not read labels")
    catalogue = CatalogueInfo(9, np.full(10, -1))
    lists = RankedLists(np.array([[4, 2, 7, 1]]), np.array([2, 4]), np.array([0, 2]), catalogue)
    assert metric.value(lists, 4) == pytest.approx(1.0)


def test_empty_lists_and_no_users_give_0(metric: Metric) -> None:
    catalogue = CatalogueInfo(9, np.arange(-1, 9))
    blank = RankedLists(np.zeros((2, 3), np.int64), np.array([2, 4]), np.array([0, 1, 2]), catalogue)
    nobody = RankedLists(np.zeros((0, 3), np.int64), np.array([], np.int64), np.array([0]), catalogue)
    assert metric.value(blank, 3) == 0.0
    assert metric.value(nobody, 3) == 0.0
