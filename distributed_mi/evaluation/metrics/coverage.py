"""Catalogue coverage@k."""

import numpy as np

from distributed_mi.evaluation.metrics.base import Metric, RankedLists


class Coverage(Metric):
    """Share of the catalogue that is recommended to anybody.

        coverage@k = different items in the first k ranks of all users / items in the catalogue

    It belongs to the set of lists, not to a user, and grows with the number of users: compare runs on the same users
    only. It has no bootstrap interval, because a resample has fewer different users and would be biased down.
    Source: "catalog coverage", Ge et al., RecSys 2010.
    """

    def value(self, lists: RankedLists, k: int) -> float:
        """The share."""
        seen = np.zeros(lists.catalogue.num_items + 1, dtype=bool)
        seen[lists.ranked_UN[:, :k]] = True
        return float(seen[1:].sum() / max(lists.catalogue.num_items, 1))


METRIC = Coverage
