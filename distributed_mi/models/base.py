"""What every recommender takes and gives; see `tests/contracts/test_models.py` for what is asked of each.

A model is written for one device. It reads item vectors through an `ItemTable` and never asks how many workers hold
the table. One interface serves single- and multi-interest models: an item's score is the largest inner product over
the K interests.

Shapes:  B users, L history (left-padded, newest item last), K interests, D width, N negatives, M semantic
interests, T text width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from distributed_mi.core.config import ConfigModel
from distributed_mi.core.cpu import is_plain
from distributed_mi.core.errors import InputError
from distributed_mi.embeddings.table import ItemTable
from distributed_mi.losses.read_out import ReadOut


@dataclass(frozen=True)
class HistoryBatch:
    """Histories of B users.

    Args:
        item_ids_BL: int64, left-padded with 0, newest item last.
        mask_BL: bool, True on real items.

    Raises:
        InputError: a user without a real item (the row is named).
    """

    item_ids_BL: Tensor
    mask_BL: Tensor

    def __post_init__(self) -> None:
        if self.mask_BL.device.type == "cpu" and self.mask_BL.shape[1] and self.mask_BL.numpy()[:, -1].all():
            return
        empty = ~self.mask_BL.any(dim=1)
        if bool(empty.any()):
            raise InputError(f"history batch: row {int(empty.nonzero()[0])} has no real item")


@dataclass(frozen=True)
class SemanticBatch:
    """What the language side knows about B users and their targets; only models with `requires_semantics` get it.

    Args:
        interests_BMT: float32, text vectors of the interests that each user inherits from its exemplar,
        zero-padded. interests_mask_BM: bool, True on real interests; at least one per user. target_text_BT:
        float32, text vector of the target item. negative_text_NT: float32, text vectors of the step's shared
        negatives. catalogue_text_VT: float32, text vectors of all items, row 0 zero; None unless the model has
        `reads_catalogue_text`.
    Items without text have zero vectors.

    Raises:
        InputError: a user without a real interest (the row is named).
    """

    interests_BMT: Tensor
    interests_mask_BM: Tensor
    target_text_BT: Tensor
    negative_text_NT: Tensor
    catalogue_text_VT: Tensor | None = None

    def __post_init__(self) -> None:
        empty = ~self.interests_mask_BM.any(dim=1)
        if bool(empty.any()):
            raise InputError(f"semantic batch: row {int(empty.nonzero()[0])} has no semantic interest")


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class PositionTargets:
    """The item after each position of the histories.

    Args:
        ids_BL: int64, 0 where there is no target.
        mask_BL: bool, True where there is one; then the history is real there too.
        num_targets: of the global step, over all workers and accumulation parts. A loss that means the average over
            targets gives `sum_L(values) * num_users / num_targets` as its `[B]` values.
        log_q_BL: log probability of drawing each target as a negative; None: no correction of the logits.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    num_targets: int
    log_q_BL: Tensor | None = None


@dataclass(frozen=True)
class TrainBatch:
    """One worker's share of a global step.

    Args:
        history: what the model may read.
        target_ids_B: int64, the next item of each user.
        negative_ids_N: int64, shared by all users of the global step (the same on every worker); may repeat and may
            contain targets.
        semantics: language side, or None.
        gather: concatenates a `[B_local, ...]` tensor over the workers of the step, with gradients; identity alone.
        gather_offset: position of this worker's first row in what `gather` returns.
        target_log_q_B: log probability of drawing each target as a negative; None: no correction of the logits.
        negative_log_q_N: the same of each negative; given together with `target_log_q_B`.
        every_position: targets at every position, for models with `target_rule = "every_position"`; then
            `target_ids_B` is the newest target of each user.
    """

    history: HistoryBatch
    target_ids_B: Tensor
    negative_ids_N: Tensor
    semantics: SemanticBatch | None = None
    gather: Callable[[Tensor], Tensor] = _alone
    gather_offset: int = 0
    target_log_q_B: Tensor | None = None
    negative_log_q_N: Tensor | None = None
    every_position: PositionTargets | None = None


@dataclass(frozen=True)
class UserState:
    """What `encode` returns.

    Args:
        interests_BKD: float32, not normalised.
        attention_BKL: how much each history position feeds each interest, rows summing to 1 over real positions and
        0 on
            padding; None when the model has no such weights.
    """

    interests_BKD: Tensor
    attention_BKL: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """A training loss that does not depend on how a step is cut into workers.

    Args:
        mean: name -> `[B_local]` values that are averaged over all users of the global step.
        sum: name -> `[B_local]` values that are summed over all users of the global step (REMI's routing penalty).
    Weights (lambda, gamma, ...) are already applied. The engine adds everything up.
    """

    mean: dict[str, Tensor]
    sum: dict[str, Tensor] = field(default_factory=dict)

    def total(self, num_users_per_step: int) -> Tensor:
        """This worker's part of the loss; the parts of all workers add up to the loss of the global step."""
        return self.parts(num_users_per_step).sum()

    def parts(self, num_users_per_step: int) -> Tensor:
        """This worker's part of each term, `[num_terms]`, those of `mean` first."""
        divisors = [float(num_users_per_step)] * len(self.mean) + [1.0] * len(self.sum)
        parts: Tensor = _Parts.apply(divisors, *self.mean.values(), *self.sum.values())
        return parts


class _Parts(torch.autograd.Function):
    """Sums of several tensors, each divided by a number; one node of the graph instead of three a term."""

    @staticmethod
    def forward(ctx: Any, divisors: list[float], *values: Tensor) -> Tensor:
        ctx.divisors, ctx.like = divisors, [(v.shape, v.dtype) for v in values]
        if all(is_plain(v) for v in values):  # numpy is twice as fast where there is little to add up
            sums = [v.numpy().sum() / np.float32(d) for v, d in zip(values, divisors, strict=True)]
            return torch.from_numpy(np.array(sums, np.float32))
        return torch.stack([v.sum().float() / d for v, d in zip(values, divisors, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flows = zip(grads[0].unbind(), ctx.divisors, ctx.like, strict=True)
        return None, *((flow / d).to(dtype).expand(shape) for flow, d, (shape, dtype) in flows)


@dataclass(frozen=True)
class StepRows:
    """Item rows of one worker's share of a step, with gradients.

    Args:
        history_BLD: rows of the histories.
        target_BD: rows of the targets.
        negative_ND: rows of the shared negatives; none where the model has not `reads_negatives`.
    """

    history_BLD: Tensor
    target_BD: Tensor
    negative_ND: Tensor


_MAKE_THE_LOSS = (
    "loss_and_gradients", "forward", "loss", "loss_from_rows", "encode", "encode_rows", "step_rows", "step_ids",
)  # fmt: skip


class Recommender(nn.Module):
    """Base of every model. A file exports its subclass as `MODEL`.

    The item table is not a sub-module: its rows are trained by the table's own optimizer and DeepSpeed must not see
    them.
    """

    Config: ClassVar[type[ConfigModel]]
    requires_semantics: ClassVar[bool] = False
    """Whether `loss` needs a `SemanticBatch` (then the stages embed, exemplars and interests must have run)."""
    has_loss: ClassVar[bool] = True
    """False for models that are fitted by counting (`fit_counts`) instead of gradient steps."""

    target_rule: ClassVar[Literal["one_position", "every_position"]] = "one_position"
    """What a training batch asks to predict: one random event of each user, or the event after every position
    (`TrainBatch.every_position`; for causal encoders)."""

    personal: ClassVar[bool] = True
    """False when every history gets the same list, so that there is no interest to name."""

    def __init__(self, config: Any, *, items: ItemTable, max_history: int, text_dim: int = 0) -> None:
        super().__init__()
        self.config = config
        self.max_history = max_history
        self.text_dim = text_dim
        object.__setattr__(self, "items", items)

    items: ItemTable

    read_out: ReadOut | None = None
    """Which of several interests the loss compares with a target. A model whose loss calls it may be given another one
    (EIMF's `recommendation_read_out`). None: there is no choice to replace."""

    @property
    def reads_negatives(self) -> bool:
        """Whether `loss` needs the rows of the step's shared negatives."""
        return True

    @property
    def reads_log_q(self) -> bool:
        """Whether `loss` corrects scores by how probable items are as negatives."""
        return True

    @property
    def reads_catalogue_text(self) -> bool:
        """Whether `loss` needs the text vectors of all items, on each worker's device."""
        return False

    @property
    def is_compiled(self) -> bool:
        """Whether float32 steps on a CPU spend their time in compiled kernels.

        These get the worker's threads then; otherwise torch's operations do.
        """
        return False

    @property
    def num_interests(self) -> int:
        """K, vectors per user."""
        raise NotImplementedError

    def encode(self, history: HistoryBatch) -> UserState:
        """Read a user's interests from a history; all a recommendation needs."""
        return self.encode_rows(history, self.items.rows(history.item_ids_BL))

    def loss(self, batch: TrainBatch) -> LossTerms:
        """Loss of one worker's share of a step. All item rows of the step are fetched in one lookup."""
        return self.loss_from_rows(batch, self.step_rows(batch))[1]

    def forward(self, batch: TrainBatch) -> LossTerms:
        """Same as `loss`: engines (DDP, DeepSpeed) hook `forward`."""
        return self.loss(batch)

    def loss_and_gradients(self, batch: TrainBatch, num_users_per_step: int) -> dict[str, float] | None:
        """The loss of one worker's share of a float32 step on a CPU, and backward, without autograd.

        Gradients go where `LossTerms.total(...).backward()` would take them: they are added to those of the parameters,
        and given to the table.

        A class that changes the loss of its parent has to change this too, or is trained by autograd; see
        `has_own_gradients`.

        Args:
            batch: the share.
            num_users_per_step: of the global step.

        Returns:
            This worker's part of each term, those of `LossTerms.mean` first; None: there is no such form and nothing
            has happened.
        """
        return None

    @classmethod
    def has_own_gradients(cls) -> bool:
        """Whether `loss_and_gradients` is of this class's loss: no class below the one that has it changed the loss."""
        rank = {
            name: next(i for i, c in enumerate(cls.__mro__) if name in vars(c)) for name in _MAKE_THE_LOSS
        }
        return all(rank["loss_and_gradients"] <= place for place in rank.values())

    def step_rows(self, batch: TrainBatch) -> StepRows:
        """Every item row that a step needs, in one exchange."""
        return StepRows(*self.items.lookup(*self.step_ids(batch)))

    def step_ids(self, batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
        """What `step_rows` looks up, which may be announced to the table."""
        negative_ids = batch.negative_ids_N if self.reads_negatives else batch.negative_ids_N[:0]
        return batch.history.item_ids_BL, batch.target_ids_B, negative_ids

    def encode_rows(self, history: HistoryBatch, history_rows_BLD: Tensor) -> UserState:
        """`encode` on rows that were fetched already, so that a model built on another shares its lookup."""
        raise NotImplementedError

    def loss_from_rows(self, batch: TrainBatch, rows: StepRows) -> tuple[UserState, LossTerms]:
        """`loss` on rows that were fetched already, with what was encoded on the way."""
        raise NotImplementedError

    def fit_counts(self, num_train_events_V: Tensor) -> None:
        """Fit from how often each item was interacted with in training; only for models without a loss.

        Collective in a group of workers; each passes the counts of all items.
        """
        raise NotImplementedError
