"""A step cut into batches: both target rules, shares of workers, resumption at any step."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from distributed_mi.core.schema import TABLES
from distributed_mi.data.batches import EveryPositionSampler, Sequences, TrainSampler
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.losses.config import NegativesConfig
from distributed_mi.losses.negatives import NegativeSampler
from distributed_mi.models.base import TrainBatch
from distributed_mi.training.batching import StepBatches
from distributed_mi.training.prefetch import Prefetched

ITEMS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [2, 4], [9, 8, 7, 6], [3, 3, 3, 3, 3], [5, 1]]


class Worker(WorkerGroup):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, torch.device("cpu"), None)


def batches(rule: str, rank: int = 0, size: int = 1, *, parts: int = 1, log_q: bool = False) -> StepBatches:
    table = pa.table(
        {
            "user_index": list(range(len(ITEMS))),
            "user_id": [f"u{i}" for i in range(len(ITEMS))],
            "item_indices": ITEMS,
            "timestamps": ITEMS,
            "num_history": [len(x) for x in ITEMS],
        },
        schema=TABLES["sequences"],
    )
    kind = {"one": TrainSampler, "every": EveryPositionSampler}[rule]
    sampler = kind(Sequences.from_table(table), num_users_per_step=6, max_history=4, min_position=1, seed=3)
    negatives = NegativeSampler(NegativesConfig(num_negatives=7, log_q=log_q), num_rows=10, seed=3)
    return StepBatches(sampler, negatives, Worker(rank, size), parts=parts)


def tensors(batch: TrainBatch) -> dict[str, Any]:
    out = {
        "history": batch.history.item_ids_BL,
        "mask": batch.history.mask_BL,
        "target": batch.target_ids_B,
    }
    if batch.every_position:
        out |= {"targets": batch.every_position.ids_BL, "targets_mask": batch.every_position.mask_BL}
    return out


@pytest.mark.parametrize("rule", ["one", "every"])
@pytest.mark.parametrize(("size", "parts"), [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_parts_of_all_workers_are_the_step(rule: str, size: int, parts: int) -> None:
    (whole,) = batches(rule)(5)
    shares = [b for rank in range(size) for b in batches(rule, rank, size, parts=parts)(5)]
    for name, expected in tensors(whole).items():
        assert torch.equal(torch.cat([tensors(s)[name] for s in shares]), expected)
    for share in shares:
        assert torch.equal(share.negative_ids_N, whole.negative_ids_N)
        if rule == "every":
            assert share.every_position is not None
            assert whole.every_position is not None
            assert share.every_position.num_targets == whole.every_position.num_targets


def test_every_position_has_the_next_item_as_target_and_its_log_probability() -> None:
    (batch,) = batches("every", log_q=True)(0)
    found = batch.every_position
    assert found is not None
    assert found.num_targets == int(found.mask_BL.sum()) == sum(min(len(x), 5) - 1 for x in ITEMS)
    assert torch.equal(
        found.ids_BL[:, :-1][found.mask_BL[:, :-1]], batch.history.item_ids_BL[:, 1:][found.mask_BL[:, :-1]]
    )
    assert torch.equal(found.ids_BL[:, -1], batch.target_ids_B)
    assert found.log_q_BL is not None
    np.testing.assert_allclose(found.log_q_BL[found.mask_BL], np.log(1 / 9), rtol=1e-6)
    assert batches("every")(0)[0].every_position.log_q_BL is None  # type: ignore[union-attr]
    assert batches("one")(0)[0].every_position is None


@pytest.mark.parametrize("rule", ["one", "every"])
def test_any_step_is_the_same_whatever_came_before_it(rule: str) -> None:
    ready = Prefetched(batches(rule), 2)
    run = [ready(step)[0] for step in range(8)]
    resumed = Prefetched(batches(rule), 3)
    for step in (5, 6, 7):
        (again,) = resumed(step)
        for name, value in tensors(run[step]).items():
            assert torch.equal(tensors(again)[name], value)
    ready.close()
    resumed.close()
