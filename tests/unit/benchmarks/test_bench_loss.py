"""The loss benchmark: its sides compute the same, its commands run from end to end on small sizes."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_loss


@pytest.mark.parametrize("name", bench_loss.LOSSES)
def test_both_sides_have_the_same_loss_and_gradients(name: str) -> None:
    sizes = argparse.Namespace(items=40, dim=8, interests=3, negatives=12, seed=1)
    sides = bench_loss.Sides(bench_loss.LOSSES[name], sizes, num_users=9)
    sides.check()
    gradients = []
    for loss in (sides.our_loss(), sides.torch_loss()):
        sides.interests.grad = None
        loss.backward()
        assert sides.interests.grad is not None
        gradients.append(sides.interests.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_two_sides_that_differ_are_not_timed() -> None:
    sizes = argparse.Namespace(items=40, dim=8, interests=3, negatives=12, seed=1)
    sides = bench_loss.Sides(bench_loss.LOSSES["bpr"], sizes, num_users=9)
    sides.table.weight.data.mul_(2)
    with pytest.raises(AssertionError):
        sides.check()


def test_speed_writes_a_row_for_each_loss_and_batch(tmp_path: Path) -> None:
    command = "speed --users 4 6 --items 30 --dim 4 --negatives 5 --repeats 3 --losses bpr in_batch --results"
    bench_loss.main([*command.split(), str(tmp_path)])
    (path,) = tmp_path.glob("loss_speed_*.json")
    found = json.loads(path.read_text())
    assert [(s["loss"], s["users"]) for s in found["samples"]] == [
        ("bpr", 4),
        ("in_batch", 4),
        ("bpr", 6),
        ("in_batch", 6),
    ]


def test_memory_counts_the_gradient_of_every_row(tmp_path: Path) -> None:
    command = (
        "memory --users 16 --items 200000 --dense-items 0 --dim 16 --repeats 1 --choices argmax --results"
    )
    bench_loss.main([*command.split(), str(tmp_path)])
    (path,) = tmp_path.glob("loss_memory_*.json")
    (sample,) = json.loads(path.read_text())["samples"]
    buffer = 200_001 * 16 * 4
    assert buffer < sample["extra_bytes"] < buffer + 20e6
