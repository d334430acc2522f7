"""NDCG@k with the ideal that ComiRec's code uses."""

from distributed_mi.evaluation.metrics.base import Floats, RankedLists, UserMetric, dcg, ideal_dcg, safe_ratio


class NDCGHits(UserMetric):
    """Discounted hits over those of a list that has the same hits at its top.

        ndcg_hits@k = sum over hits of 1 / log2(rank + 1)  /  sum over r = 1..hits of 1 / log2(r + 1)

    It says how early the hits stand, not how many there are: one label of ten, found first, scores 1. Never below
    `ndcg`. Source: `evaluate` in the master branch of the ComiRec authors' code, for comparison with tables made by it.
    """

    def per_user(self, lists: RankedLists, k: int) -> Floats:
        """float64 `[U]`, 0 without a hit."""
        return safe_ratio(dcg(lists, k), ideal_dcg(lists.num_hits(k)))


METRIC = NDCGHits
