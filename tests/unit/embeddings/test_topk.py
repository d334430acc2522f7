"""Exact top-k of an item table, and what it may hold in memory."""

import pytest
import torch

from distributed_mi.core.errors import InputError
from distributed_mi.embeddings import topk
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


@pytest.mark.parametrize("k", [1, 5, 99])
@pytest.mark.parametrize(("tile_rows", "tile_queries"), [(16_384, 512), (8, 3), (1, 1)])
def test_topk_equals_brute_force_with_ties_to_the_smaller_id(
    k: int, tile_rows: int, tile_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(topk, "TILE_QUERIES", tile_queries)
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
    original = topk._tile_topk

    def recording(scores: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
        sizes.append(tuple(scores.shape))
        return original(scores, ids, k)

    monkeypatch.setattr(topk, "TILE_ROWS", 16)
    monkeypatch.setattr(topk, "TILE_QUERIES", 4)
    monkeypatch.setattr(topk, "_tile_topk", recording)
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
    keys = topk.order_keys(scores, ids)
    assert keys.sort(descending=True).indices.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    decoded_scores, decoded_ids = topk.split_keys(keys)
    assert torch.equal(decoded_scores, scores)
    assert torch.equal(decoded_ids, ids)
