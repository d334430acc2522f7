"""YouTube DNN as this family of papers uses it: one linear layer on the mean of the history.

Covington et al., "Deep Neural Networks for YouTube Recommendations", RecSys 2016, without its features and depth.

    u = W mean_t(E_x_t) + b           over real items

Differences between public versions, and ours:
    bias      TensorFlow ComiRec and ReChorus: yes. REMI's port: no. Here: `bias`, default True.
    padding   REMI's port adds the padding vector into the sum. Here padding has no influence.

Shapes:  B users, L history, D width.
"""

import torch
from torch import Tensor, nn

from distributed_mi.embeddings.table import ItemTable
from distributed_mi.losses.config import ObjectiveConfig
from distributed_mi.models.base import HistoryBatch, LossTerms, Recommender, StepRows, TrainBatch, UserState
from distributed_mi.models.layers import kaiming_normal, masked_mean
from distributed_mi.models.objective import Objective


class YouTubeDNN(Recommender):
    """Single-interest recommender: a linear layer on the mean of the history."""

    class Config(ObjectiveConfig):
        """Architecture and loss of the DNN."""

        bias: bool = True
        """Whether the linear layer carries a bias."""

    def __init__(self, config: Config, *, items: ItemTable, max_history: int, text_dim: int = 0) -> None:
        super().__init__(config, items=items, max_history=max_history, text_dim=text_dim)
        self.weight_DD = kaiming_normal(items.dim, items.dim, fan_in=items.dim)
        self.bias_D = nn.Parameter(torch.zeros(items.dim)) if config.bias else None
        self.objective = Objective(config, items=items)

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
        """Where the loss is, which takes most of a step."""
        return self.objective.is_compiled

    @property
    def num_interests(self) -> int:
        """One."""
        return 1

    def encode_rows(self, history: HistoryBatch, history_rows_BLD: Tensor) -> UserState:
        """See `Recommender.encode_rows`."""
        user_BD = masked_mean(history_rows_BLD, history.mask_BL) @ self.weight_DD
        return UserState((user_BD if self.bias_D is None else user_BD + self.bias_D)[:, None, :])

    def loss_from_rows(self, batch: TrainBatch, rows: StepRows) -> tuple[UserState, LossTerms]:
        """The configured loss."""
        state = self.encode_rows(batch.history, rows.history_BLD)
        values_B = self.objective(state.interests_BKD, batch, rows, None)
        return state, LossTerms(mean={"recommendation": values_B})


MODEL = YouTubeDNN
