from pathlib import Path

import numpy as np
import pytest

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import StageError
from distributed_mi.data.batches import Sequences
from distributed_mi.evaluation import protocol
from tests.unit.evaluation import tiny


def test_histories_labels_and_seen_by_hand() -> None:
    sequences = Sequences.from_table(
        tiny.sequences(0, [([1, 2, 3, 4, 5], 4), ([9], 1), ([6, 6, 8, 9], 2)], "u")
    )
    cases = protocol.Cases(sequences, np.array([0, 2]))
    assert (cases.num_users, cases.skipped_users) == (2, 1)
    histories, mask = cases.histories(np.array([1, 0]), 3)
    assert histories.tolist() == [[0, 6, 6], [2, 3, 4]]  # left-padded; the newest 3 of 1 2 3 4
    assert mask.tolist() == [[False, True, True], [True, True, True]]
    labels, offsets = cases.labels
    assert labels.tolist() == [5, 8, 9]
    assert offsets.tolist() == [0, 1, 3]
    users, items = cases.seen(np.array([1, 0]))
    assert users.tolist() == [0, 0, 1, 1, 1, 1]
    assert items.tolist() == [6, 6, 1, 2, 3, 4]


def test_users_without_history_or_label_are_skipped_and_counted(workspace) -> None:
    cases = protocol.load_cases(workspace, "test")
    assert cases.num_users == 25
    assert cases.skipped_users == 2
    assert [cases.sequences.user_ids[r] for r in cases.rows] == [f"test-{i}" for i in range(25)]


def test_a_split_without_usable_users_is_an_error(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    tiny.commit(workspace, "prepare", {"sequences/test": ("sequences", tiny.sequences(0, [([1], 0)], "u"))})
    with pytest.raises(StageError, match="no user of the test split"):
        protocol.load_cases(workspace, "test")


def test_catalogue_codes_equal_sets_alike(workspace) -> None:
    info = protocol.load_catalogue(workspace)
    assert info.num_items == tiny.NUM_ITEMS
    assert info.categories[0] == -1
    assert info.categories[1] == info.categories[5] != info.categories[2]
    assert len(set(info.categories[1:])) == 4


def test_description_names_the_split_and_the_seen_items_rule(workspace) -> None:
    text = protocol.describe(workspace.stage("prepare").require(), exclude_seen=False)
    assert (
        text == "by-user 8:1:1, first 80% of a user's events as history; full catalogue, history items kept"
    )
