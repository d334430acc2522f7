import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from distributed_mi.core.errors import StageError
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.evaluation import topk
from distributed_mi.evaluation.protocol import Cases, load_cases
from distributed_mi.evaluation.topk import rank_share, share
from distributed_mi.models.base import HistoryBatch, UserState
from tests.unit.evaluation import tiny

CHUNK = 4
"""Users of a chunk here, so that a few dozen users fill several."""


@pytest.fixture(autouse=True)
def _small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "whole_chunks" not in request.node.name:
        monkeypatch.setattr(topk, "CHUNK_USERS", CHUNK)


class Member(WorkerGroup):
    """One worker of several, alone: enough to look at the share that it would rank."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, torch.device("cpu"), None)


def brute_force(model: tiny.TwoInterests, cases: Cases, length: int, *, exclude_seen: bool) -> np.ndarray:
    """All V scores, max over interests, sorted by (score descending, id ascending)."""
    _, tensors = model.items.state()
    vectors = tensors["weight"].detach().numpy()
    histories, mask = cases.histories(np.arange(cases.num_users), tiny.MAX_HISTORY)
    state = model.encode(HistoryBatch(torch.from_numpy(histories), torch.from_numpy(mask)))
    scores = (state.interests_BKD.detach().numpy() @ vectors.T).max(axis=1)
    scores[:, 0] = -np.inf
    if exclude_seen:
        for u in range(cases.num_users):
            scores[u, cases.sequences.history(cases.rows[u])] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :length]
    return np.where(np.isinf(np.take_along_axis(scores, order, 1)), 0, order)


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("length", [1, 5, tiny.NUM_ITEMS, tiny.NUM_ITEMS + 4])
def test_equals_brute_force(workspace, exclude_seen: bool, length: int) -> None:
    model, cases = tiny.TwoInterests(items=tiny.make_table()), load_cases(workspace, "test")
    expected = brute_force(model, cases, length, exclude_seen=exclude_seen)
    expected = np.pad(expected, ((0, 0), (0, length - expected.shape[1])))
    options = {"length": length, "exclude_seen": exclude_seen}
    ours = rank_share(model, cases, WorkerGroup.alone(), users_per_batch=7, **options)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_shares_of_any_number_of_workers_join_to_the_same_lists(workspace, size: int) -> None:
    model, cases = tiny.TwoInterests(items=tiny.make_table()), load_cases(workspace, "test")
    whole = rank_share(model, cases, WorkerGroup.alone(), length=5, users_per_batch=100)
    parts = [rank_share(model, cases, Member(r, size), length=5, users_per_batch=4) for r in range(size)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("size", [2, 3, 40])
def test_every_worker_makes_the_same_number_of_calls(workspace, size: int, monkeypatch) -> None:
    cases = load_cases(workspace, "test")
    calls = []
    for rank in range(size):
        model = tiny.TwoInterests(items=tiny.make_table())
        made: list[tuple[str, int]] = []

        def counted_topk(interests, k, *, seen_M2, made=made, original=model.items.topk):
            made.append(("topk", k))
            return original(interests, k, seen_M2=seen_M2)

        def counted_rows(ids, made=made, original=model.items.rows):
            made.append(("rows", len(ids)))
            return original(ids)

        monkeypatch.setattr(model.items, "topk", counted_topk)
        monkeypatch.setattr(model.items, "rows", counted_rows)
        rank_share(model, cases, Member(rank, size), length=5, users_per_batch=2 * CHUNK)
        calls.append(made)
    assert all(made == calls[0] for made in calls)
    chunks = math.ceil(math.ceil(cases.num_users / CHUNK) / size)
    assert len(calls[0]) == 2 * math.ceil(chunks / 2)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("users_per_batch", [1, CHUNK, 3 * CHUNK - 1, 10_000])
def test_every_user_is_encoded_at_the_same_place_of_the_same_chunk(workspace, size, users_per_batch) -> None:
    cases = load_cases(workspace, "test")
    whole, _ = cases.histories(np.arange(cases.num_users), tiny.MAX_HISTORY)
    stand_ins = -cases.num_users % CHUNK
    expected = np.concatenate([whole, np.repeat(whole[:1], stand_ins, axis=0)]).reshape(
        -1, *whole[:CHUNK].shape
    )
    encoded = []
    for rank in range(size):
        model = tiny.TwoInterests(items=tiny.make_table())
        original = model.encode_rows
        model.encode_rows = lambda h, r, original=original: (
            encoded.append(h.item_ids_BL.numpy()) or original(h, r)
        )
        rank_share(model, cases, Member(rank, size), length=5, users_per_batch=users_per_batch)
    only_stand_ins = np.repeat(whole[:1], CHUNK, axis=0)
    real = [chunk for chunk in encoded if not np.array_equal(chunk, only_stand_ins)]
    np.testing.assert_array_equal(np.stack(real), expected)


@pytest.mark.parametrize("num_users", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_shares_are_whole_chunks_in_user_order(num_users: int, size: int) -> None:
    bounds = [share(num_users, Member(rank, size)) for rank in range(size)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_users
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert all(low % 64 == 0 for low, high in bounds if high > low)
    assert max(math.ceil((high - low) / 64) for low, high in bounds) == math.ceil(
        math.ceil(num_users / 64) / size
    )


def test_mode_of_the_model_is_left_as_it_was(workspace) -> None:
    model, cases = tiny.TwoInterests(items=tiny.make_table()).train(), load_cases(workspace, "test")
    rank_share(model, cases, WorkerGroup.alone(), length=3, users_per_batch=50)
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["table", "model"])
def test_scores_that_are_not_numbers_stop_the_stage(workspace, value: float, where: str) -> None:
    model, cases = tiny.TwoInterests(items=tiny.make_table()), load_cases(workspace, "test")
    if where == "table":
        model.items.state()[1]["weight"][5, 1] = value
    else:
        model.encode_rows = lambda history, rows: UserState(torch.full((len(rows), 2, rows.shape[2]), value))
    with pytest.raises(StageError, match="not a number"):
        rank_share(model, cases, WorkerGroup.alone(), length=3, users_per_batch=50)
