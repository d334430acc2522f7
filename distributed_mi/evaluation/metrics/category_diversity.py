"""Category diversity@k."""

import numpy as np

from distributed_mi.evaluation.metrics.base import Floats, RankedLists, UserMetric, safe_ratio


class CategoryDiversity(UserMetric):
    """Share of pairs of recommended items that belong to different categories.

        category_diversity@k = pairs (i, j) of the first k ranks with categories(i) != categories(j)  /  all pairs

    Two items belong together when they have the same set of category names. Items without a category are left out of
    both counts; a list with fewer than two others scores 0. Source: ComiRec (Cen et al., KDD 2020),
    "controllable study", with one category for each item there.
    """

    needs_categories = True

    def per_user(self, lists: RankedLists, k: int) -> Floats:
        """float64 `[U]`."""
        ranked = lists.ranked_UN[:, :k]
        codes = np.where(ranked > 0, lists.catalogue.categories[ranked], -1)
        users, columns = np.nonzero(codes >= 0)
        known = np.bincount(users, minlength=lists.num_users)
        stride = int(codes.max(initial=0)) + 1
        keys, counts = np.unique(users * stride + codes[users, columns], return_counts=True)
        same = np.bincount(keys // stride, weights=_pairs(counts), minlength=lists.num_users)
        return safe_ratio(_pairs(known) - same, _pairs(known))


def _pairs(count: np.ndarray) -> Floats:
    return count * (count - 1) / 2.0


METRIC = CategoryDiversity
