"""The language side of a batch: who inherits what, padding, and what is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from distributed_mi.core.artifacts import StageKey, Workspace
from distributed_mi.core.errors import StageError, WorkspaceError
from distributed_mi.core.schema import TABLES
from distributed_mi.training.semantics import Semantics
from tests.unit.training.workspaces import NUM_ITEMS, NUM_USERS, TEXT_DIM, add_semantics, make_prepared


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = make_prepared(tmp_path)
    add_semantics(workspace)
    return workspace


def replace(workspace: Workspace, stage: str, name: str, table: pa.Table) -> None:
    run = workspace.stage(stage).open(StageKey(stage, {}, {"made": "again"}))
    run.write_table(f"{name}/part-0.parquet", table, name)
    run.commit(rows={name: table.num_rows})


def read(workspace: Workspace) -> Semantics:
    return Semantics.read(workspace, num_rows=NUM_ITEMS + 1, user_index_U=np.arange(NUM_USERS))


def test_users_inherit_the_interests_of_their_exemplar_in_order(workspace: Workspace) -> None:
    """Even users follow exemplar 0 (one interest, ones), odd users exemplar 1 (twos, then threes)."""
    batch = read(workspace).batch(torch.tensor([4, 7]), torch.tensor([3, 59]), torch.tensor([1, 2, 2]))
    ones = [1.0] * TEXT_DIM
    zero = [0.0] * TEXT_DIM
    expected = [[ones, zero], [[2.0] * TEXT_DIM, [3.0] * TEXT_DIM]]
    assert batch.interests_BMT.tolist() == expected
    assert batch.interests_mask_BM.tolist() == [[True, False], [True, True]]
    vectors = workspace.stage("embed").read("item_vectors", "item_vectors").column("vector").to_pylist()
    torch.testing.assert_close(batch.target_text_BT, torch.tensor([vectors[2], vectors[58]]))
    torch.testing.assert_close(batch.negative_text_NT, torch.tensor([vectors[0], vectors[1], vectors[1]]))


def test_the_vector_of_an_item_without_text_is_zero(workspace: Workspace) -> None:
    """embed gives such an item a vector, that of its id, which says nothing."""
    semantics = read(workspace)
    batch = semantics.batch(torch.tensor([4, 7]), torch.tensor([60, 1]), torch.tensor([60, 2]))
    assert batch.target_text_BT.any(dim=1).tolist() == [False, True]
    assert batch.negative_text_NT.any(dim=1).tolist() == [False, True]
    assert semantics.item_text_VT.any(dim=1).tolist() == [False, *[True] * 59, False]


def test_padding_to_the_largest_of_the_batch_only(workspace: Workspace) -> None:
    batch = read(workspace).batch(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([1]))
    assert batch.interests_BMT.shape == (2, 1, TEXT_DIM)


def test_users_of_an_exemplar_without_interests_get_the_mean_and_are_counted(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    table = pa.table(
        {"user_index": [1, 1], "interest_index": [0, 1], "vector": [[2.0] * TEXT_DIM, [4.0] * TEXT_DIM]},
        schema=TABLES["interest_vectors"],
    )
    replace(workspace, "interests", "interest_vectors", table)
    batch = read(workspace).batch(torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
    assert batch.interests_BMT.tolist() == [[[3.0] * TEXT_DIM]]
    assert "40 of 80 training users" in caplog.text


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no complete stage embed"):
        read(make_prepared(tmp_path))


def test_an_item_without_vector_is_refused(workspace: Workspace) -> None:
    items = workspace.stage("embed").read("item_vectors", "item_vectors").slice(1)
    replace(workspace, "embed", "item_vectors", items)
    with pytest.raises(StageError, match=r"1 items have no text vector \(first: item_index 1\)"):
        read(workspace)


def test_a_user_without_exemplar_is_refused(workspace: Workspace) -> None:
    assignment = workspace.stage("exemplars").read("assignment", "assignment").slice(0, NUM_USERS - 1)
    replace(workspace, "exemplars", "assignment", assignment)
    with pytest.raises(StageError, match=r"1 training users have no exemplar \(first: user_index 79\)"):
        read(workspace)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0] * 5] * 2, "interest vectors have width 5, item vectors 6"),
        ([[1.0] * 6, [1.0] * 5], "different widths"),
    ],
)
def test_vectors_of_another_width_are_refused(
    workspace: Workspace, vectors: list[list[float]], message: str
) -> None:
    table = pa.table(
        {"user_index": [0, 1], "interest_index": [0, 0], "vector": vectors}, schema=TABLES["interest_vectors"]
    )
    replace(workspace, "interests", "interest_vectors", table)
    with pytest.raises(StageError, match=message):
        read(workspace)
