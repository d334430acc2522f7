"""REMI: ComiRec-SA trained with interest-aware hard negatives and a routing regulariser.

Xie et al., "Rethinking Multi-Interest Learning for Candidate Matching in Recommender Systems", RecSys 2023.

    loss = mean_b sampled_softmax(beta) + lambda sum_b sum_k C_bk^2

The forward pass is ComiRec-SA's. `ihn_beta = 0` and `rr_weight = 0` give ComiRec-SA exactly. The regulariser is a
sum over users, so `rr_weight` means the same as in the authors' code at 128 users a step, width 64 and window 20
only; losses/regularizers.py says how to carry it to other sizes. The authors publish lambda 100 with beta 10
(Amazon Books), 1 (Gowalla), 0.1 (RetailRocket).

Differences from the authors' code: those of comirec_sa.py; padding is no negative; accidental hits are masked by
default, because they would get the largest weights.
"""

from typing import Any, Self

from pydantic import NonNegativeFloat, model_validator

from distributed_mi.losses.config import HardLossConfig
from distributed_mi.losses.regularizers import routing_penalty
from distributed_mi.models.base import LossTerms, StepRows, TrainBatch, UserState
from distributed_mi.models.comirec_sa import ComiRecSA
from distributed_mi.models.objective import Objective


class REMI(ComiRecSA):
    """ComiRec-SA with REMI's loss; see the module docstring for paper and differences."""

    class Config(ComiRecSA.Config):
        """Architecture of ComiRec-SA and weights of REMI's loss."""

        rr_weight: NonNegativeFloat = 100.0
        """lambda, weight of the routing regulariser, which is summed over the users of a step. 0: off."""
        ihn_beta: NonNegativeFloat = 1.0
        """beta, concentration of the weights on hard negatives. 0: all negatives weigh the same."""
        loss: HardLossConfig = HardLossConfig()
        """How interests are compared with the target and other items (`[train.model.loss]`)."""

        @model_validator(mode="after")
        def _no_idle_beta(self) -> Self:
            changed = self.ihn_beta != type(self).model_fields["ihn_beta"].default
            if changed and self.loss.name != "hard_negatives":
                raise ValueError(f'ihn_beta belongs to loss.name = "hard_negatives", not "{self.loss.name}"')
            return self

    def _objective(self, config: Any) -> Objective:
        return Objective(config, items=self.items, beta=config.ihn_beta)

    def loss_from_rows(self, batch: TrainBatch, rows: StepRows) -> tuple[UserState, LossTerms]:
        """The configured loss, by default the hard-negative softmax, and the routing penalty."""
        state, terms = super().loss_from_rows(batch, rows)
        assert state.attention_BKL is not None
        if self.config.rr_weight:
            penalty_B = routing_penalty(
                state.attention_BKL, dim=self.items.dim, num_positions=self.max_history
            )
            terms.sum["routing"] = self.config.rr_weight * penalty_B
        return state, terms

    def loss_and_gradients(self, batch: TrainBatch, num_users_per_step: int) -> dict[str, float] | None:
        """See `Recommender.loss_and_gradients`."""
        return self._loss_and_gradients(batch, num_users_per_step, self.config.rr_weight)


MODEL = REMI
