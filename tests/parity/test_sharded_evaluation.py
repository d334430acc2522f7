"""Ranked lists of one to four gloo processes with a sharded table: the same bits as those of one local table.

Each process ranks its share with several batch sizes and numbers of threads; digests of what all shares join to are
compared.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from distributed_mi.core.registry import resolve
from distributed_mi.data.batches import Sequences
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.sharded import ShardedItemTable
from distributed_mi.embeddings.table import ItemTable, LocalItemTable
from distributed_mi.evaluation import topk
from distributed_mi.evaluation.protocol import Cases
from distributed_mi.models.base import Recommender
from tests.distributed import run_on_ranks

NUM_ROWS, DIM, USERS, LENGTH = (
    701,
    128,
    333,
    20,
)  # a width at which MKL's bits depend on the number of threads
BATCHES = ((1, 1), (1_000, 3))
"""Users at once, and threads."""


def make_cases() -> Cases:
    """Users with 2 to 30 events, of which the last one is a label."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(2, 31, USERS)
    sequences = Sequences(
        user_index_U=np.arange(USERS),
        user_id_U=pa.array([str(u) for u in range(USERS)], pa.large_string()),
        items=generator.integers(1, NUM_ROWS, lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        num_history_U=lengths - 1,
    )
    return Cases(sequences, np.arange(USERS))


def make_model(items: ItemTable) -> Recommender:
    torch.manual_seed(0)
    owner = resolve("model", "remi")
    return owner(owner.Config(), items=items, max_history=20)


def digest(*tensors: Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def rank_all(model: Recommender, group: WorkerGroup) -> list[list[str]]:
    """Digests of lists, and of scores and interests, with and without seen items, for each batch size."""
    cases, results = make_cases(), []
    original, before = model.items.topk, torch.get_num_threads()
    for users_per_batch, threads in BATCHES:
        for exclude_seen in (False, True):
            found = []

            def recorded(interests: Tensor, k: int, *, seen_M2: Tensor | None, found: Any = found) -> Any:
                found.append(original(interests, k, seen_M2=seen_M2))
                return found[-1]

            model.items.topk = recorded  # type: ignore[method-assign]
            torch.set_num_threads(threads)
            mine = rank_share(model, cases, group, users_per_batch, exclude_seen)
            torch.set_num_threads(before)
            columns = [torch.cat([getattr(f, name) for f in found]) for name in ("scores_Bk", "interests_Bk")]
            whole = [torch.cat(group.all_gather_rows(x)) for x in (torch.from_numpy(mine), *columns)]
            assert len(whole[0]) == USERS
            results.append([digest(x) for x in whole])
    model.items.topk = original  # type: ignore[method-assign]
    return results


def rank_share(model: Recommender, cases: Cases, group: WorkerGroup, batch: int, exclude_seen: bool) -> Any:
    return topk.rank_share(
        model, cases, group, length=LENGTH, users_per_batch=batch, exclude_seen=exclude_seen
    )


def on_worker(group: WorkerGroup, payload: dict[str, Any]) -> list[list[str]]:
    return rank_all(make_model(ShardedItemTable(NUM_ROWS, DIM, seed=3, group=group)), group)


@pytest.fixture(scope="module")
def alone() -> list[list[str]]:
    return rank_all(make_model(LocalItemTable(NUM_ROWS, DIM, seed=3)), WorkerGroup.alone())


def test_batch_size_and_threads_change_no_bit(alone: list[list[str]]) -> None:
    assert alone[0] != alone[1]  # with and without seen items
    assert alone[::2] == [alone[0]] * len(BATCHES)
    assert alone[1::2] == [alone[1]] * len(BATCHES)


@pytest.mark.parametrize("size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))])
def test_any_number_of_workers_gives_the_bits_of_one(size: int, alone: list[list[str]], tmp_path) -> None:
    ranks = run_on_ranks("tests.parity.test_sharded_evaluation:on_worker", size, tmp_path, {})
    assert ranks == [alone] * size
