"""NDCG@k, standard definition."""

import numpy as np

from distributed_mi.evaluation.metrics.base import Floats, RankedLists, UserMetric, dcg, ideal_dcg, safe_ratio


class NDCG(UserMetric):
    """Discounted hits over those of the best possible list, binary relevance.

        ndcg@k = sum over hits of 1 / log2(rank + 1)  /  sum over r = 1..min(k, labels) of 1 / log2(r + 1)

    `labels` counts different items: a list cannot name an item twice, so the best list scores 1. Source: Jarvelin and
    Kekalainen, TOIS 2002; trec_eval's `ndcg_cut` and RecBole agree. Published tables of multi-interest models use
    other ideals, see `ndcg_hits`.
    """

    def per_user(self, lists: RankedLists, k: int) -> Floats:
        """float64 `[U]`."""
        return safe_ratio(dcg(lists, k), ideal_dcg(np.minimum(lists.num_distinct_labels, k)))


METRIC = NDCG
