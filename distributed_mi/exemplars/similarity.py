"""Similarities of users: negative squared Euclidean distances from vectors in row blocks, or a given matrix.

Sums run in float64 on centred vectors and are rounded to float32 once, so that the similarities of close users do not
drown in the length of their vectors (|x|^2 + |y|^2 - 2 x.y cancels). Equal vectors have a similarity of exactly 0.

Shapes:  U users, E exemplars, D text width, B rows of a block.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.machine import available_memory_bytes

BLOCK_BYTES = 32 << 20
"""Size of the float64 scratch block: large enough for an efficient matrix product, small beside the result."""

_ROUNDING = 1e-14
"""Squared distances below this fraction of |x|^2 + |y|^2 are float64 rounding (2e-16 * sqrt(D)): they are zero."""


def row_blocks(rows: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """First and last-plus-one row of consecutive blocks of about `block_bytes`."""
    step = max(1, block_bytes // max(row_bytes, 1))
    for low in range(0, rows, step):
        yield low, min(low + step, rows)


class Similarity:
    """Similarities of any users to a fixed set of points.

    Args:
        points_PD: the fixed points.
        centre_D: float64, what is subtracted from all vectors; None: the mean of the points. With one centre, equal
            pairs have equal bits whatever set of points they are found in.
    """

    def __init__(self, points_PD: Tensor, centre_D: Tensor | None = None) -> None:
        points = points_PD.to(torch.float64)
        self._mean_D = points.mean(dim=0) if centre_D is None else centre_D
        self._points_PD = points - self._mean_D
        self._norms_P = self._points_PD.square().sum(dim=1)

    def rows(self, vectors_BD: Tensor) -> Tensor:
        """Similarities `[B, P]` float32 of a block of vectors to every point."""
        block = vectors_BD.to(torch.float64) - self._mean_D
        norms = block.square().sum(dim=1, keepdim=True) + self._norms_P
        distances = torch.addmm(norms, block, self._points_PD.T, alpha=-2.0)
        distances.masked_fill_(distances <= norms.mul_(_ROUNDING), 0.0)
        return distances.neg_().to(torch.float32)


def similarity_matrix(vectors_UD: Tensor) -> Tensor:
    """The whole matrix `[U, U]` float32: 4 * U * U bytes; the diagonal is 0."""
    users = len(vectors_UD)
    similarity = Similarity(vectors_UD)
    matrix_UU = torch.empty(users, users, dtype=torch.float32, device=vectors_UD.device)
    for low, high in row_blocks(users, 8 * users):
        matrix_UU[low:high] = similarity.rows(vectors_UD[low:high])
    matrix_UU.fill_diagonal_(0.0)
    return matrix_UU


_STRIPS = 32
"""Parts into which a list of pairs is cut for threads."""

_SAME_CENTRE = 1e-9
"""Relative difference of two members' squared distances to their mean that is rounding."""


class Similarities(ABC):
    """What labelling, refinement and the yardsticks ask of similarities, however they are kept."""

    users: int
    """U."""
    device: torch.device

    @abstractmethod
    def rows(self, ids_B: Tensor) -> Tensor:
        """Similarities `[B, U]` float32 of some users to all; to themselves 0. The caller may write into it."""

    @abstractmethod
    def ordered_rows(self, ids_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For finding neighbours: what orders like the similarities, quickly.

        Returns:
            values `[B, U]` float32; shift `[B]` float32: value + shift is about the similarity; error `[B]` float32:
            how far it may be from it.
        """

    @abstractmethod
    def pairs(self, ids_N: np.ndarray, others_N: np.ndarray) -> np.ndarray:
        """Similarities `[N]` float32 of pairs of users."""

    @abstractmethod
    def to(self, ids_B: Tensor, exemplars_E: Tensor) -> Tensor:
        """Similarities `[B, E]` float32 of some users to some exemplars; to themselves 0 or the preference."""

    @abstractmethod
    def sums(self) -> Tensor:
        """Sum of each user's similarities to the others, `[U]` float64."""

    @abstractmethod
    def central(self, members: Tensor, preferences: Tensor) -> int:
        """Position among `members` of the one to whom they are most similar in sum, the lowest among equals.

        Args:
            members: positions in U, ascending.
            preferences: float64, of the members; each counts as the similarity to oneself.
        """


class VectorSimilarities(Similarities):
    """Similarities computed from vectors when they are asked for: nothing of size U x U is kept."""

    def __init__(self, vectors_UD: Tensor) -> None:
        self.vectors_UD = vectors_UD
        self.users, self.device = len(vectors_UD), vectors_UD.device
        self._centre_D = vectors_UD.to(torch.float64).mean(dim=0)
        self._all: Similarity | None = None
        self._centred_UD: Tensor | None = None
        self._some: tuple[Tensor, Similarity] | None = None

    def rows(self, ids_B: Tensor) -> Tensor:
        """As in `Similarities`; one matrix product in float64."""
        if self._all is None:
            self._all = Similarity(self.vectors_UD, self._centre_D)
        block = self._all.rows(self.vectors_UD[ids_B])
        block[torch.arange(len(ids_B), device=self.device), ids_B] = 0.0
        return block

    def ordered_rows(self, ids_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Similarities`; one matrix product in float32, 2 x.y - |y|^2 of centred vectors."""
        if self._centred_UD is None:
            self._centred_UD = (self.vectors_UD.to(torch.float64) - self._centre_D).to(torch.float32)
            self._norms_U = self._centred_UD.square().sum(dim=1)
        block, norms = self._centred_UD[ids_B], self._norms_U[ids_B]
        values = torch.addmm(self._norms_U[None], block, self._centred_UD.T, beta=-1.0, alpha=2.0)
        # a float32 sum of D products is off by at most D steps of the product of the lengths; twice that for all else
        width = self.vectors_UD.shape[1]
        error = 2.0 * (width + 8) * torch.finfo(torch.float32).eps * (norms + self._norms_U.max())
        return values, -norms, error

    def pairs(self, ids_N: np.ndarray, others_N: np.ndarray) -> np.ndarray:
        """As in `Similarities`, from the differences of the coordinates in float64."""
        from distributed_mi.exemplars import kernels

        vectors, found = self.vectors_UD.cpu().numpy(), np.empty(len(ids_N), dtype=np.float32)
        bounds = [len(ids_N) * s // _STRIPS for s in range(_STRIPS + 1)]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
            parts = [(ids_N[a:b], others_N[a:b], vectors, found[a:b]) for a, b in pairwise(bounds) if a < b]
            list(threads.map(lambda part: kernels.pair_similarities(*part), parts))
        return found

    def to(self, ids_B: Tensor, exemplars_E: Tensor) -> Tensor:
        """As in `Similarities`."""
        if self._some is None or self._some[0] is not exemplars_E:
            self._some = exemplars_E, Similarity(self.vectors_UD[exemplars_E], self._centre_D)
        return self._some[1].rows(self.vectors_UD[ids_B])

    def sums(self) -> Tensor:
        """As in `Similarities`, from U |x|^2 + sum of all |x|^2 with the mean at the origin."""
        blocks = row_blocks(self.users, 8 * self.vectors_UD.shape[1])
        norms = torch.cat(
            [(self.vectors_UD[a:b].to(torch.float64) - self._centre_D).square().sum(dim=1) for a, b in blocks]
        )
        return -(self.users * norms + norms.sum())

    def central(self, members: Tensor, preferences: Tensor) -> int:
        """As in `Similarities`: for squared distances, the member nearest to the members' mean."""
        points = self.vectors_UD[members].to(torch.float64)
        distances = (points - points.mean(dim=0)).square().sum(dim=1)
        costs = len(members) * distances - (preferences - preferences.max())
        tied = costs <= costs.min() + _SAME_CENTRE * (costs.min().abs() + len(members) * distances.mean())
        return int(tied.nonzero()[0])


class MatrixSimilarities(Similarities):
    """A given `[U, U]` float32 matrix. Its diagonal is ignored and may be used as scratch by others."""

    def __init__(self, matrix_UU: Tensor) -> None:
        self.matrix_UU = matrix_UU
        self.users, self.device = len(matrix_UU), matrix_UU.device

    def rows(self, ids_B: Tensor) -> Tensor:
        """As in `Similarities`: a copy."""
        block = self.matrix_UU[ids_B]
        block[torch.arange(len(ids_B), device=self.device), ids_B] = 0.0
        return block

    def ordered_rows(self, ids_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Similarities`: exact."""
        nothing = torch.zeros(len(ids_B), device=self.device)
        return self.rows(ids_B), nothing, nothing

    def pairs(self, ids_N: np.ndarray, others_N: np.ndarray) -> np.ndarray:
        """As in `Similarities`."""
        return self.matrix_UU[torch.from_numpy(ids_N).long(), torch.from_numpy(others_N).long()].cpu().numpy()

    def to(self, ids_B: Tensor, exemplars_E: Tensor) -> Tensor:
        """As in `Similarities`."""
        return self.matrix_UU[ids_B[:, None], exemplars_E]

    def sums(self) -> Tensor:
        """As in `Similarities`, in blocks because torch would copy the whole matrix to float64."""
        blocks = row_blocks(self.users, 4 * self.users)
        return torch.cat(
            [
                self.rows(torch.arange(a, b, device=self.device)).sum(dim=1, dtype=torch.float64)
                for a, b in blocks
            ]
        )

    def central(self, members: Tensor, preferences: Tensor) -> int:
        """As in `Similarities`."""
        count = len(members)
        sums = preferences.clone()
        for low, high in row_blocks(count, 4 * count):
            block = self.matrix_UU[members[low:high, None], members]
            block[
                torch.arange(high - low, device=self.device), torch.arange(low, high, device=self.device)
            ] = 0.0
            sums += block.sum(dim=0, dtype=torch.float64)
        return int(sums.argmax())


def kept_in_memory(similarities: Similarities) -> Similarities:
    """The similarities as a matrix, for work that reads rows again and again, when half of the free memory holds it."""
    free = available_memory_bytes()
    if not isinstance(similarities, VectorSimilarities):
        return similarities
    if free is not None and 8 * similarities.users**2 > free:
        return similarities
    return MatrixSimilarities(similarity_matrix(similarities.vectors_UD))
