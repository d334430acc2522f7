"""Hit rate@k."""

from distributed_mi.evaluation.metrics.base import Floats, RankedLists, UserMetric


class HitRate(UserMetric):
    """Share of users with at least one label in the first k ranks.

        hit_rate@k = 1 if hits in the first k ranks > 0 else 0, averaged over users

    Source: ComiRec (Cen et al., KDD 2020), where it is "HR".
    """

    def per_user(self, lists: RankedLists, k: int) -> Floats:
        """float64 `[U]`, 0 or 1."""
        return (lists.num_hits(k) > 0).astype(float)


METRIC = HitRate
