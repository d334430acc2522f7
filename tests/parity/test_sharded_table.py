"""The sharded table against the local one on one to four gloo processes, and both against torch's optimizers.

Each launch of processes runs every case below and sends back what it measured; the tests read those numbers.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch
from torch import Tensor, nn

from distributed_mi.core.errors import InputError
from distributed_mi.embeddings import gradients
from distributed_mi.embeddings import optimizer as optimizer_module
from distributed_mi.embeddings import topk as topk_module
from distributed_mi.embeddings.checkpoint import load_table, save_table
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.gradients import RowGradients
from distributed_mi.embeddings.group import Exchange, WorkerGroup
from distributed_mi.embeddings.optimizer import SGD, make_optimizer
from distributed_mi.embeddings.placement import expected_load, make_placement
from distributed_mi.embeddings.sharded import ShardedItemTable
from distributed_mi.embeddings.table import ItemTable, LocalItemTable
from tests.distributed import run_on_ranks
from tests.model_batches import (
    DIM,
    LEARNED,
    NUM_ROWS,
    cut,
    make_batch,
    make_history,
    make_model,
    make_table,
    table_gradient,
)

FS = pafs.LocalFileSystem()
OPTIMIZERS = {
    "adam": TableOptimizerConfig(),
    "dense_adam": TableOptimizerConfig(lazy=False),
    "adagrad": TableOptimizerConfig(name="adagrad"),
    "row_adagrad": TableOptimizerConfig(name="row_adagrad"),
    "sgd": TableOptimizerConfig(name="sgd"),
}


LOAD = expected_load(np.arange(NUM_ROWS, 0, -1.0) ** 2, 20)
VARIANTS: dict[str, dict[str, Any]] = {
    "modulo": {},
    "hashed": {"placement": "hashed"},
    "ranges": {"placement": "ranges"},
    "replicated": {"replicated_rows": 7},
    "hashed_replicated": {"placement": "hashed", "replicated_rows": 11},
}


def make_sharded(group: WorkerGroup, placement: str = "modulo", **kwargs: Any) -> ShardedItemTable:
    chosen = make_placement(placement, NUM_ROWS, group.size, LOAD)
    return ShardedItemTable(NUM_ROWS, DIM, seed=3, group=group, placement=chosen, **kwargs)


def whole(table: ShardedItemTable, name: str = "weight") -> Tensor:
    """Every row of a sharded table, in id order."""
    ids, tensors = table.state()
    order = torch.cat(table.group.all_gather_rows(ids)).argsort()
    return torch.cat(table.group.all_gather_rows(tensors[name]))[order]


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


# ---- what each process runs -----------------------------------------------------------------------------------------


def all_cases(group: WorkerGroup, payload: dict[str, Any]) -> dict[str, Any]:
    return {
        "collectives": collectives(group),
        "lookup": lookup(group),
        "exchanges": exchanges(group),
        "announced": announced(group),
        "on_their_way": gradients_on_their_way(group),
        "bad_id": bad_id(group),
        "training": {
            f"{name}-{variant}": training(group, name, **options)
            for name in OPTIMIZERS
            for variant, options in VARIANTS.items()
        },
        "bf16": training(group, "sgd", exchange_dtype=torch.bfloat16),
        "counters": counters(group),
        "topk": {name: topk(group, **options) for name, options in VARIANTS.items()},
        "checkpoint": checkpoint(group, payload["folder"]),
        "models": {name: model(group, name) for name in LEARNED},
        "eimf_both_directions": model(group, "eimf", both_directions=True, alignment_read_out="hard"),
        "most_popular": most_popular(group),
    }


def collectives(group: WorkerGroup) -> dict[str, Any]:
    rank, size = group.rank, group.size
    mine = torch.full((rank, 2), float(rank))  # worker r has r rows, so worker 0 has none
    x = torch.arange(2.0 * (rank + 1)).view(rank + 1, 2).requires_grad_()
    gathered = group.gather_with_grad(x)
    # Worker r weighs every gathered row i by (i + 1)(r + 1).
    weight = torch.arange(1.0, len(gathered) + 1)[:, None] * (rank + 1)
    (gathered * weight).sum().backward()
    blocks = torch.cat([torch.full((to + 1,), 10.0 * rank + to) for to in range(size)])
    received, counts = group.all_to_all_rows(blocks, [to + 1 for to in range(size)])
    assert x.grad is not None
    return {
        "all_gather": [part.tolist() for part in group.all_gather_rows(mine)],
        "all_gather_bool": [part.tolist() for part in group.all_gather_rows(torch.tensor([rank == 0]))],
        "gathered_rows": len(gathered),
        "gathered_int": group.gather_with_grad(torch.tensor([rank])).tolist(),
        "gradient": x.grad.tolist(),
        "all_to_all": received.tolist(),
        "all_to_all_counts": counts,
        "sum": group.all_reduce_sum(torch.tensor([1.0, rank])).tolist(),
        "broadcast": group.broadcast_json({"name": "é", "rank": rank}),
        "json": group.all_gather_json({"rank": rank, "text": "x" * rank}),
        "offset": group.row_offset(rank + 1),
    }


def lookup(group: WorkerGroup) -> float:
    table, local = make_sharded(group), make_table()
    ids = [torch.tensor([[0, group.rank + 1], [40, 7]]), torch.empty(0, dtype=torch.int64), torch.tensor([7])]
    pairs = zip(table.lookup(*ids), local.lookup(*ids), strict=True)
    nothing = table.lookup(torch.empty(0, dtype=torch.int64))[0]  # every worker may also have nothing to ask
    assert nothing.shape == (0, DIM)
    return max(gap(a, b) for a, b in pairs)


def exchanges(group: WorkerGroup) -> list[int]:
    """Rows that leave this worker in each exchange of one lookup of three tensors, forward and backward."""
    table = make_sharded(group)
    sent: list[int] = []
    original = group.start_exchange

    def counting(tensor: Tensor, send: list[int], receive: list[int]) -> Exchange:
        sent.append(sum(send))
        return original(tensor, send, receive)

    group.start_exchange = counting  # type: ignore[method-assign]
    repeated = torch.tensor([[5, 5, 0, 0], [6, 5, 0, 0]])
    rows = table.lookup(repeated, torch.tensor([6]), torch.tensor([5, 6, 5]))
    sum(r.sum() for r in rows).backward()
    del group.start_exchange
    return sent


def announced(group: WorkerGroup) -> dict[str, Any]:
    """What leaves before a lookup that was announced, what it then waits for, and the rows; one is never looked up."""
    table, local = make_sharded(group), make_table()
    first, second, never = (torch.tensor(ids) for ids in ([3, group.rank + 1], [5, 40, 5], [1]))
    sent: list[int] = []
    original = group.start_exchange

    def noting(tensor: Tensor, send: list[int], receive: list[int]) -> Exchange:
        sent.append(tensor.dim())
        return original(tensor, send, receive)

    group.start_exchange = noting  # type: ignore[method-assign]
    found = []
    for ids in (first, never):
        table.announce(ids)
    found.append(len(sent))
    gaps = [gap(table.rows(first), local.rows(first))]
    found.append(len(sent))
    gaps.append(gap(table.rows(second), local.rows(second)))
    table.forget_announced()
    found.append(len(sent))
    table.announce(second)
    gaps.append(gap(table.rows(second), local.rows(second)))
    del group.start_exchange
    return {"sent": found, "ahead": sent[:2], "gaps": gaps, "left": len(table._announced)}


def gradients_on_their_way(group: WorkerGroup) -> dict[str, float]:
    """Two backward passes before a step, with a collective in between; and two that are forgotten."""
    optimizer = make_optimizer(TableOptimizerConfig(name="sgd"))
    table, local = make_sharded(group, optimizer=optimizer), make_table(optimizer=optimizer)
    start = whole(table)
    ids = torch.tensor([5, group.rank + 1, 40])

    def twice(chosen: ItemTable, every: list[Tensor]) -> None:
        for factor in (1.0, 2.0):
            for mine in every:
                (chosen.rows(mine) * factor).sum().backward()
            group.barrier()

    twice(table, [ids])
    table.zero_grad()
    table.step(1.0)
    forgotten = gap(whole(table), start)
    twice(table, [ids])
    table.step(0.5)
    twice(local, group.all_gather_rows(ids))
    local.step(0.5)
    return {"forgotten": forgotten, "gap": gap(whole(table), local.state()[1]["weight"])}


def bad_id(group: WorkerGroup) -> str:
    try:
        make_sharded(group).rows(torch.tensor([NUM_ROWS]))
    except InputError as error:
        return str(error)
    return "accepted"


def counters(group: WorkerGroup) -> dict[str, Any]:
    table = make_sharded(group)
    ids = torch.tensor([5, 5, 0, 6, 5])
    rows = table.rows(ids)
    rows.sum().backward()
    found = table.take_counters()
    outside = int((table.placement.owner(torch.tensor([0, 5, 6])) != group.rank).sum())
    return {
        "ids": found.ids,
        "unique": found.unique_ids,
        "bytes": found.exchanged_bytes,
        "here": outside * 8,
        "again": table.take_counters().ids,
    }


def training(group: WorkerGroup, name: str, **options: Any) -> dict[str, float]:
    """100 steps; worker r's part of the loss is a fixed function of its ids. The local table sees all parts.

    Some lookups are announced, up to two before they come; others come between them.
    """
    table = make_sharded(group, optimizer=make_optimizer(OPTIMIZERS[name]), **options)
    local = make_table(optimizer=make_optimizer(OPTIMIZERS[name]))

    @cache
    def ids_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * step + rank)
        first, second = torch.randint(0, NUM_ROWS, (2, 9), generator=generator)
        return first.view(3, 3), second

    def part(items: Any, step: int, rank: int) -> Tensor:
        first, second = ids_of(step, rank)
        a, b = items.lookup(first, second)
        c = items.rows(first.view(-1)[:2])
        goal = torch.randn(9, DIM, generator=torch.Generator().manual_seed(100 * step + rank))
        return (a.reshape(9, DIM) - goal).square().sum() + (a.reshape(9, DIM) * b).sum() + c.sum()

    for step in range(100):
        for later in {0: (1,), 2: (3, 4)}.get(step % 5, ()):
            table.announce(*ids_of(step - step % 5 + later, group.rank))
        part(table, step, group.rank).backward()
        table.step(0.05)
        sum(part(local, step, r) for r in range(group.size)).backward()
        local.step(0.05)
    tensors = local.state()[1]
    moved = gap(tensors["weight"], make_table().state()[1]["weight"])
    scaled = {
        n: gap(whole(table, n).float(), t.float()) / max(1.0, float(t.max())) for n, t in tensors.items()
    }
    return {"moved": moved, **scaled}


def topk(group: WorkerGroup, **options: Any) -> dict[str, Any]:
    table, local = make_sharded(group, **options), make_table()
    topk_module.GATHERED_USERS = (
        3 * group.size
    )  # several rounds, of which a worker with few queries has fewer
    generator = torch.Generator().manual_seed(1)
    whole_numbers = torch.randint(-1, 2, (NUM_ROWS, DIM), generator=generator).float()
    for items in (table, local):
        items.assign(torch.arange(NUM_ROWS), {"weight": whole_numbers})
    queries = torch.randint(-1, 2, (5 * group.rank, DIM), generator=generator).float()  # worker 0 has none
    same = []
    for k in (1, 7, NUM_ROWS - 1):
        scores, ids, _ = table.topk(queries, k)
        expected_scores, expected_ids, _ = local.topk(queries, k)
        same.append(torch.equal(ids, expected_ids) and torch.equal(scores, expected_scores))
    return {"same": same, "queries": len(queries)}


def checkpoint(group: WorkerGroup, folder: str) -> dict[str, Any]:
    """Load what one process saved, and save it again for one process to load."""
    table = make_sharded(group)
    load_table(table, FS, f"{folder}/one", _saved_by_one(folder), with_optimizer=True)
    expected = _trained()
    gaps = {n: gap(whole(table, n).float(), t.float()) for n, t in expected.state()[1].items()}
    files = save_table(table, FS, f"{folder}/many", group.rank, group.size)
    return {"gaps": gaps, "files": files}


def _trained() -> LocalItemTable:
    table = make_table()
    for step in range(3):
        table.rows(torch.arange(step, NUM_ROWS, 2)).square().sum().backward()
        table.step(0.1)
    return table


def _saved_by_one(folder: str) -> dict[str, str]:
    return save_table(_trained(), FS, f"{folder}/again", 0, 1)


def model(group: WorkerGroup, name: str, **settings: Any) -> dict[str, float]:
    """Loss and gradients of a step that is cut unevenly over the workers, against the step in one piece."""
    num_users = 7
    batch = make_batch(num_users)
    bounds = [num_users * r // group.size for r in range(group.size + 1)]
    mine = cut(batch, bounds[group.rank], bounds[group.rank + 1])
    mine = type(mine)(**{**vars(mine), "gather": group.gather_with_grad, "gather_offset": bounds[group.rank]})
    items, local_items = make_sharded(group, optimizer=SGD()), make_table(optimizer=SGD())
    ours, local = make_model(name, items, **settings), make_model(name, local_items, **settings)
    part = ours.loss(mine).total(num_users)
    part.backward()
    whole_loss = local.loss(batch).total(num_users)
    whole_loss.backward()
    result = {"loss": abs(float(group.all_reduce_sum(part)) - float(whole_loss)), "dense": 0.0}
    for p, q in zip(ours.parameters(), local.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        result["dense"] = max(result["dense"], gap(group.all_reduce_sum(p.grad), q.grad))
    before = whole(items)
    items.step(1.0)
    row_gradient = table_gradient(local_items)
    result["rows"] = gap(before - whole(items), row_gradient)
    result["size"] = float(row_gradient.abs().max())
    history = make_history(4, seed=group.rank)
    with torch.no_grad():
        local_items.assign(torch.arange(NUM_ROWS), {"weight": whole(items)})
        result["encode"] = gap(ours.encode(history).interests_BKD, local.encode(history).interests_BKD)
    return result


def most_popular(group: WorkerGroup) -> list[int]:
    ours = make_model("most_popular", make_sharded(group))
    ours.fit_counts(torch.arange(NUM_ROWS, 0, -1))
    interests = ours.encode(make_history(2)).interests_BKD
    return ours.items.topk(interests[:, 0], 4)[1][0].tolist()


# ---- what is asked of it --------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    save_table(_trained(), FS, f"{folder}/one", 0, 1)
    payload = {"folder": str(folder)}
    results = run_on_ranks("tests.parity.test_sharded_table:all_cases", request.param, folder, payload)
    results[0]["folder"] = str(folder)
    return results


def test_collectives(ranks: list[dict[str, Any]]) -> None:
    size = len(ranks)
    for rank, result in enumerate(r["collectives"] for r in ranks):
        assert result["all_gather"] == [[[float(r)] * 2] * r for r in range(size)]
        assert result["all_gather_bool"] == [[r == 0] for r in range(size)]
        assert result["gathered_rows"] == size * (size + 1) // 2
        assert result["gathered_int"] == list(range(size))
        # Row i of the gathered tensor got (i + 1) times the sum of the workers' factors 1 + 2 + ... + W.
        start = rank * (rank + 1) // 2
        factor = size * (size + 1) / 2
        assert result["gradient"] == [[(start + i + 1) * factor] * 2 for i in range(rank + 1)]
        assert result["all_to_all"] == [10.0 * r + rank for r in range(size) for _ in range(rank + 1)]
        assert result["all_to_all_counts"] == [rank + 1] * size
        assert result["sum"] == [float(size), size * (size - 1) / 2]
        assert result["broadcast"] == {"name": "é", "rank": 0}
        assert result["json"] == [{"rank": r, "text": "x" * r} for r in range(size)]
        assert result["offset"] == start


def test_lookup_equals_the_local_table_exactly(ranks: list[dict[str, Any]]) -> None:
    assert [r["lookup"] for r in ranks] == [0.0] * len(ranks)


def test_a_lookup_asks_for_each_distinct_id_once(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        counts, ids, _, gradients = result["exchanges"]  # the third: rows out to others
        assert (counts, ids, gradients) == (len(ranks), 3, 3)  # 0, 5 and 6
    assert sum(r["exchanges"][-2] for r in ranks) == 3 * len(ranks)


def test_an_announced_lookup_waits_for_its_rows_only(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        found = result["announced"]
        assert found["gaps"] == [0.0, 0.0, 0.0]
        assert found["ahead"] == [1, 1]  # counts of two
        # Then ids and rows of the first, ids of the other; all three of a lookup that nobody announced.
        assert found["sent"] == [2, 5, 8]
        assert found["left"] == 0


def test_gradients_arrive_whatever_is_said_meanwhile(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["on_their_way"]["forgotten"] == 0.0
        assert result["on_their_way"]["gap"] < 1e-6


def test_an_id_outside_the_table_is_named(ranks: list[dict[str, Any]]) -> None:
    assert all(f"id {NUM_ROWS} is outside" in r["bad_id"] for r in ranks)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_steps_equal_the_local_table(ranks: list[dict[str, Any]], name: str, variant: str) -> None:
    for result in ranks:
        measured = dict(result["training"][f"{name}-{variant}"])
        assert measured.pop("moved") > 0.1
        # Float32 sums in another order, 100 steps.
        assert max(measured.values()) < 1e-5, measured


def test_bf16_exchange_rounds_rows_and_gradients_only(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        measured = dict(result["bf16"])
        assert measured.pop("moved") > 0.1
        assert (0 if len(ranks) == 1 else 1e-5) <= measured["weight"] < 0.05


def test_counters_count_what_left_the_process(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(r["counters"] for r in ranks):
        assert (found["ids"], found["unique"], found["again"]) == (5, 3, 0)
        # Ids and gradients of rows held elsewhere, and rows that the others asked of this worker.
        held = 3 - found["here"] // 8
        rows = held * (len(ranks) - 1)
        assert found["bytes"] == found["here"] + 4 * DIM * (3 - held + rows), rank


def test_topk_equals_the_local_table_exactly(ranks: list[dict[str, Any]]) -> None:
    for variant in VARIANTS:
        found = [r["topk"][variant] for r in ranks]
        assert [f["queries"] for f in found] == [5 * r for r in range(len(ranks))]
        assert all(all(f["same"]) for f in found)


def test_a_checkpoint_moves_between_worker_counts(ranks: list[dict[str, Any]]) -> None:
    files = {}
    for result in ranks:
        assert max(result["checkpoint"]["gaps"].values()) == 0.0
        files |= result["checkpoint"]["files"]
    assert len(files) == len(ranks)
    back = LocalItemTable(NUM_ROWS, DIM, seed=77)
    load_table(back, FS, f"{ranks[0]['folder']}/many", files, with_optimizer=True)
    expected = _trained().state()[1]
    assert all(torch.equal(t, expected[n]) for n, t in back.state()[1].items())


@pytest.mark.parametrize("name", [*LEARNED, "eimf_both_directions"])
def test_a_model_does_not_depend_on_how_a_step_is_cut(ranks: list[dict[str, Any]], name: str) -> None:
    for result in ranks:
        measured = result[name] if name in result else result["models"][name]
        assert measured["size"] > 1e-3
        assert measured["loss"] < 1e-5
        assert measured["dense"] < 1e-5
        assert measured["rows"] < 1e-5
        assert measured["encode"] < 1e-6


def test_most_popular_counts_go_to_their_owners(ranks: list[dict[str, Any]]) -> None:
    assert all(r["most_popular"] == [1, 2, 3, 4] for r in ranks)


# ---- torch's optimizers ---------------------------------------------------------------------------------------------


def against_torch(
    config: TableOptimizerConfig,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    all_rows: bool,
    sparse: bool = False,
) -> float:
    """Largest difference after 15 steps on random rows, in the table and in an embedding trained by torch."""
    table = LocalItemTable(12, 5, seed=2, optimizer=make_optimizer(config))
    dense = nn.Embedding(12, 5, sparse=sparse)
    dense.weight.data.copy_(table.state()[1]["weight"])
    optimizer = make([dense.weight])
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        ids = torch.arange(1, 12) if all_rows else torch.randint(1, 12, (6,), generator=generator)
        goal = torch.randn(len(ids), 5, generator=generator)
        for rows in (table.rows(ids), dense(ids)):
            (rows - goal).square().sum().backward()
        table.step(0.05)
        optimizer.step()
        optimizer.zero_grad()
    return gap(table.state()[1]["weight"], dense.weight.detach())


def test_adam_equals_torch_when_every_row_is_touched() -> None:
    config = TableOptimizerConfig(beta1=0.8, beta2=0.95, eps=1e-6)
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
    assert against_torch(config, lambda p: torch.optim.Adam(p, **options), all_rows=True) < 1e-6
    # SparseAdam adds eps before it corrects the bias of the second moment.
    assert (
        against_torch(config, lambda p: torch.optim.SparseAdam(p, **options), all_rows=True, sparse=True)
        < 5e-6
    )


def test_lazy_adam_differs_from_both_when_rows_are_skipped_and_dense_adam_does_not() -> None:
    def adam(p: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(p, lr=0.05)

    def sparse_adam(p: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(p, lr=0.05)

    assert against_torch(TableOptimizerConfig(), adam, all_rows=False) > 1e-2
    assert against_torch(TableOptimizerConfig(), sparse_adam, all_rows=False, sparse=True) > 1e-3
    assert against_torch(TableOptimizerConfig(lazy=False), adam, all_rows=False) < 1e-6


def test_lazy_adam_of_a_row_is_torch_adam_over_the_steps_that_touched_it() -> None:
    table = LocalItemTable(4, 3, seed=2)
    alone = nn.Parameter(table.state()[1]["weight"][2].clone())
    optimizer = torch.optim.Adam([alone], lr=0.05)
    for step in range(9):
        row = 2 if step % 3 == 0 else 1
        (table.rows(torch.tensor([row])) - step).square().sum().backward()
        table.step(0.05)
        if row == 2:
            (alone - step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(table.state()[1]["weight"][2], alone.detach(), rtol=1e-6, atol=1e-6)
    assert table.state()[1]["num_updates"].tolist() == [0, 6, 3, 0]


def test_adam_beyond_its_table_of_corrections_goes_on_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_module, "_CORRECTIONS", 4)
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
    config = TableOptimizerConfig(beta1=0.8, beta2=0.95, eps=1e-6)
    assert against_torch(config, lambda p: torch.optim.Adam(p, **options), all_rows=True) < 1e-6


@pytest.mark.parametrize("name", ["adam", "adagrad", "row_adagrad", "sgd"])
def test_compiled_and_torch_forms_of_an_update_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, Tensor]:
        table = LocalItemTable(50, 7, seed=2, optimizer=make_optimizer(TableOptimizerConfig(name=name)))
        for step in range(20):
            ids = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(step))
            (table.rows(ids) - 1).square().sum().backward()
            table.step(0.05)
        return table.state()[1]

    compiled = trained()
    monkeypatch.setattr(RowGradients, "compiled", False)
    for key, values in trained().items():
        torch.testing.assert_close(compiled[key], values, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["adam", "adagrad", "row_adagrad", "sgd"])
@pytest.mark.parametrize("lookups", [1, 2, 3, 4, 7])
def test_gradients_of_any_number_of_lookups_add_up(name: str, lookups: int) -> None:
    """In a step of several accumulation parts each part looks up for itself; parts have different lengths."""
    generator = torch.Generator().manual_seed(lookups)
    ids = [torch.randint(0, 50, (9 - n,), generator=generator) for n in range(lookups)]

    def trained(*asked: Tensor) -> dict[str, Tensor]:
        table = LocalItemTable(50, 7, seed=2, optimizer=make_optimizer(TableOptimizerConfig(name=name)))
        for _ in range(3):
            for part in asked:
                (table.rows(part) - 1).square().sum().backward()
            table.step(0.05)
        return table.state()[1]

    together = trained(torch.cat(ids))
    for key, values in trained(*ids).items():
        torch.testing.assert_close(together[key], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("holds_padding", [True, False])
def test_gradients_are_grouped_alike_by_counting_and_by_sorting(
    holds_padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    for slots in (torch.randint(0, 40, (200,), generator=generator), torch.zeros(3, dtype=torch.int64)):
        given = RowGradients(slots, [torch.randn(len(slots), 4, generator=generator)], 40, holds_padding)
        found = []
        for counted in (16, 0):
            monkeypatch.setattr(gradients, "_COUNTED", counted)
            slots_U, starts_P, order_N, _ = given.grouped()
            places = [order_N[a:b].tolist() for a, b in pairwise(starts_P.tolist())]
            found.append(dict(zip(slots_U.tolist(), places, strict=True)))
        expected = {
            s: (slots == s).nonzero().flatten().tolist()
            for s in slots.unique().tolist()
            if s or not holds_padding
        }
        assert found == [expected, expected]


@pytest.mark.parametrize("all_rows", [True, False])
def test_adagrad_and_sgd_equal_torch_whatever_is_touched(all_rows: bool) -> None:
    adagrad = TableOptimizerConfig(name="adagrad", eps=1e-7, initial_accumulator=0.1)
    options = {"lr": 0.05, "eps": 1e-7, "initial_accumulator_value": 0.1}
    assert against_torch(adagrad, lambda p: torch.optim.Adagrad(p, **options), all_rows=all_rows) < 1e-6
    sgd = TableOptimizerConfig(name="sgd")
    assert against_torch(sgd, lambda p: torch.optim.SGD(p, lr=0.05), all_rows=all_rows) < 1e-6


def test_row_adagrad_by_hand() -> None:
    table = LocalItemTable(3, 2, optimizer=make_optimizer(TableOptimizerConfig(name="row_adagrad")))
    table.assign(torch.arange(3), {"weight": torch.zeros(3, 2)})
    for _ in range(2):
        (table.rows(torch.tensor([1])) * torch.tensor([3.0, 1.0])).sum().backward()
        table.step(1.0)
    # The mean square of (3, 1) is 5. First step: g / sqrt(5); second: g / sqrt(10).
    size = 5**-0.5 + 10**-0.5
    torch.testing.assert_close(table.state()[1]["weight"][1], torch.tensor([-3.0 * size, -size]))
    assert table.state()[1]["sum_of_squares"].flatten().tolist() == [0.0, 10.0, 0.0]
