import math

import numpy as np
import pytest
import torch

from distributed_mi.core.errors import StageError
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.evaluation.protocol import Cases, load_cases
from distributed_mi.evaluation.topk import merge_interests, rank_share
from distributed_mi.models.base import HistoryBatch
from tests.unit.evaluation import tiny


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
        count = [0]

        def counted(queries, k, model=model, count=count, original=model.items.topk):
            count[0] += 1
            return original(queries, k)

        monkeypatch.setattr(model.items, "topk", counted)
        rank_share(model, cases, Member(rank, size), length=5, users_per_batch=4)
        calls.append(count[0])
    assert len(set(calls)) == 1
    assert calls[0] == math.ceil(math.ceil(cases.num_users / size) / 4)


def test_merge_keeps_the_best_score_and_breaks_ties_by_id() -> None:
    # Item 5 is in both lists (3.0 wins, interest 1); 2 and 9 tie at 2.0, smaller id first; 4 ties with itself.
    scores = np.array([[[2.0, 1.5, 1.0], [3.0, 2.0, 1.0]]], dtype=np.float32)
    ids = np.array([[[9, 5, 4], [5, 2, 4]]])
    merged = merge_interests(scores, ids, 6)
    assert merged.ids_BN.tolist() == [[5, 2, 9, 4, 0, 0]]
    assert merged.interests_BN.tolist() == [[1, 1, 0, 0, -1, -1]]
    assert merged.scores_BN[0, :4].tolist() == [3.0, 2.0, 2.0, 1.0]
    without = merge_interests(scores, ids, 2, seen=(np.array([0]), np.array([5])))
    assert without.ids_BN.tolist() == [[2, 9]]


def test_merge_never_recommends_padding() -> None:
    merged = merge_interests(np.array([[[9.0, 1.0]]], np.float32), np.array([[[0, 3]]]), 2)
    assert merged.ids_BN.tolist() == [[3, 0]]
    assert merged.interests_BN.tolist() == [[0, -1]]


def test_mode_of_the_model_is_left_as_it_was(workspace) -> None:
    model, cases = tiny.TwoInterests(items=tiny.make_table()).train(), load_cases(workspace, "test")
    rank_share(model, cases, WorkerGroup.alone(), length=3, users_per_batch=50)
    assert model.training


def test_scores_that_are_not_numbers_stop_the_stage(workspace, monkeypatch) -> None:
    model, cases = tiny.TwoInterests(items=tiny.make_table()), load_cases(workspace, "test")
    monkeypatch.setattr(
        model.items, "topk", lambda q, k: (torch.full((len(q), k), torch.nan), torch.ones(len(q), k).long())
    )
    with pytest.raises(StageError, match="not a number"):
        rank_share(model, cases, WorkerGroup.alone(), length=3, users_per_batch=50)
