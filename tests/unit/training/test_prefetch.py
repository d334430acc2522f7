"""Batches made ahead, by a thread or in blocks: the same numbers, errors in their place, any order of steps, no thread
left."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_mi.training.prefetch import InBlocks, Prefetched
from tests.unit.training.toys import build, config


class Source:
    """Batches that are numbers; remembers what was asked for and by which thread."""

    num_users = 3

    def __init__(self, fails_at: int = -1, seconds: float = 0.0) -> None:
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.fails_at, self.seconds = fails_at, seconds

    def __call__(self, step: int) -> Any:
        self.asked.append(step)
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if step == self.fails_at:
            raise ValueError(f"step {step} cannot be made")
        return [10 * step]


def test_steps_come_in_order_from_another_thread_and_only_so_far_ahead() -> None:
    source = Source()
    ready = Prefetched(source, 2)
    assert source.asked == []
    assert [ready(step) for step in range(5, 9)] == [[50], [60], [70], [80]]
    deadline = time.monotonic() + 5
    while len(source.asked) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert source.asked == [5, 6, 7, 8, 9, 10, 11]  # two in the queue, one in the hand of the thread
    ready.close()
    assert source.threads == {"train batches"}
    assert ready.num_users == 3


def test_any_order_of_steps_is_answered_rightly() -> None:
    ready = Prefetched(Source(), 3)
    assert [ready(step) for step in (4, 5, 2, 3, 3, 9)] == [[40], [50], [20], [30], [30], [90]]
    ready.close()


def test_an_error_is_raised_by_the_call_for_its_step_and_the_thread_is_gone() -> None:
    before = set(threading.enumerate())
    ready = Prefetched(Source(fails_at=2), 4)
    assert [ready(0), ready(1)] == [[0], [10]]
    with pytest.raises(ValueError, match="step 2 cannot be made"):
        ready(2)
    assert set(threading.enumerate()) <= before
    with pytest.raises(ValueError, match="step 2 cannot be made"):
        ready(2)  # again, from a new thread


def test_closing_ends_a_thread_that_waits_for_room() -> None:
    before = set(threading.enumerate())
    ready = Prefetched(Source(), 1)
    ready(0)
    ready.close()
    ready.close()
    assert set(threading.enumerate()) <= before
    assert ready(1) == [10]
    ready.close()


def test_blocks_are_made_at_once_by_the_thread_that_asks() -> None:
    source = Source()
    ready = InBlocks(source, 3)
    assert (ready(5), source.asked) == ([50], [5, 6, 7])
    assert ([ready(6), ready(7)], source.asked) == ([[60], [70]], [5, 6, 7])
    assert [ready(step) for step in (8, 2, 3, 3, 9)] == [[80], [20], [30], [30], [90]]
    assert source.threads == {threading.current_thread().name}
    assert ready.num_users == 3


@pytest.mark.parametrize("ahead", [InBlocks, Prefetched])
def test_the_next_batches_can_be_looked_at_before_they_are_taken(ahead: type[InBlocks | Prefetched]) -> None:
    ready = ahead(Source(fails_at=6), 2)
    assert (ready(3), ready.peek(4), ready.peek(4), ready(4), ready.peek(5)) == ([30], [40], [40], [40], [50])
    assert (ready.peek(1), ready(5)) == ([10], [50])  # another order begins anew
    with pytest.raises(ValueError, match="step 6 cannot be made"):
        ready.peek(6)
    ready.close()


def test_an_error_in_a_block_is_raised_by_the_call_for_its_step() -> None:
    ready = InBlocks(Source(fails_at=2), 4)
    assert [ready(0), ready(1)] == [[0], [10]]
    for _ in range(2):
        with pytest.raises(ValueError, match="step 2 cannot be made"):
            ready(2)
    assert ready(3) == [30]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_training_is_the_same_bit_for_bit_with_and_without(tmp_path: Path, depth: int) -> None:
    ends = []
    before = set(threading.enumerate())
    for prefetch in (0, depth):
        trainer, run = build(config(prefetch=prefetch), tmp_path / str(prefetch))
        trainer.train()
        ends.append(run.engine.dense_state() | run.table.state()[1])
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name
    assert set(threading.enumerate()) <= before
