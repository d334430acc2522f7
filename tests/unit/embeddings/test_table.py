"""The local item table: lookups, gradients, exact top-k, and what each costs."""

import pytest
import torch

from distributed_mi.core.errors import CheckpointError, InputError
from distributed_mi.embeddings import storage
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.optimizer import SGD, make_optimizer
from distributed_mi.embeddings.table import LocalItemTable


def brute_force(
    weight_VD: torch.Tensor, queries_QD: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stable descending sort of all scores without padding: ties to the smaller id by construction."""
    scores, order = (queries_QD @ weight_VD[1:].T).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], order[:, :k] + 1


def whole_numbers(table: LocalItemTable) -> None:
    """Rows of small whole numbers: inner products are exact, and many of them tie."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-2, 3, (table.num_rows, table.dim), generator=generator).float()
    table.assign(torch.arange(table.num_rows), {"weight": weight})


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


@pytest.mark.parametrize("k", [1, 5, 99])
@pytest.mark.parametrize(("tile_rows", "tile_queries"), [(16_384, 512), (8, 3), (1, 1)])
def test_topk_equals_brute_force_with_ties_to_the_smaller_id(
    k: int, tile_rows: int, tile_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(storage, "TILE_QUERIES", tile_queries)
    table = LocalItemTable(100, 3)
    whole_numbers(table)
    queries = torch.randint(-2, 3, (11, 3), generator=torch.Generator().manual_seed(2)).float()
    scores, ids = table.topk(queries, k)
    expected_scores, expected_ids = brute_force(table.state()[1]["weight"], queries, k)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)


def test_topk_of_ordinary_numbers_equals_brute_force() -> None:
    table = LocalItemTable(5_000, 16, seed=4)
    queries = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    scores, ids = table.topk(queries, 50)
    expected_scores, expected_ids = brute_force(table.state()[1]["weight"], queries, 50)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(scores, expected_scores)


def test_topk_never_holds_more_scores_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = storage._tile_topk

    def recording(scores: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
        sizes.append(tuple(scores.shape))
        return original(scores, ids, k)

    monkeypatch.setattr(storage, "TILE_ROWS", 16)
    monkeypatch.setattr(storage, "TILE_QUERIES", 4)
    monkeypatch.setattr(storage, "_tile_topk", recording)
    LocalItemTable(100, 3).topk(torch.randn(10, 3), 5)
    assert max(q for q, _ in sizes) == 4
    assert max(r for _, r in sizes) == 16
    assert sum(q * r for q, r in sizes) == 10 * 99


@pytest.mark.parametrize("k", [0, 9, 100])
def test_topk_of_an_impossible_size_is_refused(k: int) -> None:
    with pytest.raises(InputError, match="k must be between 1 and 8"):
        LocalItemTable(9, 4).topk(torch.zeros(2, 4), k)


def test_topk_of_queries_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be \[Q, 4\]"):
        LocalItemTable(9, 4).topk(torch.zeros(2, 5), 3)


def test_topk_without_queries() -> None:
    scores, ids = LocalItemTable(9, 4).topk(torch.zeros(0, 4), 3)
    assert scores.shape == ids.shape == (0, 3)


def test_order_keys_sort_like_scores_then_smaller_ids_and_decode() -> None:
    inf = float("inf")
    scores = torch.tensor([-inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, 2.0, inf])
    ids = torch.tensor([1, 2, 3, 8, 5, 6, 1 << 30, 7, 9])
    keys = storage.order_keys(scores, ids)
    assert keys.sort(descending=True).indices.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    decoded_scores, decoded_ids = storage.split_keys(keys)
    assert torch.equal(decoded_scores, scores)
    assert torch.equal(decoded_ids, ids)


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
