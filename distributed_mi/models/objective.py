"""The recommendation loss that a configuration names, for any model that encodes users as interests.

Shapes:  B users, G users of the global step, K interests, D width, N negatives.
"""

from typing import Any

from torch import Tensor

from distributed_mi.embeddings.table import ItemTable
from distributed_mi.losses.config import ObjectiveConfig
from distributed_mi.losses.in_batch import in_batch_softmax
from distributed_mi.losses.pairwise import bpr, gbce
from distributed_mi.losses.read_out import ReadOut, hard_read_out
from distributed_mi.losses.sampled_softmax import sampled_softmax
from distributed_mi.models.base import StepRows, TrainBatch


class Objective:
    """Turns interests into a loss per user."""

    def __init__(self, config: ObjectiveConfig, *, items: ItemTable, beta: float | None = None) -> None:
        """Choose the loss.

        Args:
            config: which loss, and whether accidental hits are negatives.
            items: the table, which `full_softmax` scores as a whole.
            beta: of `hard_negatives`; None: the configuration's.
        """
        self.config, self.items = config.loss, items
        self.mask_accidental_hits = config.mask_accidental_hits
        self.beta = config.loss.beta if beta is None else beta

    @property
    def reads_negatives(self) -> bool:
        """Whether the rows of the step's shared negatives are read."""
        return self.config.name not in {"in_batch", "full_softmax"}

    @property
    def reads_log_q(self) -> bool:
        """Whether scores are corrected where the batch says how probable items are."""
        return self.config.name in {"sampled_softmax", "hard_negatives", "in_batch"}

    @property
    def is_compiled(self) -> bool:
        """Whether the loss is a compiled kernel on a CPU."""
        return self.config.name in {"sampled_softmax", "hard_negatives"}

    @property
    def concentration(self) -> float:
        """Beta of the softmax over negatives; 0 where all weigh the same."""
        return float(self.beta) if self.config.name == "hard_negatives" else 0.0

    @property
    def default_read_out(self) -> ReadOut | None:
        """What a model with several interests begins with; None where the loss chooses for each item anew."""
        chooses = self.config.name == "full_softmax" and self.config.choice != "target"
        return None if chooses else hard_read_out

    def __call__(
        self, interests_BKD: Tensor, batch: TrainBatch, rows: StepRows, read_out: ReadOut | None
    ) -> Tensor:
        """Loss of each user, `[B]`.

        Args:
            interests_BKD: of this worker's users.
            batch: targets, negatives and what other workers have.
            rows: what was looked up.
            read_out: which interest is compared with the target; None: there is one, or the loss chooses itself.
        """
        if read_out is None and self.config.name == "full_softmax":
            return self._full_softmax(interests_BKD, batch, rows)
        query_BD = interests_BKD[:, 0] if read_out is None else read_out(interests_BKD, rows.target_BD)
        if self.config.name == "full_softmax":
            return self._full_softmax(query_BD[:, None], batch, rows)
        if self.config.name == "in_batch":
            return self._in_batch(query_BD, batch, rows)
        return self._with_negatives(query_BD, batch, rows)

    def _with_negatives(self, query_BD: Tensor, batch: TrainBatch, rows: StepRows) -> Tensor:
        compared = (query_BD, rows.target_BD, rows.negative_ND)
        ids: dict[str, Any] = {
            "target_ids_B": batch.target_ids_B,
            "negative_ids_N": batch.negative_ids_N,
            "mask_accidental_hits": self.mask_accidental_hits,
        }
        if self.config.name == "bpr":
            return bpr(*compared, **ids)
        if self.config.name == "gbce":
            return gbce(*compared, calibration=self.config.calibration, num_rows=self.items.num_rows, **ids)
        return sampled_softmax(
            *compared,
            beta=self.concentration,
            target_log_q_B=batch.target_log_q_B,
            negative_log_q_N=batch.negative_log_q_N,
            **ids,
        )

    def _in_batch(self, query_BD: Tensor, batch: TrainBatch, rows: StepRows) -> Tensor:
        log_q_B = batch.target_log_q_B
        return in_batch_softmax(
            query_BD,
            batch.gather(rows.target_BD),
            offset=batch.gather_offset,
            target_ids_B=batch.target_ids_B,
            candidate_ids_G=batch.gather(batch.target_ids_B),
            mask_accidental_hits=self.mask_accidental_hits,
            candidate_log_q_G=None if log_q_B is None else batch.gather(log_q_B),
        )

    def _full_softmax(self, interests_BKD: Tensor, batch: TrainBatch, rows: StepRows) -> Tensor:
        return self.items.full_catalogue_loss(
            interests_BKD,
            batch.target_ids_B,
            choice=self.config.choice,
            power=self.config.power,
            target_rows_BD=rows.target_BD,
        )
