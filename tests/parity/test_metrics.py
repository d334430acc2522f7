"""Metrics against trec_eval (through ir-measures) on random lists, and against cases calculated by hand."""

import math

import numpy as np
import pytest

from distributed_mi.core.registry import resolve
from distributed_mi.evaluation.metrics import base
from distributed_mi.evaluation.metrics.base import CatalogueInfo, RankedLists

NUM_USERS, LENGTH, NUM_ITEMS = 60, 20, 80
TREC_EVAL = {"recall": "R", "hit_rate": "Success", "ndcg": "nDCG", "mrr": "RR"}


def per_user(name: str, lists: RankedLists, k: int) -> np.ndarray:
    return resolve("metric", name)().per_user(lists, k)


def one_user(ranked: list[int], labels: list[int], categories: list[int] | None = None) -> RankedLists:
    codes = np.full(21, -1) if categories is None else np.array([-1, *categories])
    info = CatalogueInfo(len(codes) - 1, codes)
    return RankedLists(np.array([ranked]), np.array(labels), np.array([0, len(labels)]), info)


@pytest.fixture(scope="module")
def random_case() -> tuple[RankedLists, dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    generator = np.random.default_rng(5)
    ranked = np.stack([generator.permutation(NUM_ITEMS)[:LENGTH] + 1 for _ in range(NUM_USERS)])
    labels = [generator.permutation(NUM_ITEMS)[: generator.integers(1, 30)] + 1 for _ in range(NUM_USERS)]
    offsets = np.concatenate([[0], np.cumsum([len(x) for x in labels])])
    lists = RankedLists(
        ranked, np.concatenate(labels), offsets, CatalogueInfo(NUM_ITEMS, np.full(NUM_ITEMS + 1, -1))
    )
    qrels = {f"u{u:03}": {f"i{i}": 1 for i in labels[u]} for u in range(NUM_USERS)}
    run = {
        f"u{u:03}": {f"i{i}": float(LENGTH - r) for r, i in enumerate(ranked[u])} for u in range(NUM_USERS)
    }
    return lists, qrels, run


@pytest.mark.parametrize("name", TREC_EVAL)
@pytest.mark.parametrize("k", [1, 5, 20])
def test_equals_trec_eval(random_case, name: str, k: int) -> None:
    ir_measures = pytest.importorskip("ir_measures")
    lists, qrels, run = random_case
    measure = ir_measures.parse_measure(f"{TREC_EVAL[name]}@{k}")
    expected = {m.query_id: m.value for m in ir_measures.iter_calc([measure], qrels, run)}
    ours = per_user(name, lists, k)
    np.testing.assert_allclose(ours, [expected[f"u{u:03}"] for u in range(NUM_USERS)], atol=1e-12)


def test_ndcg_by_hand() -> None:
    # Hits at ranks 2 and 4 of 5, three labels: DCG = 1/log2(3) + 1/log2(5).
    lists = one_user([9, 1, 8, 2, 7], [1, 2, 3])
    dcg = 1 / math.log2(3) + 1 / math.log2(5)
    standard = 1 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    hits_only = 1 / math.log2(2) + 1 / math.log2(3)
    assert per_user("ndcg", lists, 5)[0] == pytest.approx(dcg / standard)
    assert per_user("ndcg_hits", lists, 5)[0] == pytest.approx(dcg / hits_only)
    # At k = 2 the ideal has min(3, 2) = 2 hits; one hit, at rank 2.
    assert per_user("ndcg", lists, 2)[0] == pytest.approx((1 / math.log2(3)) / hits_only)
    assert per_user("ndcg_hits", lists, 2)[0] == pytest.approx((1 / math.log2(3)) / 1.0)


def test_ndcg_moves_when_two_ranks_are_swapped() -> None:
    early, late = one_user([1, 9, 8], [1, 2]), one_user([9, 1, 8], [1, 2])
    for name in ("ndcg", "ndcg_hits", "mrr"):
        assert per_user(name, early, 3)[0] > per_user(name, late, 3)[0]
    assert per_user("recall", early, 3)[0] == per_user("recall", late, 3)[0]


@pytest.mark.parametrize("at_once", [1, 7 * LENGTH, 1 << 20])
def test_hits_are_the_ranks_whose_item_is_a_label(random_case, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(base, "_COMPARED_AT_ONCE", at_once)
    known, qrels, _ = random_case
    lists = RankedLists(known.ranked_UN, known.labels_S, known.offsets, known.catalogue)
    expected = [[f"i{i}" in qrels[f"u{u:03}"] for i in row] for u, row in enumerate(lists.ranked_UN)]
    assert lists.hits.tolist() == expected


def test_ndcg_hits_is_never_below_ndcg(random_case) -> None:
    lists = random_case[0]
    for k in (1, 3, 10, 20):
        assert (per_user("ndcg_hits", lists, k) >= per_user("ndcg", lists, k) - 1e-12).all()


def test_duplicate_labels_stay_in_the_denominator_of_recall_only() -> None:
    # Labels [1, 1, 2]: item 1 is found. ComiRec's recall is 1 hit / 3 labels; the best list has two different hits.
    lists = one_user([1, 9], [1, 1, 2])
    assert per_user("recall", lists, 2)[0] == pytest.approx(1 / 3)
    assert per_user("ndcg", lists, 2)[0] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert per_user("hit_rate", lists, 2)[0] == 1.0


def test_category_diversity_by_hand() -> None:
    # Categories of items 1..6: a a b c - b. List 1 2 3 4 5: known a a b c, 6 pairs, one of them (a, a) equal.
    lists = one_user([1, 2, 3, 4, 5], [6], [0, 0, 1, 2, -1, 1])
    assert per_user("category_diversity", lists, 5)[0] == pytest.approx(5 / 6)
    assert per_user("category_diversity", lists, 2)[0] == 0.0
    assert per_user("category_diversity", lists, 1)[0] == 0.0


def test_coverage_by_hand() -> None:
    # 4 different items of 10 in the first two ranks of three users; 0 is not an item.
    info = CatalogueInfo(10, np.full(11, -1))
    ranked = np.array([[1, 2, 9], [2, 3, 8], [4, 0, 0]])
    lists = RankedLists(ranked, np.array([1, 1, 1]), np.array([0, 1, 2, 3]), info)
    assert resolve("metric", "coverage")().value(lists, 2) == pytest.approx(0.4)
