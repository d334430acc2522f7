"""Losses over a sharded catalogue on 1 to 4 gloo processes against one process, and against dense torch.

Users are cut unevenly, one worker has none. What each process measures is a difference from the whole step on a local
table; the tests bound it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_mi.core.errors import InputError
from distributed_mi.embeddings import catalogue_loss
from distributed_mi.embeddings.catalogue_loss import InterestChoice
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.optimizer import SGD, make_optimizer
from distributed_mi.embeddings.placement import make_placement
from distributed_mi.embeddings.sharded import ShardedItemTable
from distributed_mi.embeddings.table import ItemTable, LocalItemTable
from distributed_mi.models.base import Recommender, TrainBatch
from tests.distributed import run_on_ranks
from tests.model_batches import (
    DIM,
    LOSSES,
    NUM_ROWS,
    cut,
    make_batch,
    make_model,
    make_table,
    table_gradient,
    with_loss,
)

CHOICES: tuple[InterestChoice, ...] = ("target", "argmax", "label_aware")
SHARES = {1: [11], 2: [0, 11], 3: [4, 0, 7], 4: [1, 0, 8, 2]}
"""Users of each worker, by the number of workers."""

PLACEMENTS = {
    "modulo": ("modulo", 0),
    "hashed": ("hashed", 0),
    "ranges": ("ranges", 0),
    "replicated": ("hashed", 7),
}
"""Who holds which row, and how many have copies everywhere."""


# ---- dense torch ----------------------------------------------------------------------------------------------------


def dense_loss(
    interests_BKD: Tensor, rows_VD: Tensor, targets_B: Tensor, choice: str, power: float = 1.0
) -> Tensor:
    """Every score in one `[B, K, V]` tensor and torch's cross-entropy; row 0 is padding."""
    scores_BKV = torch.einsum("bkd,vd->bkv", interests_BKD, rows_VD)
    users = torch.arange(len(targets_B))
    if choice == "argmax":
        scores_BV = scores_BKV.max(dim=1).values
    elif choice == "label_aware":
        scores_BV = (torch.softmax(power * scores_BKV, dim=1) * scores_BKV).sum(dim=1)
    else:
        scores_BV = scores_BKV[users, scores_BKV.detach()[users, :, targets_B].argmax(dim=1)]
    return F.cross_entropy(scores_BV[:, 1:], targets_B - 1, reduction="none")


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def compare_with_dense(
    num_users: int, num_rows: int, num_interests: int, choice: InterestChoice
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(num_users + num_interests)
    table = LocalItemTable(num_rows, 16, seed=1, std=0.5, optimizer=SGD())
    rows = table.state()[1]["weight"].clone().requires_grad_()
    interests = torch.randn(num_users, num_interests, 16, generator=generator, requires_grad=True)
    twin = interests.detach().clone().requires_grad_()
    targets = torch.randint(1, num_rows, (num_users,), generator=generator)
    weights = torch.rand(num_users, generator=generator)
    ours = table.full_catalogue_loss(interests, targets, choice=choice, power=2.0)
    (ours * weights).sum().backward()
    dense = dense_loss(twin, rows, targets, choice, power=2.0)
    (dense * weights).sum().backward()
    assert interests.grad is not None
    assert twin.grad is not None
    assert rows.grad is not None
    return {
        "loss": relative_gap(ours, dense),
        "interests": relative_gap(interests.grad, twin.grad),
        "rows": relative_gap(table_gradient(table)[1:], rows.grad[1:]),
    }


@pytest.mark.parametrize("num_interests", [1, 4])
@pytest.mark.parametrize("choice", CHOICES)
def test_full_softmax_equals_dense_torch_over_several_tiles(
    monkeypatch: pytest.MonkeyPatch, choice: InterestChoice, num_interests: int
) -> None:
    monkeypatch.setitem(
        catalogue_loss.TILE_SIDE, "cpu", 13
    )  # 3 users or 13 by 13 rows: the last tiles are smaller
    monkeypatch.setattr(catalogue_loss, "USERS_PER_ROUND", 20)
    gaps = compare_with_dense(47, 301, num_interests, choice)
    assert max(gaps.values()) < 1e-5, gaps


@pytest.mark.parametrize("choice", CHOICES)
def test_full_softmax_equals_dense_torch_on_twenty_thousand_items(choice: InterestChoice) -> None:
    gaps = compare_with_dense(48, 20_001, 4, choice)
    assert max(gaps.values()) < 1e-5, gaps


def test_with_one_interest_every_choice_is_the_plain_softmax() -> None:
    table, interests, targets = make_table(), torch.randn(5, 1, DIM), torch.tensor([1, 40, 7, 7, 2])
    plain = F.cross_entropy(interests[:, 0] @ table.state()[1]["weight"][1:].T, targets - 1, reduction="none")
    for choice in CHOICES:
        torch.testing.assert_close(
            table.full_catalogue_loss(interests, targets, choice=choice, power=3.0), plain
        )


def test_equal_interests_count_once_and_the_first_gets_the_gradient() -> None:
    table, one = make_table(), torch.randn(3, 1, DIM)
    twice = one.repeat(1, 2, 1).requires_grad_()
    targets = torch.tensor([4, 5, 6])
    loss = table.full_catalogue_loss(twice, targets, choice="argmax")
    torch.testing.assert_close(loss, table.full_catalogue_loss(one, targets))
    loss.sum().backward()
    assert twice.grad is not None
    assert twice.grad[:, 1].abs().max() == 0
    assert twice.grad[:, 0].abs().max() > 0.01


@pytest.mark.parametrize("choice", CHOICES)
def test_huge_scores_stay_finite(choice: InterestChoice) -> None:
    table = make_table()
    interests = (torch.randn(4, 3, DIM) * 1e4).requires_grad_()
    loss = table.full_catalogue_loss(interests, torch.tensor([1, 2, 3, 40]), choice=choice)
    loss.sum().backward()
    assert interests.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(interests.grad).all()
    assert torch.isfinite(table.store.collect_all()).all()


def test_products_in_bfloat16_are_close_and_their_sums_are_float32() -> None:
    losses, gradients = [], []
    for enabled in (False, True):
        table, targets = make_table(optimizer=SGD()), torch.tensor([1, 40, 7, 7, 2])
        interests = torch.randn(5, 4, DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(table.full_catalogue_loss(interests, targets))
        losses[-1].sum().backward()
        assert interests.grad is not None
        gradients.append((interests.grad, table_gradient(table)))
        assert {losses[-1].dtype, *(g.dtype for g in gradients[-1])} == {torch.float32}
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0.01)
    assert not torch.equal(losses[1], losses[0])
    assert relative_gap(gradients[1][0], gradients[0][0]) < 0.03
    assert relative_gap(gradients[1][1], gradients[0][1]) < 0.03


def test_what_makes_no_sense_is_refused() -> None:
    table, interests = make_table(), torch.randn(2, 4, DIM)
    with pytest.raises(InputError, match="target of user 1 is padding"):
        table.full_catalogue_loss(interests, torch.tensor([3, 0]))
    with pytest.raises(InputError, match="id 41 is outside"):
        table.full_catalogue_loss(interests, torch.tensor([3, 41]))
    with pytest.raises(InputError, match="none of target, argmax, label_aware"):
        table.full_catalogue_loss(interests, torch.tensor([3, 4]), choice="max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"shape \(2, 4, 3\)"):
        table.full_catalogue_loss(interests[:, :, :3], torch.tensor([3, 4]))


# ---- several workers ------------------------------------------------------------------------------------------------


def all_losses(group: WorkerGroup, payload: dict[str, Any]) -> dict[str, Any]:
    """What each process runs."""
    return {
        "choices": {choice: rounds(group, choice) for choice in CHOICES},
        "gradients": {name: one_step(group, name) for name in LOSSES},
        "training": {name: train(group, name, ["modulo"], steps=20)["modulo"] for name in LOSSES},
        "eimf": one_step(group, "full_softmax", model="eimf"),
        "tiny": tiny(group),
    }


def rounds(group: WorkerGroup, choice: InterestChoice) -> dict[str, float]:
    """Three users of all workers at a time, tiles of 7 rows; losses weighted so that no two users are alike."""
    usual = catalogue_loss.USERS_PER_ROUND, catalogue_loss.TILE_SIDE["cpu"]
    catalogue_loss.USERS_PER_ROUND, catalogue_loss.TILE_SIDE["cpu"] = 3, 7
    generator = torch.Generator().manual_seed(2)
    interests = torch.randn(11, 3, DIM, generator=generator, requires_grad=True)
    targets = torch.randint(1, NUM_ROWS, (11,), generator=generator)
    weights = torch.rand(11, generator=generator)
    local = make_table(optimizer=SGD())
    expected = local.full_catalogue_loss(interests, targets, choice=choice, power=0.5)
    (expected * weights).sum().backward()
    assert interests.grad is not None
    mine = share(group)
    own = interests.detach()[mine].clone().requires_grad_()
    table = make_sharded(group, optimizer=SGD())
    before = whole(table)
    found = table.full_catalogue_loss(own, targets[mine], choice=choice, power=0.5)
    (found * weights[mine]).sum().backward()
    assert own.grad is not None
    table.step(1.0)
    catalogue_loss.USERS_PER_ROUND, catalogue_loss.TILE_SIDE["cpu"] = usual
    return {
        "loss": gap(found, expected[mine], scale=expected),
        "interests": gap(own.grad, interests.grad[mine], scale=interests.grad),
        "rows": relative_gap(before - whole(table), table_gradient(local)),
    }


def one_step(group: WorkerGroup, loss: str, model: str = "comirec_sa") -> dict[str, float]:
    """Loss and gradients of a step, dense parameters and rows."""
    batch = make_batch(11, seed=8)
    settings = with_loss(model, LOSSES[loss])
    items, local_items = make_sharded(group, optimizer=SGD()), make_table(optimizer=SGD())
    ours, local = make_model(model, items, **settings), make_model(model, local_items, **settings)
    part = ours.loss(my_part(group, batch)).total(11)
    part.backward()
    expected = local.loss(batch).total(11)
    expected.backward()
    before = whole(items)
    items.step(1.0)
    return {
        "loss": relative_gap(group.all_reduce_sum(part), expected),
        "dense": relative_gap(dense_gradient(group, ours), dense_gradient(WorkerGroup.alone(), local)),
        "rows": relative_gap(before - whole(items), table_gradient(local_items)),
    }


def hundred_steps(group: WorkerGroup, payload: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """What each process runs for every loss and placement."""
    return {name: train(group, name, list(PLACEMENTS), steps=100) for name in LOSSES}


def train(group: WorkerGroup, loss: str, placements: list[str], *, steps: int) -> dict[str, dict[str, float]]:
    """Gradient descent on dense parameters and Adagrad on rows: each placement against one process."""
    config = TableOptimizerConfig(name="adagrad", eps=1e-3)
    tables: list[ItemTable] = [make_table(optimizer=make_optimizer(config))]
    for name in placements:
        placed, replicated = PLACEMENTS[name]
        chosen = make_placement(placed, NUM_ROWS, group.size, np.arange(NUM_ROWS, 0, -1.0))
        optimizer = make_optimizer(config)
        tables.append(make_sharded(group, optimizer=optimizer, placement=chosen, replicated_rows=replicated))
    start = whole(tables[1])
    models = [make_model("comirec_sa", items, loss=LOSSES[loss]) for items in tables]
    for step in range(steps):
        batch = make_batch(11, seed=20 + step)
        for model in models:
            workers = WorkerGroup.alone() if model is models[0] else group
            model.loss(my_part(workers, batch)).total(11).backward()
            flat = dense_gradient(workers, model)
            with torch.no_grad():
                for parameter, grad in zip(model.parameters(), flat.split(sizes(model)), strict=True):
                    parameter.sub_(0.05 * grad.view_as(parameter))
                    parameter.grad = None
            model.items.step(0.05)
    expected, dense = tables[0].state()[1]["weight"], flat_parameters(models[0])
    return {
        name: {
            "moved": relative_gap(whole(table), start),
            "rows": relative_gap(whole(table), expected),
            "dense": relative_gap(flat_parameters(model), dense),
        }
        for name, table, model in zip(placements, tables[1:], models[1:], strict=True)
    }


def flat_parameters(model: Recommender) -> Tensor:
    return torch.cat([p.flatten() for p in model.parameters()])


def tiny(group: WorkerGroup) -> float:
    """Two items: from the third or fourth worker on, some hold no row or padding alone."""
    table, local = ShardedItemTable(3, 2, group=group, seed=1), LocalItemTable(3, 2, seed=1)
    interests, targets = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]), torch.tensor([2])
    found = table.full_catalogue_loss(interests.requires_grad_(), targets)
    found.sum().backward()
    return relative_gap(found, local.full_catalogue_loss(interests, targets))


def share(group: WorkerGroup) -> slice:
    shares = SHARES[group.size]
    return slice(sum(shares[: group.rank]), sum(shares[: group.rank + 1]))


def my_part(group: WorkerGroup, batch: TrainBatch) -> TrainBatch:
    mine = share(group)
    part = cut(batch, mine.start, mine.stop)
    return type(part)(**{**vars(part), "gather": group.gather_with_grad, "gather_offset": mine.start})


def make_sharded(group: WorkerGroup, **kwargs: Any) -> ShardedItemTable:
    return ShardedItemTable(NUM_ROWS, DIM, seed=3, group=group, **kwargs)


def whole(table: ItemTable) -> Tensor:
    """Every row of a sharded table, in id order."""
    assert isinstance(table, ShardedItemTable)
    ids, tensors = table.state()
    order = torch.cat(table.group.all_gather_rows(ids)).argsort()
    return torch.cat(table.group.all_gather_rows(tensors["weight"]))[order]


def sizes(model: Recommender) -> list[int]:
    return [p.numel() for p in model.parameters()]


def dense_gradient(group: WorkerGroup, model: Recommender) -> Tensor:
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return group.all_reduce_sum(torch.cat([g.flatten() for g in grads]))


def gap(found: Tensor, expected: Tensor, *, scale: Tensor) -> float:
    """Largest difference over the largest value of the step; 0 for a worker without users."""
    if not len(found):
        return 0.0
    return float((found - expected).detach().abs().max() / scale.detach().abs().max())


@pytest.fixture(
    scope="module",
    params=[1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if request.param == 1:
        return [all_losses(WorkerGroup.alone(), {})]
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    return run_on_ranks("tests.parity.test_catalogue_losses:all_losses", request.param, folder, {})


@pytest.mark.parametrize("choice", CHOICES)
def test_full_softmax_does_not_depend_on_workers_rounds_and_tiles(
    ranks: list[dict[str, Any]], choice: str
) -> None:
    for result in ranks:
        assert max(result["choices"][choice].values()) < 1e-5, result["choices"][choice]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_does_not_depend_on_how_users_are_cut(ranks: list[dict[str, Any]], loss: str) -> None:
    for result in ranks:
        assert max(result["gradients"][loss].values()) < 1e-5, result["gradients"][loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_twenty_steps_equal_those_of_one_process(ranks: list[dict[str, Any]], loss: str) -> None:
    for result in ranks:
        measured = dict(result["training"][loss])
        assert measured.pop("moved") > 0.1
        assert max(measured.values()) < 1e-5, measured


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_hundred_steps_of_every_loss_on_every_placement_equal_one_process(
    size: int, tmp_path: Path
) -> None:
    target = "tests.parity.test_catalogue_losses:hundred_steps"
    for result in run_on_ranks(target, size, tmp_path / "ranks", {}, timeout_s=900):
        for loss, placements in result.items():
            for placement, measured in placements.items():
                assert measured.pop("moved") > 0.1
                assert max(measured.values()) < 1e-5, (loss, placement, measured)


def test_eimf_on_a_backbone_with_a_loss_over_the_catalogue(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert max(result["eimf"].values()) < 1e-5, result["eimf"]


def test_a_worker_may_hold_no_item(ranks: list[dict[str, Any]]) -> None:
    assert all(result["tiny"] < 1e-6 for result in ranks)
