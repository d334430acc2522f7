"""The local item table: lookups, gradients, and what each costs."""

import pytest
import torch

from distributed_mi.core.errors import CheckpointError, InputError
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.optimizer import SGD, make_optimizer
from distributed_mi.embeddings.table import LocalItemTable


def test_lookup_returns_the_rows_in_the_shapes_of_the_ids() -> None:
    table = LocalItemTable(20, 3, seed=1)
    history, target, empty = table.lookup(
        torch.tensor([[0, 4], [4, 19]]), torch.tensor([7]), torch.empty(0, dtype=torch.int64)
    )
    weight = table.state()[1]["weight"]
    assert torch.equal(history, torch.stack([weight[[0, 4]], weight[[4, 19]]]))
    assert torch.equal(target, weight[[7]])
    assert empty.shape == (0, 3)
    assert torch.equal(history[0, 0], torch.zeros(3))


@pytest.mark.parametrize("bad", [-1, 20, 1 << 40])
def test_an_id_outside_the_table_is_named(bad: int) -> None:
    with pytest.raises(InputError, match=f"id {bad} is outside"):
        LocalItemTable(20, 3).rows(torch.tensor([1, bad]))


def test_gradients_of_several_lookups_and_of_repeated_ids_add_up() -> None:
    table = LocalItemTable(6, 2, seed=1, optimizer=SGD())
    before = table.state()[1]["weight"].clone()
    first, second = table.lookup(torch.tensor([[3, 3], [0, 1]]), torch.tensor([5]))
    third = table.rows(torch.tensor([3]))
    (first.sum() + 2 * second.sum() + 10 * third.sum()).backward()
    table.step(0.5)
    # Row 3: twice 1 and once 10; row 1: 1; row 5: 2; padding: none although it was read.
    expected = torch.tensor([0.0, 1.0, 0.0, 12.0, 0.0, 2.0])[:, None].expand(6, 2)
    torch.testing.assert_close((before - table.state()[1]["weight"]) / 0.5, expected)


def test_what_is_fetched_says_where_rows_stand_and_takes_gradients_of_any_of_them() -> None:
    table = LocalItemTable(6, 2, seed=1, optimizer=SGD())
    before = table.state()[1]["weight"].clone()
    history, target = torch.tensor([[3, 3], [0, 1]]), torch.tensor([5])
    fetched = table.fetch(history, target)
    for slots, ids, rows in zip(fetched.slots, (history, target), fetched.rows(), strict=True):
        assert slots.shape == ids.shape
        assert torch.equal(fetched.source_UD[slots], before[ids])
        assert torch.equal(rows, before[ids])
    at = fetched.slots[0].reshape(-1)[[1, 2, 0]]
    fetched.give_back(
        [(at, torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 2)), (fetched.slots[1], torch.ones(1, 2))]
    )
    assert table.take_counters().ids == 5
    table.step(0.5)
    expected = torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0, 1.0])[:, None].expand(6, 2)
    torch.testing.assert_close((before - table.state()[1]["weight"]) / 0.5, expected)


def test_rows_that_no_loss_reads_get_no_gradient() -> None:
    table = LocalItemTable(6, 2, seed=1, optimizer=SGD())
    before = table.state()[1]["weight"].clone()
    table.lookup(torch.tensor([1, 2]), torch.tensor([[3]]), torch.tensor([2, 4]))[2].sum().backward()
    table.step(1.0)
    expected = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 0.0])[:, None].expand(6, 2)
    torch.testing.assert_close(before - table.state()[1]["weight"], expected)


@pytest.mark.parametrize("name", ["adam", "adagrad", "row_adagrad", "sgd"])
def test_a_step_touches_the_looked_up_rows_only(name: str) -> None:
    table = LocalItemTable(50, 4, seed=1, optimizer=make_optimizer(TableOptimizerConfig(name=name)))
    before = {n: t.clone() for n, t in table.state()[1].items()}
    table.rows(torch.tensor([0, 7, 9, 7])).square().sum().backward()
    table.step(0.1)
    for key, after in table.state()[1].items():
        changed = (after != before[key]).flatten(1).any(1) if after.ndim > 1 else after != before[key]
        assert changed.nonzero().flatten().tolist() == [7, 9], key


def test_padding_stays_zero_under_dense_adam_and_after_assign() -> None:
    table = LocalItemTable(9, 4, optimizer=make_optimizer(TableOptimizerConfig(lazy=False)))
    for _ in range(3):
        (table.rows(torch.tensor([0, 2])) - 1).square().sum().backward()
        table.step(0.1)
    assert torch.equal(table.rows(torch.tensor([0]))[0], torch.zeros(4))
    table.assign(torch.arange(9), {"weight": torch.ones(9, 4)})
    assert table.rows(torch.arange(9)).sum(1).tolist() == [0.0] + [4.0] * 8


def test_zero_grad_forgets_and_a_step_without_gradients_changes_nothing() -> None:
    table = LocalItemTable(9, 4)
    before = table.state()[1]["weight"].clone()
    table.rows(torch.tensor([2])).sum().backward()
    table.zero_grad()
    table.step(0.1)
    assert torch.equal(table.state()[1]["weight"], before)


def test_no_gradients_are_collected_without_grad_mode() -> None:
    table = LocalItemTable(9, 4)
    with torch.no_grad():
        rows = table.rows(torch.tensor([2]))
    assert not rows.requires_grad


def test_assign_names_what_does_not_fit() -> None:
    table = LocalItemTable(9, 4, optimizer=SGD())
    with pytest.raises(CheckpointError, match="'mean'"):
        table.assign(torch.arange(9), {"mean": torch.zeros(9, 4)})
    with pytest.raises(CheckpointError, match="'weight' has rows of shape"):
        table.assign(torch.arange(9), {"weight": torch.zeros(9, 5)})
    with pytest.raises(InputError, match="id 9 is outside"):
        table.assign(torch.tensor([9]), {"weight": torch.zeros(1, 4)})


def test_a_table_without_items_is_refused() -> None:
    with pytest.raises(InputError, match="at least one item"):
        LocalItemTable(1, 4)


def test_counters_of_a_local_table_count_ids_asked_and_rows_changed() -> None:
    table = LocalItemTable(9, 3)
    for _ in range(2):
        table.rows(torch.tensor([3, 3, 5, 0])).sum().backward()
        table.step(0.1)
    with torch.no_grad():
        table.rows(torch.tensor([1, 2]))  # an evaluation
    found = table.take_counters()
    assert (found.ids, found.unique_ids, found.exchanged_bytes) == (8, 4, 0)
    assert found.update_seconds > 0
    assert table.take_counters().ids == 0
