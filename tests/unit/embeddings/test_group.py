"""A group of one worker; tests/parity/test_sharded_table.py runs the same methods on several."""

import torch

from distributed_mi.embeddings.group import WorkerGroup


def test_alone_is_the_identity() -> None:
    group = WorkerGroup.alone()
    x = torch.arange(6.0, requires_grad=True).view(3, 2)
    assert (group.rank, group.size, group.device.type) == (0, 1, "cpu")
    assert group.gather_with_grad(x) is x
    assert torch.equal(group.all_reduce_sum(x), x)
    assert [p.tolist() for p in group.all_gather_rows(x)] == [x.tolist()]
    rows, counts = group.all_to_all_rows(x, [3])
    assert rows.tolist() == x.tolist()
    assert counts == [3]
    assert group.row_offset(5) == 0
    group.barrier()


def test_alone_json_goes_through_json() -> None:
    group = WorkerGroup.alone()
    assert group.broadcast_json({"a": (1, 2)}) == {"a": [1, 2]}
    assert group.all_gather_json("x") == ["x"]


def test_all_reduce_leaves_its_argument_alone() -> None:
    x = torch.ones(2)
    total = WorkerGroup.alone().all_reduce_sum(x)
    total += 1
    assert x.tolist() == [1.0, 1.0]
