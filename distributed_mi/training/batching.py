"""A global step cut into the batches of one worker: users, negatives and, where asked for, semantics.

What a step holds is a function of (seed, step) alone. Worker r of W takes the r-th contiguous share of its users, so
the same users, targets and negatives make a step whatever the number of workers.

Shapes:  B users of one batch, L history, N negatives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_mi.data.batches import EveryPositionStep, SampledStep, Sampler, share_bounds
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.losses.negatives import NegativeSampler
from distributed_mi.models.base import HistoryBatch, PositionTargets, SemanticBatch, TrainBatch
from distributed_mi.training.semantics import Semantics


def cut_into_parts(total: int, rank: int, size: int, parts: int) -> list[tuple[int, int, int]]:
    """This worker's share of `total` users, cut into accumulation parts.

    Returns:
        For each part: first user, the one after the last, and where this worker's rows begin when that part of all
        workers is gathered in rank order.
    """
    cuts = [_parts_of(total, worker, size, parts) for worker in range(size)]
    out = []
    for part, (first, last) in enumerate(cuts[rank]):
        offset = sum(cuts[worker][part][1] - cuts[worker][part][0] for worker in range(rank))
        out.append((first, last, offset))
    return out


def _parts_of(total: int, worker: int, size: int, parts: int) -> list[tuple[int, int]]:
    first, last = share_bounds(total, worker, size)
    inner = (share_bounds(last - first, part, parts) for part in range(parts))
    return [(first + start, first + stop) for start, stop in inner]


class StepBatches:
    """The batches of any step for one worker."""

    def __init__(
        self,
        sampler: Sampler,
        negatives: NegativeSampler,
        group: WorkerGroup,
        *,
        semantics: Semantics | None = None,
        catalogue_text: bool = False,
        parts: int = 1,
    ) -> None:
        """Prepare to cut steps.

        Args:
            sampler: users, histories and targets of a step.
            negatives: shared negatives of a step; its configuration says whether logits are corrected.
            group: the workers of the run.
            semantics: language side, for models that ask for it.
            catalogue_text: give every batch the text of all items too, moved to the device once.
            parts: accumulation parts of a worker's share.
        """
        self.sampler, self.negatives, self.group, self.semantics = sampler, negatives, group, semantics
        self.num_users = sampler.num_users
        self._on_cpu = group.device.type == "cpu"
        self._catalogue_text_VT: Tensor | None = None
        if semantics is not None and catalogue_text:
            self._catalogue_text_VT = self._to_device(semantics.item_text_VT)
        self._cuts = cut_into_parts(self.num_users, group.rank, group.size, parts)

    def __call__(self, step: int) -> Sequence[TrainBatch]:
        """This worker's share of a step; see `prefetch.StepSource`."""
        share = self.sampler.sample(step, self.group.rank, self.group.size)
        drawn = self.negatives.draw(step)
        log_q_N = drawn.log_q_N if self.negatives.config.log_q else None
        start = self._cuts[0][0]
        return [
            self._batch(share, slice(first - start, last - start), offset, drawn.ids_N, log_q_N)
            for first, last, offset in self._cuts
        ]

    def _batch(
        self,
        share: SampledStep | EveryPositionStep,
        part: slice,
        offset: int,
        negatives_N: Tensor,
        log_q_N: Tensor | None,
    ) -> TrainBatch:
        targets_B = torch.from_numpy(share.target_ids_B[part])
        semantics = None
        if self.semantics is not None:
            users_B = torch.from_numpy(share.user_index_B[part])
            semantics = self._semantics_to_device(self.semantics.batch(users_B, targets_B, negatives_N))
        return TrainBatch(
            HistoryBatch(
                self._to_device(torch.from_numpy(share.history_ids_BL[part])),
                self._to_device(torch.from_numpy(share.history_mask_BL[part])),
            ),
            self._to_device(targets_B),
            self._to_device(negatives_N),
            semantics=semantics,
            gather=self.group.gather_with_grad,
            gather_offset=offset,
            target_log_q_B=None if log_q_N is None else self._to_device(self.negatives.log_q(targets_B)),
            negative_log_q_N=None if log_q_N is None else self._to_device(log_q_N),
            every_position=self._positions(share, part) if isinstance(share, EveryPositionStep) else None,
        )

    def _positions(self, share: EveryPositionStep, part: slice) -> PositionTargets:
        ids_BL = torch.from_numpy(share.target_ids_BL[part])
        return PositionTargets(
            self._to_device(ids_BL),
            self._to_device(torch.from_numpy(share.target_mask_BL[part])),
            share.num_targets,
            self._to_device(self.negatives.log_q(ids_BL)) if self.negatives.config.log_q else None,
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if self._on_cpu else tensor.to(self.group.device, non_blocking=True)

    def _semantics_to_device(self, batch: SemanticBatch) -> SemanticBatch:
        return SemanticBatch(
            self._to_device(batch.interests_BMT),
            self._to_device(batch.interests_mask_BM),
            self._to_device(batch.target_text_BT),
            self._to_device(batch.negative_text_NT),
            self._catalogue_text_VT,
        )
