"""Loss and gradients in one call: against autograd through the layers and losses, and cut into slices."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from distributed_mi.core import cpu
from distributed_mi.embeddings.optimizer import SGD
from distributed_mi.embeddings.table import Fetched
from distributed_mi.models.base import HistoryBatch, Recommender, TrainBatch
from tests.model_batches import make_batch, make_model, make_table, table_gradient

VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "plain softmax": {"ihn_beta": 0.0},
    "any beta": {"ihn_beta": 0.7},
    "no penalty": {"rr_weight": 0.0},
    "no bias": {"bias": False},
    "no positions": {"positions": False, "num_interests": 3},
    "one interest": {"num_interests": 1, "attention_dim": 5},
    "hits count": {"mask_accidental_hits": False},
}


def with_log_q(batch: TrainBatch) -> TrainBatch:
    generator = torch.Generator().manual_seed(8)
    targets, negatives = (
        torch.randn(len(i), generator=generator) for i in (batch.target_ids_B, batch.negative_ids_N)
    )
    return replace(batch, target_log_q_B=targets, negative_log_q_N=negatives)


def remi(**settings: Any) -> Recommender:
    return make_model("remi", make_table(optimizer=SGD()), **settings)


def gradients_of(model: Recommender) -> dict[str, torch.Tensor | None]:
    return {"table": table_gradient(model.items), **{n: p.grad for n, p in model.named_parameters()}}


def by_autograd(model: Recommender, batch: TrainBatch, num_users: int) -> tuple[list[float], Any]:
    parts = model.loss(batch).parts(num_users)
    parts.sum().backward()
    return parts.tolist(), gradients_of(model)


def without(model: Recommender, batch: TrainBatch, num_users: int) -> tuple[list[float], Any]:
    terms = model.loss_and_gradients(batch, num_users)
    assert terms is not None
    return list(terms.values()), gradients_of(model)


@pytest.fixture
def in_three_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(cpu, "_num_cores", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with cpu.threads_for_kernels():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("users", [1, 9])
@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_and_gradients_are_those_of_autograd(variant: str, log_q: bool, users: int) -> None:
    batch = make_batch(users)
    batch = with_log_q(batch) if log_q else batch
    expected = by_autograd(remi(**VARIANTS[variant]), batch, 16)
    torch.testing.assert_close(without(remi(**VARIANTS[variant]), batch, 16), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("in_three_slices")
def test_slices_give_the_same(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, cut = with_log_q(make_batch(10)), []
    expected = by_autograd(remi(**VARIANTS[variant]), batch, 10)
    original = cpu.map_pieces
    monkeypatch.setattr(
        cpu, "map_pieces", lambda work, pieces: cut.append(len(pieces)) or original(work, pieces)
    )
    found = remi(**VARIANTS[variant]).loss_and_gradients(batch, 10)
    assert found is not None
    assert cut == [3]
    torch.testing.assert_close(without(remi(**VARIANTS[variant]), batch, 10), expected, rtol=1e-5, atol=1e-6)


def test_rows_are_read_where_the_table_says_they_stand() -> None:
    """As from a sharded table: distinct rows that came of other workers, in another order than the ids."""
    batch, expected = make_batch(9), by_autograd(remi(), make_batch(9), 9)
    model = remi()
    table, given = model.items, []

    def fetch(*ids: torch.Tensor) -> Fetched:
        distinct, places = torch.unique(torch.cat([i.reshape(-1) for i in ids]), return_inverse=True)
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(1))
        where = torch.argsort(order)[places].split([i.numel() for i in ids])
        slots = tuple(w.view(i.shape) for w, i in zip(where, ids, strict=True))
        weight = table.state()[1]["weight"][distinct[order]]
        return Fetched(weight, slots, lambda pairs: given.extend((distinct[order][s], g) for s, g in pairs))

    model.items.fetch = fetch  # type: ignore[method-assign]
    terms = model.loss_and_gradients(batch, 9)
    assert terms is not None
    table.store.collect(torch.cat([ids for ids, _ in given]), *(grads for _, grads in given))
    torch.testing.assert_close((list(terms.values()), gradients_of(model)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["as published", "no bias", "no positions"])
def test_a_worker_without_users_adds_nothing(variant: str) -> None:
    model, step = remi(**VARIANTS[variant]), make_batch()
    history = HistoryBatch(step.history.item_ids_BL[:0], step.history.mask_BL[:0])
    batch = replace(step, history=history, target_ids_B=step.target_ids_B[:0], semantics=None)
    assert model.loss_and_gradients(batch, 7) == {"recommendation": 0.0, "routing": 0.0}
    gradients = gradients_of(model)
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


def test_frozen_parameters_get_no_gradient() -> None:
    model = remi()
    model.get_parameter("pooling.inner_DA").requires_grad_(False)
    model.loss_and_gradients(make_batch(), 7)
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["pooling.inner_DA"]


def test_another_choice_of_interest_is_left_to_autograd() -> None:
    model = remi()
    model.read_out = lambda interests, target: interests[:, 0]
    assert model.loss_and_gradients(make_batch(), 7) is None


def test_a_row_that_is_not_a_number_is_seen_in_the_loss() -> None:
    model, batch = remi(), make_batch()
    model.items.assign(batch.target_ids_B[:1], {"weight": torch.full((1, 8), float("nan"))})
    terms = model.loss_and_gradients(batch, 7)
    assert terms is not None
    assert terms["recommendation"] != terms["recommendation"]
