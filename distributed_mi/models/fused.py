"""The loss of an attentive multi-interest model and its gradients in one compiled call per thread, on a CPU.

A step of ComiRec-SA or REMI is some twenty operations on small matrices; as nodes of autograd's graph it spends
as much time in Python between them as in them. Here there is no graph: rows in, gradients out.

`loss_from_rows` of the models, under autograd, is the form for every other case, and what this one is held against.

Shapes:  B users, L history, N shared negatives, D width, A inner width, K interests, M distances from the newest item.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distributed_mi.core.cpu import map_slices
from distributed_mi.embeddings.table import Fetched
from distributed_mi.models.base import TrainBatch
from distributed_mi.models.layers import AttentivePooling


@dataclass(frozen=True)
class FusedLoss:
    """Softmax over shared negatives of the interest closest to the target, and REMI's routing penalty.

    Args:
        beta: concentration of the weights on hard negatives; 0: all weigh the same.
        mask_accidental_hits: leave out negatives that equal the user's target.
        routing_weight: of the routing penalty; 0: there is none.
        window: length of the routing penalty.
    """

    beta: float
    mask_accidental_hits: bool
    routing_weight: float = 0.0
    window: int = 0

    def differentiate(
        self, pooling: AttentivePooling, batch: TrainBatch, fetched: Fetched, num_users_per_step: int
    ) -> dict[str, float]:
        """Add gradients to those of the parameters, give back those of the rows; see `Recommender.loss_and_gradients`.

        Args:
            pooling: float32, on the CPU.
            batch: the share of a step.
            fetched: of histories, targets and negatives.
            num_users_per_step: what the softmax loss is divided by.
        """
        from distributed_mi.models import fused_kernels, kernels

        source = fetched.source_UD.numpy()
        of_histories, target_slots, negative_slots = map(_flat, fetched.slots)
        places, starts = kernels.find_places(batch.history.mask_BL.contiguous().numpy())
        slots, length = of_histories.take(places), batch.history.mask_BL.shape[1]
        positions = _NONE if pooling.positions is None else _array(pooling.positions.by_distance_LD)
        bias = _NO_NUMBERS if pooling.inner_bias_A is None else _array(pooling.inner_bias_A)
        inner, outer_KA = _array(pooling.inner_DA), np.ascontiguousarray(_array(pooling.outer_AK).T)
        target_ids, negative_ids = _NO_IDS, _NO_IDS
        if self.mask_accidental_hits:
            target_ids, negative_ids = _flat(batch.target_ids_B), _flat(batch.negative_ids_N)
        target_log_q, negative_log_q = _NO_NUMBERS, _NO_NUMBERS
        if batch.target_log_q_B is not None and batch.negative_log_q_N is not None:
            target_log_q, negative_log_q = _flat(batch.target_log_q_B), _flat(batch.negative_log_q_N)
        users, dim = len(target_slots), source.shape[1]
        loss_B, routing_B = np.empty((2, users), np.float32)
        divisor, weight = np.float32(num_users_per_step), np.float32(self.routing_weight)
        loss_flow_B = np.full(users, np.float32(1.0) / divisor)
        routing_flow_B = np.full(users if self.routing_weight else 0, weight)
        of_rows, of_target = np.empty((len(slots), dim), np.float32), np.empty((users, dim), np.float32)

        def work(b: slice) -> tuple[np.ndarray, ...]:
            p = slice(starts[b.start], starts[b.stop])
            return fused_kernels.loss_and_gradients(  # type: ignore[no-any-return]
                source,
                slots[p],
                places[p],
                starts[b.start : b.stop + 1],
                length,
                target_slots[b],
                negative_slots,
                positions,
                inner,
                bias,
                outer_KA,
                target_ids[b],
                negative_ids,
                target_log_q[b],
                negative_log_q,
                self.beta,
                self.window,
                loss_flow_B[b],
                routing_flow_B[b],
                loss_B[b],
                routing_B[b],
                of_rows[p],
                of_target[b],
            )

        found, *others = map_slices(work, users, len(negative_slots) * dim)
        for part in others:
            for total, value in zip(found, part, strict=True):
                total += value
        of_negatives, of_positions, of_inner, of_bias, of_outer_KA = found
        pairs = ((slots, of_rows), (target_slots, of_target), (negative_slots, of_negatives))
        fetched.give_back([(torch.from_numpy(at), torch.from_numpy(of)) for at, of in pairs])
        if pooling.positions is not None:
            _add(pooling.positions.by_distance_LD, of_positions)
        if pooling.inner_bias_A is not None:
            _add(pooling.inner_bias_A, of_bias)
        _add(pooling.inner_DA, of_inner)
        _add(pooling.outer_AK, np.ascontiguousarray(of_outer_KA.T))
        terms = {"recommendation": float(loss_B.sum() / divisor)}
        if self.routing_weight:
            terms["routing"] = float((routing_B * weight).sum())
        return terms


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).contiguous().numpy()


def _array(parameter: nn.Parameter) -> np.ndarray:
    return parameter.detach().numpy()


def _add(parameter: nn.Parameter, gradient: np.ndarray) -> None:
    if not parameter.requires_grad:
        return
    found: Tensor = torch.from_numpy(gradient)
    parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)


_NONE, _NO_NUMBERS, _NO_IDS = np.empty((0, 0), np.float32), np.empty(0, np.float32), np.empty(0, np.int64)
"""Stand for what is not there."""
