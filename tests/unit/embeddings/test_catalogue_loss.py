"""Gradients of every row at once, and what the tiled softmax keeps; its values: parity/test_catalogue_losses.py."""

from typing import Any

import pytest
import torch

from distributed_mi.embeddings import storage
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.optimizer import SGD, make_optimizer
from distributed_mi.embeddings.table import LocalItemTable


@pytest.mark.parametrize("name", ["sgd", "adagrad", "row_adagrad", "adam", "dense_adam"])
def test_gradients_of_all_rows_and_of_some_add_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same sum once as one buffer with rows looked up beside, once as a lookup of every row."""
    monkeypatch.setattr(storage, "TILE_ROWS", 4)
    settings: dict[str, Any] = {"name": "adam", "lazy": False} if name == "dense_adam" else {"name": name}
    tables = [
        LocalItemTable(11, 3, seed=1, optimizer=make_optimizer(TableOptimizerConfig(**settings)))
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        grad, some = torch.randn(11, 3, generator=generator), torch.tensor([0, 7, 7, 2])
        tables[0].store.collect_all().add_(grad / 2)
        tables[0].rows(some).sum().backward()
        tables[0].store.collect_all().add_(grad / 2)
        (tables[1].rows(torch.arange(11)) * grad).sum().backward()
        tables[1].rows(some).sum().backward()
        for table in tables:
            table.step(0.1)
    found, expected = (table.state()[1] for table in tables)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    assert found["weight"][0].tolist() == [0.0] * 3


def test_the_buffer_is_forgotten_by_step_and_by_zero_grad() -> None:
    table = LocalItemTable(5, 3, seed=1, optimizer=SGD())
    table.store.collect_all().fill_(1.0)
    table.step(1.0)
    after = table.state()[1]["weight"].clone()
    table.step(1.0)
    table.store.collect_all().fill_(1.0)
    table.zero_grad()
    table.step(1.0)
    assert torch.equal(table.state()[1]["weight"], after)
    assert table.store.collect_all().abs().max() == 0


@pytest.mark.parametrize("choice", ["target", "argmax", "label_aware"])
def test_no_scores_are_kept_for_the_backward_pass(choice: Any) -> None:
    """30 users, 4 interests, 500 rows: the largest thing kept is the interests."""
    table = LocalItemTable(500, 8, seed=1)
    interests = torch.randn(30, 4, 8, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        table.full_catalogue_loss(interests, torch.randint(1, 500, (30,)), choice=choice)
    assert 0 < max(kept) <= interests.numel()


def test_two_backward_passes_before_a_step_add_up() -> None:
    """As the parts of an accumulated step do."""
    tables = [LocalItemTable(40, 8, seed=1, optimizer=SGD()) for _ in range(2)]
    interests, targets = torch.randn(6, 2, 8), torch.randint(1, 40, (6,))
    tables[0].full_catalogue_loss(interests.requires_grad_(), targets).sum().backward()
    for part in (slice(0, 2), slice(2, 6)):
        tables[1].full_catalogue_loss(interests[part], targets[part]).sum().backward()
    for table in tables:
        table.step(0.1)
    torch.testing.assert_close(*(t.state()[1]["weight"] for t in tables))
