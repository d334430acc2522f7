"""Where the messages of a clustering are kept: what `affinity.settle` needs to know of it, and nothing more.

    LocalProblem         exact, in this process
    SparseProblem        neighbour lists from an index, in this process
    distributed.DistributedProblem    either of them, rows spread over Ray actors

Shapes:  U users, D width of the vectors.
"""

import logging
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from distributed_mi.exemplars.lists import ENTRY_BYTES, ListMessages, ListsTooLongError, NeighbourLists
from distributed_mi.exemplars.messages import DenseMessages, Messages, TorchMessages
from distributed_mi.exemplars.neighbours import (
    FIRST_LENGTH,
    ExactNeighbours,
    IndexNeighbours,
    NeighbourIndex,
    OnRows,
    measure,
    nearest_lists,
    reverse_edges,
    with_edges,
)
from distributed_mi.exemplars.similarity import (
    MatrixSimilarities,
    Similarities,
    VectorSimilarities,
    available_memory_bytes,
    row_blocks,
    similarity_matrix,
)

logger = logging.getLogger(__name__)

Solver = Literal["auto", "lists", "dense", "torch"]

Warm = Messages | dict[str, np.ndarray]
"""Messages of an earlier run over the same lists, or what `ListMessages.summary` says of one over others."""

DENSE_USERS = 1024
"""Up to so many users whole rows are quicker than lists."""

DENSE_PAIR_BYTES = 12
"""A pair of `DenseMessages`: its similarity and two messages, float32."""

_LONG = 0.25
"""Share of all pairs above which lists, which copy when they grow, take as much memory as whole rows."""


class Problem(ABC):
    """Similarities and messages; a context manager that gives back what it holds."""

    similarities: Similarities
    exact: bool = True
    """Whether all pairs of users count, kept or proven away."""
    lists: NeighbourLists | None = None
    """Lists of all users, where there are such."""
    last: Messages | None = None
    """The messages of the latest run, as they ended."""

    @abstractmethod
    def messages(self, preferences_U: np.ndarray, damping: float, warm: "Warm | None" = None) -> Messages:
        """Messages to begin a run with, or to go on with from `warm` where that is possible."""

    @property
    def summary(self) -> dict[str, np.ndarray] | None:
        """What the next day's run can begin from; None where it is not kept."""
        return self.last.summary() if isinstance(self.last, ListMessages) else None

    @property
    @abstractmethod
    def pairs(self) -> int:
        """Pairs whose messages are kept."""

    @property
    def unproven(self) -> int:
        """Rows whose messages a pair that is not kept could have changed in the latest round."""
        return 0

    def common_similarity(self, preferences_U: Tensor) -> float | None:
        """The similarity of all pairs when it is one and the same and all preferences are equal; else None."""
        users = self.similarities.users
        if users == 1:
            return 0.0
        if bool((preferences_U != preferences_U[0]).any()):
            return None
        ids = torch.arange(users, device=self.similarities.device)
        if isinstance(self.similarities, VectorSimilarities):
            vectors = self.similarities.vectors_UD
            if bool((vectors == vectors[0]).all()):
                return 0.0
            # other than that, only in a space of as many dimensions can all have the same distance from each other
            if users > vectors.shape[1] + 1:
                return None
        value = self.similarities.rows(ids[:1])[0, 1]
        for low, high in row_blocks(users, 4 * users):
            block = self.similarities.rows(ids[low:high])
            block[torch.arange(high - low, device=ids.device), ids[low:high]] = value
            if bool((block != value).any()):
                return None
        return float(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027  (most hold nothing that outlives them)
        """Give back what is held."""


class LocalProblem(Problem):
    """Exact messages in this process; see `affinity.affinity_propagation` for arguments and errors."""

    def __init__(
        self,
        vectors_UD: Tensor | np.ndarray | None,
        *,
        similarities: Tensor | None = None,
        solver: Solver = "auto",
        length: int = FIRST_LENGTH,
    ) -> None:
        self._matrix: Tensor | None = None
        self._diagonal: Tensor | None = None
        self._length = length
        if similarities is not None:
            check_similarities(similarities)
            self._matrix, self._diagonal = similarities, similarities.diagonal().clone()
            self.similarities = MatrixSimilarities(similarities)
        elif vectors_UD is not None:
            self.similarities = VectorSimilarities(check_vectors(vectors_UD))
        else:
            raise ValueError("affinity_propagation needs vectors_UD or similarities")
        self.solver = self._choose(solver)
        self._source: ExactNeighbours | None = None

    def _choose(self, solver: Solver) -> Solver:
        on_cpu = self.similarities.device.type == "cpu"
        if solver in ("lists", "dense") and not on_cpu:
            raise ValueError(f'solver "{solver}" is for CPUs, the input is on {self.similarities.device}')
        if solver != "auto":
            return solver
        if not on_cpu:
            return "torch"
        few = self.similarities.users <= DENSE_USERS
        return "lists" if isinstance(self.similarities, VectorSimilarities) and not few else "dense"

    def messages(self, preferences_U: np.ndarray, damping: float, warm: Warm | None = None) -> Messages:
        """As in `Problem`. Where lists turn out too long, whole rows take over and do the rounds so far again."""
        self.last = None
        if self.solver == "lists":
            self.last = _WideningMessages(self, self._list_messages(preferences_U, damping, warm))
        elif self.solver == "dense":
            self.last = DenseMessages(self._whole().numpy(), 0, preferences_U, damping)
            if isinstance(warm, DenseMessages):
                self.last.restore(warm.state() | {"preferences": preferences_U})
        else:
            self.last = TorchMessages(self._whole(), preferences_U, damping)
            if isinstance(warm, TorchMessages):
                self.last.restore(warm.state() | {"preferences": preferences_U})
        return self.last

    def find_neighbours(self, on_rows: OnRows | None = None) -> None:
        """Make the lists, unless there are some or whole rows are kept; the first run does it otherwise."""
        if self.solver == "lists" and self.lists is None:
            self._source = ExactNeighbours(self.similarities)
            self.lists = self._source.lists(self.similarities.users, self._length, on_rows)

    def _list_messages(self, preferences_U: np.ndarray, damping: float, warm: Warm | None) -> ListMessages:
        self.find_neighbours()
        assert self.lists is not None
        users = self.similarities.users
        most = int(_LONG * users * users)
        free = available_memory_bytes()
        if free is not None:  # a list that grows is copied
            most = min(most, int(0.4 * free / ENTRY_BYTES) + self.lists.entries)
        messages = ListMessages(
            self.lists, users, 0, preferences_U, damping, source=self._source, max_entries=most
        )
        if isinstance(warm, dict):
            messages.begin_from(warm)
        elif isinstance(warm, _WideningMessages) and isinstance(warm.inner, ListMessages):
            messages.warm_start(warm.inner)
        return messages

    def _whole(self) -> Tensor:
        """The matrix, computed once."""
        if self._matrix is None:
            assert isinstance(self.similarities, VectorSimilarities)
            check_dense_fits(self.similarities.users)
            self._matrix = similarity_matrix(self.similarities.vectors_UD)
            self._diagonal = self._matrix.diagonal().clone()
            self.similarities = MatrixSimilarities(self._matrix)
        return self._matrix

    def widen(self, preferences_U: np.ndarray, damping: float) -> DenseMessages:
        """Whole rows in place of lists that grew too long; the lists are given up."""
        logger.info("lists of neighbours are too long to pay here; going on with all pairs")
        self.solver, self.lists = "dense", None
        return DenseMessages(self._whole().numpy(), 0, preferences_U, damping)

    @property
    def summary(self) -> dict[str, np.ndarray] | None:
        """As in `Problem`."""
        inner = self.last.inner if isinstance(self.last, _WideningMessages) else None
        return inner.summary() if isinstance(inner, ListMessages) else None

    @property
    def pairs(self) -> int:
        """Pairs whose messages are kept."""
        return self.similarities.users**2 if self.lists is None else self.lists.entries

    def close(self) -> None:
        """Put a given matrix's diagonal back."""
        if self._matrix is not None and self._diagonal is not None:
            self._matrix.diagonal().copy_(self._diagonal)


class _WideningMessages(Messages):
    """List messages that become whole rows when the lists grow too long: the rounds so far are then done again."""

    def __init__(self, problem: LocalProblem, inner: ListMessages) -> None:
        self._problem = problem
        self.inner: Messages = inner
        self.users, self.rows, self.first_row, self.damping = inner.users, inner.rows, 0, inner.damping
        self._rounds = 0
        self._preferences = [(0, inner.preferences_R.copy())]

    def round(self) -> np.ndarray:
        self._rounds += 1
        try:
            return self.inner.round()
        except ListsTooLongError:
            self.inner = self._problem.widen(self._preferences[0][1], self.damping)
        for number in range(1, self._rounds + 1):
            for since, preferences in self._preferences:
                if since == number - 1:
                    self.inner.set_preferences(preferences)
            belief = self.inner.round()
        return belief

    def set_preferences(self, preferences_U: np.ndarray) -> None:
        self._preferences.append((self._rounds, preferences_U.copy()))
        self.inner.set_preferences(preferences_U)

    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("round() asks the inner messages")


class SparseProblem(Problem):
    """Messages on the edges of a symmetrised k-nearest-neighbour graph, in this process: memory and time O(U k).

    Lists start with `neighbours` entries from a faiss index and grow, by doubling, up to `most_neighbours` where a pair
    outside of them may matter. What the index does not find and what lies beyond the limit is left out, so the result
    is an approximation; the rows it may touch are counted.

    Args:
        vectors_UD: float32 vectors.
        neighbours: k, entries of a list to begin with.
        most_neighbours: longest list; equal to `neighbours`: none grows.
        probes: cells of the index that a search looks into.
        on_rows: told about rows whose lists are made.
    """

    def __init__(
        self,
        vectors_UD: Tensor | np.ndarray,
        *,
        neighbours: int = 64,
        most_neighbours: int = 256,
        probes: int = 16,
        on_rows: OnRows | None = None,
    ) -> None:
        self.exact = False
        vectors = check_vectors(vectors_UD)
        self.similarities = VectorSimilarities(vectors)
        self._vectors = vectors.numpy()
        users = len(vectors)
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        self.most = min(max(most_neighbours, neighbours), users - 1)
        neighbours = min(neighbours, users - 1)
        index = NeighbourIndex(self._vectors, probes=probes)
        lists = nearest_lists(self._vectors, index, slice(0, users), neighbours, on_rows)
        lists = with_edges(lists, 0, *reverse_edges(lists, 0))
        measure(lists, self.similarities)
        self.lists = lists
        self._source = (
            IndexNeighbours(self.similarities, index.search, 0, self.most, index.order())
            if self.most > neighbours
            else None
        )

    def messages(self, preferences_U: np.ndarray, damping: float, warm: Warm | None = None) -> Messages:
        """As in `Problem`."""
        assert self.lists is not None
        users = self.similarities.users
        messages = ListMessages(self.lists, users, 0, preferences_U, damping, source=self._source)
        if isinstance(warm, dict):
            messages.begin_from(warm)
        elif isinstance(warm, ListMessages):
            messages.warm_start(warm)
        self.last = messages
        return messages

    @property
    def pairs(self) -> int:
        """Listed pairs."""
        assert self.lists is not None
        return self.lists.entries

    @property
    def unproven(self) -> int:
        """Rows whose messages an unlisted pair could have changed, in the latest round or past the limit of growth."""
        if self._source is not None:
            return self._source.stopped
        return self.last.unproven if isinstance(self.last, ListMessages) else 0


def check_vectors(vectors_UD: Tensor | np.ndarray) -> Tensor:
    """The vectors as a float32 matrix.

    Raises:
        ValueError: not two axes, no users, or a NaN or infinity; the first bad row is named.
    """
    vectors = torch.as_tensor(vectors_UD)
    if vectors.ndim != 2 or len(vectors) == 0:
        raise ValueError(
            f"vectors must be [users, width] with at least one user, got shape {list(vectors.shape)}"
        )
    vectors = vectors.to(torch.float32).contiguous()
    bad = (~torch.isfinite(vectors).all(dim=1)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"user row {int(bad[0])} has a NaN or an infinity ({len(bad):,} such rows in all)")
    return vectors


def check_similarities(similarities: Tensor) -> None:
    """Refuse what is no similarity matrix.

    Raises:
        ValueError: not square, not float32, or a NaN or infinity; the first bad row is named.
    """
    if similarities.ndim != 2 or similarities.shape[0] != similarities.shape[1] or not len(similarities):
        raise ValueError(f"similarities must be a square matrix, got shape {list(similarities.shape)}")
    if similarities.dtype != torch.float32:
        raise ValueError(f"similarities must be float32, got {similarities.dtype}")
    bad = (~torch.isfinite(MatrixSimilarities(similarities).sums())).nonzero().flatten()
    if len(bad):
        raise ValueError(f"similarities: row {int(bad[0])} has a NaN or an infinity")


def check_dense_fits(users: int) -> None:
    """Refuse whole matrices that memory cannot hold.

    Raises:
        MemoryError: says how much is needed, how much there is, and what would do.
    """
    needed, free = DENSE_PAIR_BYTES * users * users, available_memory_bytes()
    if free is not None and needed > free:
        raise MemoryError(
            f"all pairs of {users:,} users need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. A higher "
            "preference keeps neighbour lists short; the methods sparse and distributed need less on each machine"
        )
