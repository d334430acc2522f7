"""The most popular items, for everybody: the floor that every table of results needs.

Score = number of times the item occurs in the training users' sequences; counted, not trained. REMI's code
estimates the same from the targets it happens to draw; counting is exact and deterministic.

The count stands in the first column of the item table and the user vector reads that column, so evaluation and
serving need no special path. float32 holds counts up to 16,777,216 exactly.

Shapes:  B users, V items with padding, D width.
"""

import torch
from torch import Tensor

from distributed_mi.core.config import ConfigModel
from distributed_mi.core.errors import InputError
from distributed_mi.models.base import HistoryBatch, Recommender, UserState


class MostPopular(Recommender):
    """Ranks all items by training events; see the module docstring."""

    has_loss = False
    personal = False

    class Config(ConfigModel):
        """Nothing to choose."""

    @property
    def num_interests(self) -> int:
        """One vector, the same for every user."""
        return 1

    def encode(self, history: HistoryBatch) -> UserState:
        """The vector that reads the first column; needs no lookup."""
        ones_B1D = history.mask_BL.new_zeros((len(history.mask_BL), 1, self.items.dim), dtype=torch.float32)
        ones_B1D[:, :, 0] = 1.0
        return UserState(ones_B1D)

    def encode_rows(self, history: HistoryBatch, history_rows_BLD: Tensor) -> UserState:
        """Same as `encode`; the rows are not looked at."""
        return self.encode(history)

    def fit_counts(self, num_train_events_V: Tensor) -> None:
        """Write the counts into the item table; each worker fills the rows it holds.

        Args:
            num_train_events_V: events of every item in training; position 0 (padding) is ignored.

        Raises:
            InputError: not one count per row.
        """
        if num_train_events_V.shape != (self.items.num_rows,):
            raise InputError(
                f"most_popular: {tuple(num_train_events_V.shape)} counts for {self.items.num_rows} item rows"
            )
        ids_R, tensors = self.items.state()
        weight_RD = torch.zeros_like(tensors["weight"])
        weight_RD[:, 0] = num_train_events_V.to(weight_RD)[ids_R]
        self.items.assign(ids_R, {"weight": weight_RD})


MODEL = MostPopular
