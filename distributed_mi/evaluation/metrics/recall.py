"""Recall@k."""

from distributed_mi.evaluation.metrics.base import Floats, RankedLists, UserMetric, safe_ratio


class Recall(UserMetric):
    """Share of a user's labels that stand in the first k ranks.

        recall@k = hits in the first k ranks / number of labels

    The labels are a list and duplicates stay in the denominator, which is not cut at k. Source: evaluation of ComiRec
    (Cen et al., KDD 2020) and REMI, as in the authors' code.
    """

    def per_user(self, lists: RankedLists, k: int) -> Floats:
        """float64 `[U]`."""
        return safe_ratio(lists.num_hits(k).astype(float), lists.num_labels)


METRIC = Recall
