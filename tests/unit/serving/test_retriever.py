import json

import numpy as np
import pytest
import torch

from distributed_mi.core.errors import (
    CheckpointError,
    InputError,
    UnknownNameError,
    UnknownUserError,
    WorkspaceError,
)
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.evaluation.protocol import load_cases
from distributed_mi.evaluation.topk import rank_share
from distributed_mi.models.base import HistoryBatch
from distributed_mi.serving.retriever import Retriever, render
from tests.unit.evaluation import tiny


def brute_force(history: list[int], *, exclude_seen: bool) -> list[int]:
    model = tiny.TwoInterests(items=tiny.make_table())
    ids = torch.tensor([history[-tiny.MAX_HISTORY :]])
    vectors = model.items.state()[1]["weight"].detach()
    scores = (model.encode(HistoryBatch(ids, ids > 0)).interests_BKD[0].detach() @ vectors.T).amax(0).numpy()
    seen = set(history) if exclude_seen else set()
    return [i for i in np.argsort(-scores, kind="stable").tolist() if i and i not in seen]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("user_id", ["train-3", "valid-2", "test-0"])
def test_known_users_of_any_split_get_the_exact_list(retriever, workspace, user_id, exclude_seen) -> None:
    split = {"train": "train", "valid": "validation", "test": "test"}[user_id.split("-")[0]]
    rows = workspace.stage("prepare").read(f"sequences/{split}", "sequences").to_pylist()
    history = next(r["item_indices"] for r in rows if r["user_id"] == user_id)
    answer = retriever.recommend(user_id=user_id, top=6, exclude_seen=exclude_seen)
    assert [i.item_index for i in answer.items] == brute_force(history, exclude_seen=exclude_seen)[:6]
    assert [i.item_index for i in answer.history] == history  # the labels too, newest last
    assert (answer.split, answer.source) == (split, "model")
    assert [i.score for i in answer.items] == sorted((i.score for i in answer.items), reverse=True)


def test_agrees_with_the_evaluation(retriever, workspace) -> None:
    cases = load_cases(workspace, "test")
    lists = rank_share(retriever.model, cases, WorkerGroup.alone(), length=5, users_per_batch=9)
    for u in range(cases.num_users):
        history = cases.sequences.history(cases.rows[u]).tolist()
        found = retriever.rank(history, 5, exclude_seen=False)
        assert [i.item_index for i in found] == lists[u].tolist()


def test_item_ids_are_a_history_and_unknown_ones_are_reported(retriever) -> None:
    answer = retriever.recommend(item_ids=["item-3", "nonsense", "item-8"], top=4)
    assert [i.item_index for i in answer.items] == brute_force([3, 8], exclude_seen=True)[:4]
    assert answer.unknown_items == ["nonsense"]
    assert answer.items[0].item_id == f"item-{answer.items[0].item_index}"
    assert "nonsense" in render(answer)


@pytest.mark.parametrize("item_ids", [[], ["nonsense", "other"]])
def test_a_history_without_known_items_gets_the_popular_ones(retriever, item_ids) -> None:
    answer = retriever.recommend(item_ids=item_ids, top=3)
    assert answer.source == "popularity"
    assert [i.item_index for i in answer.items] == [7, 1, 2]  # item 7 has 99 events, then 29, 28
    assert [i.score for i in answer.items] == [99, 29, 28]
    assert all(i.interest is None for i in answer.items)
    assert "most popular" in render(answer)


def test_unknown_user_names_near_ones(retriever) -> None:
    with pytest.raises(UnknownUserError, match=r'unknown user "trian-3".*Near: .*train-3') as caught:
        retriever.recommend(user_id="trian-3")
    assert "--items" in str(caught.value)


def test_longer_lists_than_the_catalogue_end_early(retriever) -> None:
    answer = retriever.recommend(item_ids=["item-3"], top=100)
    assert sorted(i.item_index for i in answer.items) == [i for i in range(1, tiny.NUM_ITEMS + 1) if i != 3]


def test_bad_requests(retriever, workspace) -> None:
    with pytest.raises(InputError, match="either a user id or item ids"):
        retriever.recommend()
    with pytest.raises(InputError, match="either a user id or item ids"):
        retriever.recommend(user_id="test-0", item_ids=["item-1"])
    with pytest.raises(InputError, match="top is 0"):
        retriever.recommend(user_id="test-0", top=0)
    with pytest.raises(UnknownNameError, match=r"Known: .*exact"):
        Retriever.open(workspace, "two", tiny.load, index="exat")


def test_opening_needs_a_matching_run(workspace, monkeypatch) -> None:
    with pytest.raises(WorkspaceError, match="distributed-mi train"):
        Retriever.open(workspace, "missing", tiny.load)
    small = tiny.TwoInterests(items=tiny.make_table(num_items=9))
    with pytest.raises(CheckpointError, match=r"9 items, the catalogue 30"):
        Retriever.open(workspace, "two", lambda fs, path: small)
    tiny.prepare(workspace, test_users=3)
    with pytest.raises(WorkspaceError, match="trained on other data"):
        Retriever.open(workspace, "two", tiny.load)


def test_json_is_complete_and_text_shows_the_list(retriever) -> None:
    answer = retriever.recommend(user_id="test-0", top=3)
    content = json.loads(render(answer, as_json=True))
    assert content["user_id"] == "test-0"
    assert [i["item_index"] for i in content["items"]] == [i.item_index for i in answer.items]
    text = render(answer)
    assert all(i.title in text and i.item_id in text for i in answer.items)
    assert "user test-0 (test split)" in text


def test_a_user_of_several_splits_has_the_longest_sequence(tmp_path) -> None:
    from distributed_mi.core.artifacts import Workspace
    from distributed_mi.serving.catalogue import find_user

    workspace = Workspace(str(tmp_path))
    tables = {
        "sequences/train": ("sequences", tiny.sequences(0, [([1, 2], 2)], "u")),
        "sequences/validation": ("sequences", tiny.sequences(1, [([1, 2, 3], 2)], "u")),
        "sequences/test": ("sequences", tiny.sequences(2, [([1, 2, 3, 4], 3)], "u")),
    }
    tiny.commit(workspace, "prepare", tables)
    user = find_user(workspace, "u0")
    assert (user.items, user.split, user.train_user_index) == ([1, 2, 3, 4], "test", 0)
