"""Affinity propagation on the pairs that can matter, with the result of all pairs.

Write M(i) for the damped mean, over the rounds, of row i's largest availability plus similarity. A pair (i,k) that was
never row i's largest and whose responsibility was never positive has, after t rounds of damping d,

    r(i,k) = (1 - d^t) s(i,k) - M(i)                   a(i,k) = damped mean of min(0, column sum of k) = background(k)

so one number per row, one per column and the similarity say all about it. It stays that way, and touches no other
message, as long as s(i,k) is not above the *second* largest value of row i in any round: availabilities off the
diagonal are never positive, so it cannot be among the two largest, and its responsibility is not positive. A row
therefore keeps a list of its nearest neighbours, and its `bound`, the similarity that nobody outside of the list
exceeds. In a round in which the second largest value falls below the bound, the list grows first: new entries start
from the formulas above. What comes out is what all pairs would give, up to rounding, from about a hundredth of the
memory (Beauty, 10,000 users, preference -10: 35 neighbours a row ever matter). Fujiwara, Irie and Kitahara (IJCAI
2011) prune messages by other bounds to the same end.

Where similarities outside of the lists are not to be had exactly (an approximate index, a limit on the length), the
rows that a bound could not clear are counted instead: this is the sparse method.

Shapes:  U users, R rows of a range, M entries of all its lists, D width of the vectors.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distributed_mi.exemplars import kernels
from distributed_mi.exemplars.messages import Messages, Reduce

ENTRY_BYTES = 16
"""One listed pair: int32 column, float32 similarity and both messages."""

_SPARE = 16
"""When arrays are copied for lists to grow, this part of them is added as room for the next time."""


OF_ALL_USERS = ("column_sum", "background")
"""Parts of `ListMessages.summary` that have one number for every user, whatever range the messages are of."""


class ListsTooLongError(RuntimeError):
    """The lists would hold more entries than `max_entries`."""


class NeighbourSource(Protocol):
    """Where further neighbours of a row come from."""

    def further(self, rows: np.ndarray, known: "NeighbourLists", above: np.ndarray) -> "NeighbourLists":
        """Neighbours that lists lack.

        Args:
            rows: positions in the range, ascending.
            known: what these rows list already, row for row.
            above: float64, the similarity above which none may be missing; a few more are welcome.

        Returns:
            The new entries of each row, and its new bound.
        """


@dataclass
class NeighbourLists:
    """Listed pairs of a range of rows, row after row (CSR). The diagonal is not listed."""

    starts_R: np.ndarray
    """int64 `[R + 1]`."""
    columns_M: np.ndarray
    """int32 `[M]`; longer, with anything behind the entries, when lists have grown."""
    similarities_M: np.ndarray
    """float32 `[M]`; as long as the columns."""
    bound_R: np.ndarray
    """float32 `[R]`: no similarity outside of the list exceeds it; -inf for a row that lists everybody."""

    @property
    def rows(self) -> int:
        """R."""
        return len(self.starts_R) - 1

    @property
    def entries(self) -> int:
        """M."""
        return int(self.starts_R[-1])

    def columns_of(self, row: int) -> np.ndarray:
        """int32 columns of one row."""
        return self.columns_M[self.starts_R[row] : self.starts_R[row + 1]]

    def take(self, rows: np.ndarray) -> "NeighbourLists":
        """Copies of the lists of some rows, in the order given."""
        lengths = self.starts_R[rows + 1] - self.starts_R[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        columns = np.empty(int(starts[-1]), dtype=np.int32)
        similarities = np.empty(int(starts[-1]), dtype=np.float32)
        kernels.take_lists(rows, self.starts_R, self.columns_M, starts, columns)
        kernels.take_lists(rows, self.starts_R, self.similarities_M, starts, similarities)
        return NeighbourLists(starts, columns, similarities, self.bound_R[rows])

    @classmethod
    def of_equal_length(
        cls, columns_RK: np.ndarray, similarities_RK: np.ndarray, bound_R: np.ndarray
    ) -> "NeighbourLists":
        """Lists of K entries each."""
        rows, length = columns_RK.shape
        starts = np.arange(rows + 1, dtype=np.int64) * length
        columns = np.ascontiguousarray(columns_RK, dtype=np.int32).ravel()
        similarities = np.ascontiguousarray(similarities_RK, dtype=np.float32).ravel()
        return cls(starts, columns, similarities, np.ascontiguousarray(bound_R, dtype=np.float32))


class ListMessages(Messages):
    """Messages of the listed pairs of a range of rows.

    Args:
        lists: the pairs. They grow in place; another run may start from them.
        source: further neighbours. None: no list grows, rows whose bound is passed are counted in `unproven`.
        max_entries: most entries of all lists; None: no limit. `first_row` and on as in `Messages`.
    """

    def __init__(
        self,
        lists: NeighbourLists,
        users: int,
        first_row: int,
        preferences_R: np.ndarray,
        damping: float,
        reduce: Reduce | None = None,
        *,
        source: NeighbourSource | None = None,
        max_entries: int | None = None,
    ) -> None:
        super().__init__(users, first_row, preferences_R, damping, reduce)
        self.lists, self.source, self.max_entries = lists, source, max_entries
        self.responsibilities_M = np.zeros(lists.entries, dtype=np.float32)
        self.availabilities_M = np.zeros(lists.entries, dtype=np.float32)
        self.background_U = np.zeros(users)
        self.reach_mean_R = np.zeros(self.rows)
        self.weight_R = np.zeros(self.rows)
        """1 - d^t: how much of the similarity the responsibilities hold by now."""
        self.unproven = 0
        """Rows that pairs outside of their lists could have changed, in the last round."""
        self.grown = 0
        """Lists that grew, counted each time."""
        self._first_R, self._second_R = np.empty(self.rows), np.empty(self.rows)
        self._best_R = np.empty(self.rows, dtype=np.int64)

    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        keep, take = self.damping, 1.0 - self.damping
        self.background_U *= keep
        self.background_U += take * np.minimum(self.column_sums_U, 0.0)
        bound_R = self.lists.bound_R
        if self.source is None:
            bound_R = np.full_like(bound_R, -np.inf)
        short = np.zeros(self.rows, dtype=bool)
        sums_U = self._over_strips(lambda low, high: self._strip(low, high, bound_R, short))
        if self.source is None:
            self.unproven = int((self.lists.bound_R > self._second_R).sum())
        rows = np.flatnonzero(short)
        while len(rows):
            self._grow(rows)
            sums_U += self._rows(rows, self.lists.bound_R, age=False)
            rows = rows[self.lists.bound_R[rows] > self._second_R[rows]]
        self.reach_mean_R *= keep
        self.reach_mean_R += take * self._first_R
        self.weight_R *= keep
        self.weight_R += take
        return sums_U, np.where(self._best_R == kernels.SELF, self._second_R, self._first_R)

    def _strip(self, low: int, high: int, bound_R: np.ndarray, short_R: np.ndarray) -> np.ndarray:
        sums_U = self._rows(np.arange(low, high), bound_R, age=True)
        short_R[low:high] = bound_R[low:high] > self._second_R[low:high]
        return sums_U

    def _rows(self, rows: np.ndarray, bound_R: np.ndarray, *, age: bool) -> np.ndarray:
        sums_U = np.zeros(self.users)
        kernels.list_rows(
            rows,
            self.lists.starts_R,
            self.lists.columns_M,
            self.lists.similarities_M,
            self.responsibilities_M,
            self.availabilities_M,
            self.column_sums_U,
            self._self_values,
            bound_R,
            self.damping,
            age,
            sums_U,
            self._first_R,
            self._second_R,
            self._best_R,
        )
        return sums_U

    def _grow(self, rows: np.ndarray) -> None:
        """Lengthen the lists of some rows until nothing outside of them matters in this round."""
        assert self.source is not None
        self.grown += len(rows)
        old = self.lists
        added = self.source.further(rows, old.take(rows), self._second_R[rows])
        total = old.entries + added.entries
        if self.max_entries is not None and total > self.max_entries:
            raise ListsTooLongError(f"{total:,} listed pairs, at most {self.max_entries:,} pay")
        extra = np.diff(added.starts_R)
        extra_R = np.zeros(self.rows, dtype=np.int64)
        extra_R[rows] = extra
        starts_R = old.starts_R + np.concatenate([[0], np.cumsum(extra_R)])
        messages = np.repeat(self.weight_R[rows], extra) * added.similarities_M
        messages -= np.repeat(self.reach_mean_R[rows], extra)

        def lengthen(values_M: np.ndarray, new: np.ndarray) -> np.ndarray:
            if len(values_M) < total:
                longer = np.empty(total + total // _SPARE, dtype=values_M.dtype)
                longer[: old.entries] = values_M[: old.entries]
                values_M = longer
            new = new.astype(values_M.dtype, copy=False)
            kernels.lengthen_lists(old.starts_R, values_M, rows, added.starts_R, new, starts_R)
            return values_M

        self.responsibilities_M = lengthen(self.responsibilities_M, messages)
        self.availabilities_M = lengthen(self.availabilities_M, self.background_U[added.columns_M])
        old.columns_M = lengthen(old.columns_M, added.columns_M)
        old.similarities_M = lengthen(old.similarities_M, added.similarities_M)
        old.starts_R = starts_R
        old.bound_R[rows] = added.bound_R

    def warm_start(self, other: "ListMessages") -> None:
        """Go on from the messages of another run over the same lists (another preference or damping)."""
        preferences = self.preferences_R
        super().restore(Messages.state(other))
        self.preferences_R = preferences
        self.responsibilities_M = other.responsibilities_M.copy()
        self.availabilities_M = other.availabilities_M.copy()
        self.background_U, self.reach_mean_R = other.background_U.copy(), other.reach_mean_R.copy()
        self.weight_R = other.weight_R.copy()

    def summary(self) -> dict[str, np.ndarray]:
        """What is left of the messages without the pairs: float64, a number for every user (`OF_ALL_USERS`) or row."""
        return {
            "column_sum": self.column_sums_U,
            "background": self.background_U,
            "self_responsibility": self.self_responsibility_R,
            "self_availability": self.self_availability_R,
            "reach_mean": self.reach_mean_R,
            "weight": self.weight_R,
        }

    def begin_from(self, summary: dict[str, np.ndarray]) -> None:
        """Begin near the messages of other lists, perhaps of other users: the pairs' messages follow from the numbers.

        Exact for pairs that were never a row's largest; the others are put right by the first rounds.

        Args:
            summary: of all users.
        """
        self.column_sums_U = summary["column_sum"].copy()
        self.background_U = summary["background"].copy()
        self.self_responsibility_R = summary["self_responsibility"][self.own].copy()
        self.self_availability_R = summary["self_availability"][self.own].copy()
        self.reach_mean_R = summary["reach_mean"][self.own].copy()
        self.weight_R = summary["weight"][self.own].copy()
        lengths = np.diff(self.lists.starts_R)
        entries = self.lists.entries
        messages = np.repeat(self.weight_R, lengths) * self.lists.similarities_M[:entries]
        messages -= np.repeat(self.reach_mean_R, lengths)
        sums = self.column_sums_U[self.lists.columns_M[:entries]]
        self.responsibilities_M = messages.astype(np.float32)
        self.availabilities_M = np.minimum(sums - np.maximum(messages, 0.0), 0.0).astype(np.float32)

    def state(self) -> dict[str, np.ndarray]:
        """The lists and their messages."""
        entries = self.lists.entries
        return super().state() | {
            "starts": self.lists.starts_R,
            "columns": self.lists.columns_M[:entries],
            "similarities": self.lists.similarities_M[:entries],
            "bound": self.lists.bound_R,
            "responsibilities": self.responsibilities_M[:entries],
            "availabilities": self.availabilities_M[:entries],
            "background": self.background_U,
            "reach_mean": self.reach_mean_R,
            "weight": self.weight_R,
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        super().restore(state)
        self.lists.starts_R, self.lists.columns_M = state["starts"].copy(), state["columns"].copy()
        self.lists.similarities_M, self.lists.bound_R = state["similarities"].copy(), state["bound"].copy()
        self.responsibilities_M = state["responsibilities"].copy()
        self.availabilities_M = state["availabilities"].copy()
        self.background_U, self.reach_mean_R = state["background"].copy(), state["reach_mean"].copy()
        self.weight_R = state["weight"].copy()
