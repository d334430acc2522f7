"""Exact top-k of an item table against brute force in numpy, on data made to break it, bit for bit.

Every property is asked of all ways to search a shard: compiled with approximations in float32 and in bfloat16, and by
operations of torch.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distributed_mi.core import cpu
from distributed_mi.core.errors import InputError
from distributed_mi.embeddings import topk, topk_kernels, topk_shard
from distributed_mi.embeddings.table import LocalItemTable
from distributed_mi.embeddings.topk import TopK, local_topk

QUICK = settings(deadline=None, max_examples=60)


def scores_of(weight_RD: np.ndarray, interests_BKD: np.ndarray) -> np.ndarray:
    """`[B, K, R]`: products of float32 in float64, four sums over d mod 4, added, rounded to float32."""
    sums = np.zeros((4, *interests_BKD.shape[:2], len(weight_RD)))
    for d in range(weight_RD.shape[1]):
        sums[d % 4] += interests_BKD[:, :, d, None].astype(np.float64) * weight_RD[:, d].astype(np.float64)
    with np.errstate(over="ignore"):
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])).astype(np.float32) + np.float32(0.0)


def brute_force(
    weight_RD: Tensor, ids_R: Tensor, interests_BKD: Tensor, k: int, seen_M2: Tensor | None
) -> TopK:
    """Every score, then a sort by score and id."""
    scores_BKR = scores_of(weight_RD.numpy(), interests_BKD.numpy())
    ids, best, chosen = ids_R.numpy(), scores_BKR.max(axis=1), scores_BKR.argmax(axis=1)
    hidden = np.broadcast_to(ids == 0, best.shape).copy()
    for user, item in [] if seen_M2 is None else seen_M2.tolist():
        hidden[user] |= ids == item
    out = TopK(
        torch.full((len(best), k), -torch.inf), torch.zeros((len(best), k), dtype=torch.int64),
        torch.full((len(best), k), -1, dtype=torch.int64),
    )  # fmt: skip
    for user in range(len(best)):
        order = [r for r in np.lexsort((ids, -best[user])) if not hidden[user, r]][:k]
        out.scores_Bk[user, : len(order)] = torch.from_numpy(best[user, order])
        out.ids_Bk[user, : len(order)] = torch.from_numpy(ids[order])
        out.interests_Bk[user, : len(order)] = torch.from_numpy(chosen[user, order])
    return out


def same(a: TopK, b: TopK) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


WAYS = ("compiled, float32", "compiled, bfloat16", "torch")


@contextmanager
def way(name: str, **sizes: int) -> Iterator[None]:
    """Search shards in one of the ways, with other constants of `topk_shard`."""
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    with ExitStack() as stack:
        stack.enter_context(patch.object(topk_shard, "_is_compiled", lambda weight: name != "torch"))
        stack.enter_context(patch.object(topk_shard, "_approximate_dtype", lambda: dtype))
        for name, value in sizes.items():
            stack.enter_context(patch.object(topk_shard, name, value))
        yield


KINDS = ("normal", "whole", "ulp", "range", "duplicates", "zeros", "huge", "tiny", "one sign")


def make_numbers(kind: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    normal = generator.standard_normal(shape)
    if kind == "whole":  # many scores tie
        return generator.integers(-1, 2, shape).astype(np.float32)
    if kind == "ulp":  # rows differ in the last bits only
        base = np.broadcast_to(normal.reshape(-1, shape[-1])[:1].astype(np.float32), shape)
        return (base.view(np.int32) + generator.integers(-1, 2, shape, dtype=np.int32)).view(np.float32)
    if kind == "range":  # terms cancel
        return (normal * 2.0 ** generator.integers(-40, 41, shape)).astype(np.float32)
    if kind == "duplicates":
        rows = normal.reshape(-1, shape[-1])
        return rows[generator.integers(0, 1 + len(rows) // 5, len(rows))].reshape(shape).astype(np.float32)
    if kind == "zeros":
        return (normal * (generator.random((*shape[:-1], 1)) < 0.3)).astype(np.float32)
    factor = {"huge": 1e37, "tiny": 1e-36}.get(kind, 1.0)
    return ((np.abs(normal) if kind == "one sign" else normal) * factor).astype(np.float32)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, Tensor | None]:
    """Rows, ids, interests, k, and what was seen."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, width = draw(st.integers(1, 250)), draw(st.integers(1, 11))
    users, interests = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 4, 70]))
    weight = make_numbers(draw(st.sampled_from(KINDS)), (rows, width), generator)
    queries = make_numbers(draw(st.sampled_from(KINDS)), (users, interests, width), generator)
    ids = np.sort(generator.choice(3 * rows, rows, replace=False))
    if draw(st.booleans()):
        ids = generator.permutation(ids)
    seen = None
    if draw(st.booleans()):
        count = draw(st.integers(0, 3 * rows))
        pairs = [generator.integers(0, users, count), generator.choice(ids, count)]
        seen = torch.from_numpy(np.stack(pairs, axis=1))
    k = draw(st.integers(1, rows + 3))
    return torch.from_numpy(weight), torch.from_numpy(ids), torch.from_numpy(queries), k, seen


@pytest.mark.parametrize("how", WAYS)
@QUICK
@given(
    problems(), st.sampled_from([1, 7, 64, 1024]), st.sampled_from([1, 5, 256]), st.sampled_from([2, 5, 192]),
    st.sampled_from([0, 1, 64]),
)  # fmt: skip
def test_equals_brute_force(
    how: str, problem, tile_rows: int, tile_queries: int, room: int, spare: int
) -> None:
    expected = brute_force(*problem)
    with way(
        how, TILE_ROWS=tile_rows, TILE_QUERIES=tile_queries, DEVICE_TILE_ROWS=tile_rows,
        DEVICE_TILE_QUERIES=tile_queries, _ROOM=room, _SPARE=spare,
    ):  # fmt: skip
        found = local_topk(*problem)
    assert same(found, expected)


@pytest.mark.parametrize("how", WAYS)
@QUICK
@given(problems(), st.integers(1, 6), st.integers(1, 4), st.data())
def test_any_batch_size_and_any_shards_give_the_same_bits(how: str, problem, at_once, workers, data) -> None:
    weight, ids, interests, k, seen = problem
    seen = torch.empty((0, 2), dtype=torch.int64) if seen is None else seen
    owner = torch.tensor(
        data.draw(st.lists(st.integers(0, workers - 1), min_size=len(ids), max_size=len(ids)))
    )
    with way(how, TILE_ROWS=32, DEVICE_TILE_ROWS=32, _ROOM=8, _SPARE=4):
        whole = local_topk(weight, ids, interests, k, seen)
        parts = []
        for low in range(0, len(interests), at_once):
            users = interests[low : low + at_once]
            mine = topk_shard.cut_seen(seen, low, low + at_once)
            shards = [
                topk_shard.shard_topk(weight[owner == w], ids[owner == w], users, k, mine)
                for w in range(workers)
            ]
            keys, chosen = (torch.cat([shard[i] for shard in shards], dim=1) for i in (0, 1))
            parts.append(topk._decode(*topk_shard.best_keys(keys, chosen, k)))
    assert same(TopK(*(torch.cat(x) for x in zip(*parts, strict=True))), whole)


@pytest.mark.parametrize("how", WAYS)
def test_a_table_of_ordinary_size(how: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, interests = (
        torch.randn(5_000, 64, generator=generator),
        torch.randn(40, 4, 64, generator=generator),
    )
    ids = torch.arange(5_000)
    seen = torch.stack([torch.arange(40).repeat_interleave(50), torch.randint(0, 5_000, (2_000,))], dim=1)
    with way(how):
        assert same(
            local_topk(weight, ids, interests, 50, seen), brute_force(weight, ids, interests, 50, seen)
        )


@pytest.mark.parametrize("how", WAYS)
def test_scores_beyond_the_largest_float_are_infinite_and_ranked_by_id(how: str) -> None:
    """In float32 such products meet as infinity minus infinity; float64 knows their sign."""
    generator = np.random.default_rng(4)
    weight = torch.from_numpy(make_numbers("range", (60, 7), generator) * np.float32(1e9))
    interests = torch.from_numpy(make_numbers("huge", (20, 3, 7), generator))
    with way(how, TILE_ROWS=16, DEVICE_TILE_ROWS=16):
        found = local_topk(weight, torch.arange(60), interests, 9)
    assert same(found, brute_force(weight, torch.arange(60), interests, 9, None))
    assert found.scores_Bk.isinf().any()


def test_of_scores_one_bfloat16_unit_apart_either_may_be_the_better() -> None:
    """Both may have been rounded from the number half way; two units apart they may not."""
    scores = torch.tensor([0.0, 1.0078125, 1.0, 0.9921875], dtype=torch.bfloat16)
    slots, near, marks = np.zeros((1, 9), np.int64), np.zeros((1, 9), np.float32), np.zeros((1, 9), np.int64)
    counts, thresholds = np.zeros(1, np.int64), np.full(1, -np.inf, np.float32)
    topk_kernels.scan_tile(
        scores.view(torch.int16).view(1, 1, 4).numpy(), 0, np.zeros((4, 2), np.float32), np.arange(4),
        np.zeros((1, 1, 2), np.float32), np.full(1, 1e-6, np.float32), np.zeros(2, np.int64),
        np.zeros(0, np.int64), 1, thresholds, slots, near, marks, counts,
    )  # fmt: skip
    assert slots[0, : counts[0]].tolist() == [1, 2]


def test_error_bounds_know_the_largest_interest_of_a_user_and_what_bfloat16_takes_from_one() -> None:
    interests = (
        torch.randn(7, 3, 10, generator=torch.Generator().manual_seed(5))
        * 2.0 ** torch.arange(7)[:, None, None]
    )
    own, rest = topk_shard._norms(interests, compiled=True)
    exact = interests.double()
    taken = exact - interests.bfloat16().double()
    torch.testing.assert_close(own, exact.norm(dim=2).amax(dim=1))
    torch.testing.assert_close(rest, taken.norm(dim=2).amax(dim=1))


def test_scores_are_the_exact_inner_products_rounded() -> None:
    """`math.fsum` adds the products, which float64 holds exactly, without error."""
    generator = np.random.default_rng(3)
    weight = make_numbers("range", (40, 64), generator)
    interests = make_numbers("normal", (3, 2, 64), generator)
    found = local_topk(torch.from_numpy(weight), torch.arange(1, 41), torch.from_numpy(interests), 40)
    for user in range(3):
        for score, item in zip(found.scores_Bk[user].tolist(), found.ids_Bk[user].tolist(), strict=True):
            row = weight[item - 1].astype(np.float64)
            exact = max(math.fsum((q.astype(np.float64) * row).tolist()) for q in interests[user])
            assert abs(score - exact) <= 2.0**-24 * abs(exact) + 64 * 2.0**-53 * 2.0**44


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit_and_is_left_as_it_was(count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, interests = (
        torch.randn(3_000, 16, generator=generator),
        torch.randn(90, 4, 16, generator=generator),
    )
    before = torch.get_num_threads()
    expected = brute_force(weight, torch.arange(3_000), interests, 20, None)
    try:
        torch.set_num_threads(count)
        assert same(local_topk(weight, torch.arange(3_000), interests, 20), expected)
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


def test_pieces_run_on_one_thread_each_and_an_error_comes_out() -> None:
    before = torch.get_num_threads()
    assert cpu.map_single_threaded(lambda _: torch.get_num_threads(), range(5)) == [1] * 5
    with pytest.raises(ZeroDivisionError):
        cpu.map_single_threaded(lambda x: 1 // x, [1, 0])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("how", ["compiled, float32", "torch"])
def test_a_coarse_matrix_product_changes_no_bit(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 numbers choose the candidates here; that they are coarse is told by torch's setting."""
    generator = torch.Generator().manual_seed(2)
    weight, interests = (
        torch.randn(2_000, 16, generator=generator),
        torch.randn(9, 4, 16, generator=generator),
    )
    expected = brute_force(weight, torch.arange(2_000), interests, 20, None)
    exact_mm, exact_matmul = torch.mm, Tensor.__matmul__

    def coarse(a: Tensor, b: Tensor) -> Tensor:
        return exact_matmul(a.bfloat16().float(), b.bfloat16().float())

    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: exact_mm(a.bfloat16().float(), b.bfloat16().float(), out=out)
    )
    monkeypatch.setattr(Tensor, "__matmul__", coarse)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    with way(how):
        assert same(local_topk(weight, torch.arange(2_000), interests, 20), expected)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_give_scores_that_are_not(how: str, value: float) -> None:
    weight, interests = torch.randn(30, 4), torch.randn(5, 2, 4)
    ids = torch.arange(30)
    clean = local_topk(weight, ids, interests, 7)
    interests[3, 1, 2] = value
    with way(how):
        found = local_topk(weight, ids, interests, 7)
        weight[4, 0] = value
        all_bad = local_topk(weight, ids, interests, 7)
    assert found.scores_Bk.isnan().all(dim=1).tolist() == [False, False, False, True, False]
    others = [0, 1, 2, 4]
    assert same(TopK(*(x[others] for x in found)), TopK(*(x[others] for x in clean)))
    assert all_bad.scores_Bk.isnan().all()


def test_users_without_interests_get_the_first_ids_that_they_have_not_seen() -> None:
    weight, ids = torch.randn(20_000, 4), torch.arange(20_000)
    seen = torch.tensor([[0, 2], [1, 19_999]])
    found = local_topk(weight, ids, torch.zeros(2, 3, 4), 4, seen)
    assert found.ids_Bk.tolist() == [[1, 3, 4, 5], [1, 2, 3, 4]]
    assert found.scores_Bk.tolist() == [[0.0] * 4] * 2
    assert found.interests_Bk.tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("how", WAYS)
def test_never_holds_more_scores_than_a_tile(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    exact_mm, exact_matmul = torch.mm, Tensor.__matmul__

    def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        sizes.append((len(a), b.shape[1]))
        return exact_mm(a, b, out=out)

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        sizes.append((len(a), b.shape[1]))
        return exact_matmul(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(Tensor, "__matmul__", matmul)
    with way(how, TILE_ROWS=16, TILE_QUERIES=4, DEVICE_TILE_ROWS=16, DEVICE_TILE_QUERIES=4):
        local_topk(torch.randn(100, 3), torch.arange(100), torch.randn(10, 2, 3), 5)
    assert max(q for q, _ in sizes) == 4
    assert max(r for _, r in sizes) == 16
    assert sum(q * r for q, r in sizes) == 10 * 2 * 100


def test_one_interest_may_come_without_its_axis() -> None:
    table, queries = LocalItemTable(50, 4), torch.randn(6, 4)
    assert same(table.topk(queries, 5), table.topk(queries[:, None], 5))


@pytest.mark.parametrize("k", [0, 9, 100])
def test_an_impossible_size_is_refused(k: int) -> None:
    with pytest.raises(InputError, match="k must be between 1 and 8"):
        LocalItemTable(9, 4).topk(torch.zeros(2, 4), k)


@pytest.mark.parametrize("shape", [(2, 5), (2, 0, 4), (4,), (1, 1, 1, 4)])
def test_interests_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must be \[B, K, 4\]"):
        LocalItemTable(9, 4).topk(torch.zeros(shape), 3)


def test_no_users() -> None:
    found = LocalItemTable(9, 4).topk(torch.zeros(0, 2, 4), 3)
    assert [x.shape for x in found] == [(0, 3)] * 3


def test_order_keys_sort_like_scores_then_smaller_ids_and_decode() -> None:
    inf = float("inf")
    scores = torch.tensor([-inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, 2.0, inf])
    ids = torch.tensor([1, 2, 3, 8, 5, 6, 1 << 30, 7, 9])
    keys = topk_shard.order_keys(scores, ids)
    assert keys.sort(descending=True).indices.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    decoded_scores, decoded_ids = topk_shard.split_keys(keys)
    assert torch.equal(decoded_scores, scores)
    assert torch.equal(decoded_ids, ids)
