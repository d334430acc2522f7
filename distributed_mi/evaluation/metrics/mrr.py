"""Mean reciprocal rank@k."""

import numpy as np

from distributed_mi.evaluation.metrics.base import Floats, RankedLists, UserMetric


class MRR(UserMetric):
    """One over the rank of the first hit.

        mrr@k = 1 / rank of the first hit, if it is at most k, else 0; averaged over users

    Source: Voorhees, TREC-8 1999.
    """

    def per_user(self, lists: RankedLists, k: int) -> Floats:
        """float64 `[U]`."""
        hits = lists.hits[:, :k]
        if not hits.shape[1]:
            return np.zeros(lists.num_users)
        return np.where(hits.any(axis=1), 1.0 / (hits.argmax(axis=1) + 1), 0.0)


METRIC = MRR
