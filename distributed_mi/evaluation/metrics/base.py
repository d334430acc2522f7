"""What a metric reads and gives. A file of this folder exports its subclass as `METRIC`; its name is the file's name.

All metrics read the same ranked lists, so a list is computed once, at the largest cut-off that is asked for, and every
k reads its first k columns.

Shapes:  U users, N list length, S labels of all users, V items in the catalogue (id 0 is padding
and fills short lists).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_COMPARED_AT_ONCE = 1 << 20
"""Items of lists that are compared with a label at once: 8 MiB."""


@dataclass(frozen=True)
class CatalogueInfo:
    """What list metrics need to know of the items.

    Args:
        num_items: V, padding not counted.
        categories: int64 `[V + 1]` by item index; equal codes mean equal sets of category names, -1 means none known.
    """

    num_items: int
    categories: Ints

    @property
    def has_categories(self) -> bool:
        """Whether any item has a category."""
        return bool((self.categories >= 0).any())


@dataclass(frozen=True)
class RankedLists:
    """Recommended lists of U users beside what they really took.

    Args:
        ranked_UN: int64 item indices, best first, without repetition; short lists end in zeros.
        labels_S: int64 item indices of all users' labels in user order; duplicates are kept.
        offsets: int64 `[U + 1]`; labels of user u are `labels_S[offsets[u]:offsets[u + 1]]`.
        catalogue: the items.
    """

    ranked_UN: Ints
    labels_S: Ints
    offsets: Ints
    catalogue: CatalogueInfo

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @cached_property
    def num_labels(self) -> Ints:
        """Labels of each user, duplicates counted, int64 `[U]`."""
        return np.diff(self.offsets)

    @cached_property
    def _distinct_keys(self) -> Ints:
        users = np.repeat(np.arange(self.num_users), self.num_labels)
        return np.unique(users * self._stride + self.labels_S)

    @property
    def _stride(self) -> int:
        return self.catalogue.num_items + 1

    @cached_property
    def num_distinct_labels(self) -> Ints:
        """Different items among each user's labels, int64 `[U]`: the most hits that a list can have."""
        return np.bincount(self._distinct_keys // self._stride, minlength=self.num_users)

    @cached_property
    def hits(self) -> NDArray[np.bool_]:
        """Whether the item at each rank is one of the user's labels, bool `[U, N]`."""
        hits_UN = np.zeros(self.ranked_UN.shape, dtype=bool)
        user_S = np.repeat(np.arange(self.num_users), self.num_labels)
        at_once = max(1, _COMPARED_AT_ONCE // max(1, self.ranked_UN.shape[1]))
        for start in range(0, len(user_S), at_once):
            user_s, label_s = user_S[start : start + at_once], self.labels_S[start : start + at_once]
            label, rank = np.nonzero(self.ranked_UN[user_s] == label_s[:, None])
            hits_UN[user_s[label], rank] = True
        return hits_UN & (self.ranked_UN > 0)

    def num_hits(self, k: int) -> Ints:
        """Hits among the first k ranks, int64 `[U]`."""
        return self.hits[:, :k].sum(axis=1)


class Metric(ABC):
    """A number between 0 and 1 for a set of ranked lists; the class docstring has formula, denominator, source."""

    needs_categories: ClassVar[bool] = False
    """Whether the metric means nothing on a catalogue without categories; it is then reported as not available."""

    @abstractmethod
    def value(self, lists: RankedLists, k: int) -> float:
        """The metric over all users at cut-off k; 0 without users."""


class UserMetric(Metric):
    """A metric with a value for each user, averaged over users; these have intervals and paired tests."""

    @abstractmethod
    def per_user(self, lists: RankedLists, k: int) -> Floats:
        """float64 `[U]` at cut-off k."""

    def value(self, lists: RankedLists, k: int) -> float:
        """Plain mean over users."""
        return float(self.per_user(lists, k).mean()) if lists.num_users else 0.0


def discounts(n: int) -> Floats:
    """`1 / log2(rank + 1)` for ranks 1..n, float64 `[n]` (Jarvelin and Kekalainen, TOIS 2002, base 2)."""
    return 1.0 / np.log2(np.arange(2, n + 2))


def dcg(lists: RankedLists, k: int) -> Floats:
    """Discounted hits of the first k ranks, float64 `[U]`."""
    hits = lists.hits[:, :k]
    return hits @ discounts(hits.shape[1])


def ideal_dcg(count: Ints) -> Floats:
    """Discounted hits of a list that begins with `count` hits, for each entry, float64."""
    table = np.concatenate([[0.0], np.cumsum(discounts(int(count.max(initial=0))))])
    return table[count]


def safe_ratio(numerator: Floats, denominator: Floats | Ints) -> Floats:
    """Ratio that is 0 where the denominator is 0."""
    denominator = np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
