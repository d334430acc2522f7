"""What every file in models/ must do, whatever the model; house-style 4.5. A new model is tested by existing."""

from dataclasses import replace
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_mi.core.errors import InputError
from distributed_mi.core.registry import choices, resolve
from distributed_mi.embeddings.checkpoint import load_table, save_table
from distributed_mi.embeddings.optimizer import SGD
from distributed_mi.embeddings.table import LocalItemTable
from distributed_mi.models.base import HistoryBatch, Recommender
from tests.model_batches import (
    DIM,
    LEARNED,
    LOSSES,
    MAX_HISTORY,
    NUM_ROWS,
    make_batch,
    make_history,
    make_model,
    make_table,
    table_gradient,
    with_loss,
)

NAMES = choices("model")
MODELS = pytest.mark.parametrize("name", NAMES)
TRAINED = pytest.mark.parametrize(("name", "loss"), [(name, loss) for name in LEARNED for loss in LOSSES])
COUNTED = pytest.mark.parametrize("name", [n for n in NAMES if n not in LEARNED])


def encode(model: Recommender, history: HistoryBatch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model.encode(history).interests_BKD


def make_trained(name: str, loss: str, seed: int = 0) -> Recommender:
    return make_model(name, seed=seed, **with_loss(name, LOSSES[loss]))


@MODELS
def test_encode_gives_finite_interests_of_the_stated_shape(name: str) -> None:
    model, history = make_model(name), make_history()
    interests = encode(model, history)
    assert interests.shape == (7, model.num_interests, DIM)
    assert interests.dtype == torch.float32
    assert torch.isfinite(interests).all()


@MODELS
def test_attention_rows_sum_to_one_over_real_items_and_vanish_on_padding(name: str) -> None:
    model, history = make_model(name), make_history()
    attention = model.encode(history).attention_BKL
    if attention is None:
        assert model.num_interests == 1
        return
    torch.testing.assert_close(attention.sum(2), torch.ones(7, model.num_interests))
    assert attention.masked_select(~history.mask_BL[:, None, :].expand_as(attention)).abs().max() == 0


@MODELS
def test_padded_positions_have_no_influence(name: str) -> None:
    model, history = make_model(name), make_history()
    filled = torch.where(history.mask_BL, history.item_ids_BL, 17)
    torch.testing.assert_close(encode(model, HistoryBatch(filled, history.mask_BL)), encode(model, history))


@MODELS
def test_a_longer_pad_changes_nothing(name: str) -> None:
    model, history = make_model(name), make_history()
    for pad in (1, MAX_HISTORY):
        longer = HistoryBatch(
            torch.nn.functional.pad(history.item_ids_BL, (pad, 0)),
            torch.nn.functional.pad(history.mask_BL, (pad, 0)),
        )
        torch.testing.assert_close(encode(model, longer), encode(model, history))


@MODELS
def test_permuting_users_permutes_the_outputs(name: str) -> None:
    model, history = make_model(name), make_history()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    permuted = HistoryBatch(history.item_ids_BL[order], history.mask_BL[order])
    torch.testing.assert_close(encode(model, permuted), encode(model, history)[order])


@MODELS
def test_one_item_is_enough_and_none_is_refused(name: str) -> None:
    model = make_model(name)
    one = HistoryBatch(torch.tensor([[9]]), torch.tensor([[True]]))
    assert torch.isfinite(encode(model, one)).all()
    with pytest.raises(InputError, match="row 1 has no real item"):
        model.encode(HistoryBatch(torch.tensor([[9], [0]]), torch.tensor([[True], [False]])))


@MODELS
def test_every_field_of_the_configuration_is_documented(name: str) -> None:
    fields = resolve("model", name).Config.model_fields
    assert [n for n, field in fields.items() if not field.description] == []


@MODELS
def test_the_item_table_is_not_among_the_parameters(name: str) -> None:
    model = make_model(name)
    assert all(NUM_ROWS not in p.shape for p in model.parameters())
    assert isinstance(model.items, LocalItemTable)


@MODELS
def test_save_and_load_agree_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, fs = make_model(name), pafs.LocalFileSystem()
    save_file(model.state_dict() or {"nothing": torch.zeros(1)}, tmp_path / "dense.safetensors")
    files = save_table(model.items, fs, str(tmp_path), 0, 1)
    other = make_model(name, LocalItemTable(NUM_ROWS, DIM, seed=99), seed=99)
    if model.state_dict():
        other.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    load_table(other.items, fs, str(tmp_path), files, with_optimizer=True)
    history = make_history()
    assert torch.equal(encode(other, history), encode(model, history))
    queries = encode(model, history).reshape(-1, DIM)
    assert torch.equal(other.items.topk(queries, 5)[1], model.items.topk(queries, 5)[1])


@TRAINED
def test_every_parameter_and_every_read_row_receives_a_gradient(name: str, loss: str) -> None:
    model, batch = make_trained(name, loss), make_batch(num_users=12)
    model.loss(batch).total(12).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    before = model.items.state()[1]["weight"].clone()
    model.items.step(0.1)
    changed = (model.items.state()[1]["weight"] != before).any(dim=1).nonzero().flatten().tolist()
    assert set(batch.target_ids_B.tolist()) <= set(changed)
    assert 0 not in changed


@TRAINED
def test_what_is_differentiated_without_autograd_is_the_loss(name: str, loss: str) -> None:
    """Where a model offers it: the same terms, and the same gradients of parameters and rows; they add up."""
    batch, found = make_batch(num_users=12), []
    for by_autograd in (True, False):
        model = make_model(name, make_table(optimizer=SGD()), **with_loss(name, LOSSES[loss]))
        for num_users in (12, 20):
            if by_autograd:
                parts = model.loss(batch)
                parts.total(num_users).backward()
                terms = dict(zip([*parts.mean, *parts.sum], parts.parts(num_users).tolist(), strict=True))
            else:
                terms = model.loss_and_gradients(batch, num_users)
                if terms is None:
                    assert all(p.grad is None for p in model.parameters())
                    assert table_gradient(model.items).abs().max() == 0
                    return
                assert model.has_own_gradients()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        found.append((terms, gradients, table_gradient(model.items)))
    assert list(found[0][0]) == list(found[1][0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_model_that_changes_the_loss_alone_is_left_to_autograd() -> None:
    remi = resolve("model", "remi")
    assert remi.has_own_gradients()
    assert type("SameLoss", (remi,), {"__doc__": "Nothing new."}).has_own_gradients()
    for name in ("loss", "loss_from_rows", "encode_rows", "step_ids", "step_rows", "forward"):
        assert not type("Changed", (remi,), {name: lambda self, *args: None}).has_own_gradients(), name
    both = {"loss_from_rows": lambda self, *args: None, "loss_and_gradients": lambda self, *args: None}
    assert type("ChangedBoth", (remi,), both).has_own_gradients()


@TRAINED
def test_a_fixed_seed_gives_an_identical_loss(name: str, loss: str) -> None:
    values = [make_trained(name, loss, seed=4).loss(make_batch()).total(7).item() for _ in range(2)]
    assert values[0] == values[1]
    assert values[0] != make_trained(name, loss, seed=5).loss(make_batch()).total(7).item()


@TRAINED
def test_loss_terms_have_one_finite_value_per_user(name: str, loss: str) -> None:
    terms = make_trained(name, loss).loss(make_batch())
    assert "recommendation" in terms.mean
    for values in (*terms.mean.values(), *terms.sum.values()):
        assert values.shape == (7,)
        assert torch.isfinite(values).all()


@TRAINED
def test_the_order_of_users_does_not_change_the_loss(name: str, loss: str) -> None:
    model, batch = make_trained(name, loss), make_batch()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    semantics = batch.semantics
    assert semantics is not None
    permuted = replace(
        batch,
        history=HistoryBatch(batch.history.item_ids_BL[order], batch.history.mask_BL[order]),
        target_ids_B=batch.target_ids_B[order],
        semantics=replace(
            semantics,
            interests_BMT=semantics.interests_BMT[order],
            interests_mask_BM=semantics.interests_mask_BM[order],
            target_text_BT=semantics.target_text_BT[order],
        ),
    )
    torch.testing.assert_close(model.loss(permuted).total(7), model.loss(batch).total(7))


@TRAINED
def test_one_batch_can_be_overfitted(name: str, loss: str) -> None:
    model, batch = make_trained(name, loss), make_batch(num_users=6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.04)
    losses = []
    for _ in range(60):
        terms = model.loss(batch)
        terms.total(6).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.items.step(0.1)
        losses.append(terms.mean["recommendation"].mean().item())
    assert losses[-1] < 0.25 * losses[0]


@COUNTED
def test_a_counted_model_is_fitted_from_counts_and_has_no_loss(name: str) -> None:
    model = make_model(name)
    counts = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(0))
    model.fit_counts(counts)
    scores, ids, _ = model.items.topk(encode(model, make_history(1))[:, 0], NUM_ROWS - 1)
    expected = counts[1:].sort(descending=True)
    assert scores[0].tolist() == expected.values.float().tolist()
    assert ids[0].tolist() == (expected.indices + 1).tolist()
    with pytest.raises(NotImplementedError):
        model.loss(make_batch())
