"""ComiRec-SA: several interests per user by self-attentive pooling.

Cen et al., "Controllable Multi-Interest Framework for Recommendation", KDD 2020, section 3.2.

    A = softmax_L( W2 tanh(W1 (h + p) + b1) )      one attention row per interest
    interests = A h                                positions steer, they are not summed in

Differences between public versions, and ours:
    biases         authors (TensorFlow): both layers. REMI's port: none. Here: `bias`, default True, of the first
                   layer only: one of the second shifts all positions alike and cancels in the softmax.
    inner width    authors: 4 x hidden_size. ReChorus: 8. Here: `attention_dim`, default 4 x dim.
    positions      authors: by slot of a right-padded window. Here: by distance from the newest item, so that
                   padding cannot shift them.
    first values   Kaiming normal for every weight, as REMI's port.
    all padding    authors: uniform weights over zeros. Here: refused in HistoryBatch.
    negatives      accidental hits are masked by default (losses/sampled_softmax.py).

Shapes:  B users, L history, K interests, D width.
"""

from pydantic import PositiveInt
from torch import Tensor

from distributed_mi.embeddings.table import ItemTable
from distributed_mi.losses.config import ObjectiveConfig
from distributed_mi.losses.read_out import ReadOut, hard_read_out
from distributed_mi.models.base import HistoryBatch, LossTerms, Recommender, StepRows, TrainBatch, UserState
from distributed_mi.models.fused import FusedLoss
from distributed_mi.models.layers import AttentivePooling
from distributed_mi.models.objective import Objective


class ComiRecSA(Recommender):
    """Self-attentive multi-interest recommender; see the module docstring for paper and differences."""

    class Config(ObjectiveConfig):
        """Architecture and loss of ComiRec-SA."""

        num_interests: PositiveInt = 4
        """K, vectors per user. Each costs one more index query per user when serving."""
        attention_dim: PositiveInt | None = None
        """Width of the hidden attention layer. None: four times the table's width."""
        bias: bool = True
        """Whether the hidden attention layer carries a bias, as in the authors' code."""
        positions: bool = True
        """Add learned positions to the attention input, never to the pooled values."""

    def __init__(self, config: Config, *, items: ItemTable, max_history: int, text_dim: int = 0) -> None:
        super().__init__(config, items=items, max_history=max_history, text_dim=text_dim)
        self.pooling = AttentivePooling(
            items.dim,
            config.num_interests,
            attention_dim=config.attention_dim or 4 * items.dim,
            max_history=max_history,
            bias=config.bias,
            positions=config.positions,
        )
        self.objective = self._objective(config)
        self.read_out: ReadOut | None = self.objective.default_read_out

    def _objective(self, config: Config) -> Objective:
        return Objective(config, items=self.items)

    @property
    def reads_negatives(self) -> bool:
        """Whether the configured loss needs them."""
        return self.objective.reads_negatives

    @property
    def reads_log_q(self) -> bool:
        """Whether the configured loss does."""
        return self.objective.reads_log_q

    @property
    def is_compiled(self) -> bool:
        """Where the loss is: the pooling always is."""
        return self.objective.is_compiled

    @property
    def num_interests(self) -> int:
        """K, vectors per user."""
        return int(self.config.num_interests)

    def encode_rows(self, history: HistoryBatch, history_rows_BLD: Tensor) -> UserState:
        """Interests, not normalised, and the attention that made them."""
        return UserState(*self.pooling(history_rows_BLD, history.mask_BL))

    def loss_from_rows(self, batch: TrainBatch, rows: StepRows) -> tuple[UserState, LossTerms]:
        """The configured loss, on the interest closest to the target (`read_out`: hard, as in the paper).

        The choice of interest is not differentiated; the other K - 1 receive no gradient from this user.
        """
        state = self.encode_rows(batch.history, rows.history_BLD)
        values_B = self.objective(state.interests_BKD, batch, rows, self.read_out)
        return state, LossTerms(mean={"recommendation": values_B})

    def loss_and_gradients(self, batch: TrainBatch, num_users_per_step: int) -> dict[str, float] | None:
        """See `Recommender.loss_and_gradients`."""
        return self._loss_and_gradients(batch, num_users_per_step)

    def _loss_and_gradients(
        self, batch: TrainBatch, num_users_per_step: int, routing_weight: float = 0.0
    ) -> dict[str, float] | None:
        objective = self.objective
        if not objective.is_compiled or self.read_out is not hard_read_out:
            return None
        what = FusedLoss(
            objective.concentration,
            objective.mask_accidental_hits,
            routing_weight=routing_weight,
            window=self.max_history,
        )
        return what.differentiate(
            self.pooling, batch, self.items.fetch(*self.step_ids(batch)), num_users_per_step
        )


MODEL = ComiRecSA
