"""The language side of a training batch: the interests a user inherits, and the text of items.

    assignment         user -> exemplar user            (stage exemplars)
    interest_vectors   exemplar user -> m vectors       (stage interests), ragged, kept as one block and offsets
    item_vectors       item -> text vector              (stage embed), one matrix `[V, T]`

Users of one exemplar share its rows, so memory is linear in exemplars, not users. The item matrix lies in every
worker; the seam for a sharded one is `item_text`, which reads it for everything but a loss over all items.

Shapes:  B users, M semantic interests (padded to the largest of the batch), T text width, V items with padding,
U training users, I largest `user_index` of them and one, R interest rows of all exemplars.
"""

import logging
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import StageError
from distributed_mi.models.base import SemanticBatch

logger = logging.getLogger(__name__)

STAGES = ("embed", "exemplars", "interests")
"""Stages that must be complete before a model with `requires_semantics` can be trained."""


@dataclass(frozen=True)
class Semantics:
    """Text vectors of items and of the interests that training users inherit."""

    item_text_VT: Tensor
    """float32; row 0 (padding) and the rows of items without text are zero."""
    interests_RT: Tensor
    """float32, interest vectors of all exemplars, exemplar by exemplar; the last row is their mean."""
    starts_I: Tensor
    """int64, first row in `interests_RT` of each training user, by `user_index`."""
    counts_I: Tensor
    """int64, interests of each training user, by `user_index`, at least 1."""

    @property
    def text_dim(self) -> int:
        """T."""
        return int(self.item_text_VT.shape[1])

    @classmethod
    def read(cls, workspace: Workspace, *, num_rows: int, user_index_U: np.ndarray) -> Self:
        """Read the three tables of a workspace.

        Args:
            workspace: with the stages of `STAGES` complete.
            num_rows: V.
            user_index_U: `user_index` of the training users, int64.

        Raises:
            WorkspaceError: a stage is not complete. StageError: an item without a vector, a user without an
            exemplar, or
                vectors of two widths.
        """
        items = workspace.stage("embed").read("item_vectors", "item_vectors")
        interests = workspace.stage("interests").read("interest_vectors", "interest_vectors")
        assignment = workspace.stage("exemplars").read("assignment", "assignment")
        item_text_VT = _item_matrix(items, num_rows)
        order = [("user_index", "ascending"), ("interest_index", "ascending")]
        interests = interests.sort_by(order)
        rows_RT = _vectors(interests.column("vector"))
        if len(rows_RT) == 0:
            raise StageError(
                "train: the interests stage has no interest vectors; run `distributed-mi interests`"
            )
        if rows_RT.shape[1] != item_text_VT.shape[1]:
            raise StageError(
                f"train: interest vectors have width {rows_RT.shape[1]}, item vectors {item_text_VT.shape[1]}; "
                "both must come from the same text encoder"
            )
        exemplar_I = _exemplar_of_user(assignment, user_index_U)
        owner_R = interests.column("user_index").to_numpy()
        starts_I, counts_I = _spans(owner_R, exemplar_I)
        _count_without_interests(counts_I[user_index_U])
        rows_RT = np.concatenate([rows_RT, rows_RT.mean(axis=0, keepdims=True)])
        return cls(
            torch.from_numpy(item_text_VT),
            torch.from_numpy(rows_RT),
            torch.from_numpy(starts_I),
            torch.from_numpy(np.maximum(counts_I, 1)),
        )

    def batch(self, user_indices_B: Tensor, target_ids_B: Tensor, negative_ids_N: Tensor) -> SemanticBatch:
        """What a loss needs about some training users, their targets and the step's negatives."""
        counts_B = self.counts_I[user_indices_B]
        places_BM = torch.arange(int(counts_B.max()))[None, :]
        mask_BM = places_BM < counts_B[:, None]
        rows_BM = torch.where(mask_BM, self.starts_I[user_indices_B][:, None] + places_BM, 0)
        interests_BMT = self.interests_RT[rows_BM] * mask_BM[..., None]
        return SemanticBatch(
            interests_BMT, mask_BM, self.item_text(target_ids_B), self.item_text(negative_ids_N)
        )

    def item_text(self, item_ids: Tensor) -> Tensor:
        """Text vectors of items, zero where there is no text."""
        return self.item_text_VT[item_ids]


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    """A list column of equally long vectors as `[n, T]` float32.

    Raises:
        StageError: the vectors have different widths.
    """
    if len(column) == 0:
        return np.zeros((0, 0), np.float32)
    array = column.combine_chunks()
    values = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    width, rest = divmod(len(values), len(array))
    offsets = array.offsets.to_numpy()
    if rest or not (np.diff(offsets) == width).all():
        raise StageError("train: text vectors of one table have different widths")
    return values.reshape(len(array), width).copy()


def _item_matrix(items: pa.Table, num_rows: int) -> np.ndarray:
    ids, vectors = items.column("item_index").to_numpy(), _vectors(items.column("vector"))
    missing = np.setdiff1d(np.arange(1, num_rows), ids)
    if len(missing):
        raise StageError(
            f"train: {len(missing):,} items have no text vector (first: item_index {missing[0]}); "
            "run `distributed-mi embed` again"
        )
    matrix = np.zeros((num_rows, vectors.shape[1]), np.float32)
    has_text = items.column("has_text").to_numpy()
    matrix[ids[has_text]] = vectors[has_text]
    if not has_text.all():
        logger.info(
            "%s of %s items have no text; the auxiliary tasks leave them out",
            f"{int((~has_text).sum()):,}",
            f"{len(has_text):,}",
        )
    return matrix


def _exemplar_of_user(assignment: pa.Table, user_index_U: np.ndarray) -> np.ndarray:
    """Exemplar of every `user_index` up to the largest training user; -1 for those who are not training users."""
    exemplar_I = np.full(int(user_index_U.max()) + 1, -1, np.int64)
    users = assignment.column("user_index").to_numpy()
    known = users < len(exemplar_I)
    exemplar_I[users[known]] = assignment.column("exemplar_user_index").to_numpy()[known]
    unassigned = user_index_U[exemplar_I[user_index_U] < 0]
    if len(unassigned):
        raise StageError(
            f"train: {len(unassigned):,} training users have no exemplar (first: user_index {unassigned[0]}); "
            "run `distributed-mi exemplars` again"
        )
    return exemplar_I


def _spans(owner_R: np.ndarray, exemplar_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First interest row and number of rows of each user; without interests: row R (their mean) and 0."""
    starts_I = np.searchsorted(owner_R, exemplar_I, side="left").astype(np.int64)
    counts_I = np.searchsorted(owner_R, exemplar_I, side="right").astype(np.int64) - starts_I
    return np.where(counts_I == 0, len(owner_R), starts_I), counts_I


def _count_without_interests(counts_U: np.ndarray) -> None:
    without = int((counts_U == 0).sum())
    if without:
        logger.warning(
            "%s of %s training users inherit from an exemplar whose interests failed; they get the mean interest",
            f"{without:,}",
            f"{len(counts_U):,}",
        )
