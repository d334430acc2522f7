"""Small models and batches for tests of recommenders, the same numbers wherever they are built."""

from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from distributed_mi.core.config import validate
from distributed_mi.core.registry import choices, resolve
from distributed_mi.embeddings.table import ItemTable, LocalItemTable
from distributed_mi.losses.config import LossName
from distributed_mi.models.base import HistoryBatch, Recommender, SemanticBatch, TrainBatch

NUM_ROWS, DIM, MAX_HISTORY, TEXT_DIM = 41, 8, 6, 12
LEARNED = [name for name in choices("model") if resolve("model", name).has_loss]

LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in get_args(LossName)},
    "argmax": {"name": "full_softmax", "choice": "argmax"},
    "label_aware": {"name": "full_softmax", "choice": "label_aware", "power": 2.0},
}
"""Every value of `train.model.loss.name`, and the other choices of `full_softmax`, each with its fields."""


def with_loss(name: str, loss: dict[str, Any]) -> dict[str, Any]:
    """Settings that train a model, or its backbone, with a loss."""
    fields = resolve("model", name).Config.model_fields
    if "backbone" in fields:
        return {"backbone": {"name": fields["backbone"].default.name, "loss": loss}}
    return {"loss": loss}


def make_table(**kwargs: Any) -> LocalItemTable:
    return LocalItemTable(NUM_ROWS, DIM, seed=3, **kwargs)


def make_model(name: str, items: ItemTable | None = None, seed: int = 0, **settings: Any) -> Recommender:
    owner = resolve("model", name)
    config = validate(owner.Config, settings)
    torch.manual_seed(seed)
    return owner(config, items=items or make_table(), max_history=MAX_HISTORY, text_dim=TEXT_DIM)


def make_history(num_users: int = 7, seed: int = 5) -> HistoryBatch:
    """Left-padded histories of 1 to MAX_HISTORY items."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, NUM_ROWS, (num_users, MAX_HISTORY), generator=generator)
    lengths = torch.arange(num_users) % MAX_HISTORY + 1
    mask = torch.arange(MAX_HISTORY) >= MAX_HISTORY - lengths[:, None]
    return HistoryBatch(ids * mask, mask)


def make_batch(num_users: int = 7, num_negatives: int = 12, seed: int = 5) -> TrainBatch:
    """A step with accidental hits, a repeated target and an item without text."""
    generator = torch.Generator().manual_seed(seed + 1)
    targets = torch.randint(1, NUM_ROWS, (num_users,), generator=generator)
    targets[-1] = targets[0]
    negatives = torch.randint(1, NUM_ROWS, (num_negatives,), generator=generator)
    negatives[: min(2, num_users)] = targets[:2]
    text_VT = torch.randn(NUM_ROWS, TEXT_DIM, generator=generator)
    text_VT[[0, int(targets[num_users // 2])]] = 0.0
    interests_mask = torch.arange(4) < (torch.arange(num_users) % 4 + 1)[:, None]
    semantics = SemanticBatch(
        torch.randn(num_users, 4, TEXT_DIM, generator=generator) * interests_mask[:, :, None],
        interests_mask,
        text_VT[targets],
        text_VT[negatives],
        catalogue_text_VT=text_VT,
    )
    return TrainBatch(make_history(num_users, seed), targets, negatives, semantics)


def cut(batch: TrainBatch, start: int, stop: int) -> TrainBatch:
    """The users `start` to `stop` of a step; negatives are shared."""
    s = batch.semantics
    assert s is not None
    return replace(
        batch,
        history=HistoryBatch(batch.history.item_ids_BL[start:stop], batch.history.mask_BL[start:stop]),
        target_ids_B=batch.target_ids_B[start:stop],
        semantics=replace(
            s,
            interests_BMT=s.interests_BMT[start:stop],
            interests_mask_BM=s.interests_mask_BM[start:stop],
            target_text_BT=s.target_text_BT[start:stop],
        ),
    )


def table_gradient(items: LocalItemTable) -> Tensor:
    """Gradient of every row, from a step of gradient descent on a table with the SGD optimizer."""
    before = items.store.weight_RD.clone()
    items.step(1.0)
    return before - items.store.weight_RD
