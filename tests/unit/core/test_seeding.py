"""Named random streams."""

import subprocess
import sys

import numpy as np
import pytest

from distributed_mi.core.seeding import stream, stream_key


def draw(seed: int, name: str, *counters: int) -> np.ndarray:
    return stream(seed, name, *counters).integers(0, 2**62, size=256)


def test_same_place_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    first = draw(1, "negatives", 1000)
    draw(1, "negatives", 999)
    assert np.array_equal(draw(1, "negatives", 1000), first)


def test_another_process_draws_the_same_numbers() -> None:
    code = (
        "from distributed_mi.core.seeding import stream; print(stream(3, 'users', 7, 1).integers(0, 2**62))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == stream(3, "users", 7, 1).integers(0, 2**62)


@pytest.mark.parametrize(
    "other",
    [(2, "negatives", 5), (1, "users", 5), (1, "negatives", 6), (1, "negatives"), (1, "negatives", 5, 0)],
)
def test_any_other_seed_name_or_counter_gives_other_numbers(other: tuple) -> None:
    assert not np.intersect1d(draw(1, "negatives", 5), draw(*other)).size


def test_streams_are_uncorrelated() -> None:
    """Of 64 streams x 4,096 draws every pairwise correlation stays under 6 / sqrt(4,096)."""
    values = np.stack([stream(0, "name", i).standard_normal(4096) for i in range(64)])
    correlation = np.corrcoef(values) - np.eye(64)
    assert np.abs(correlation).max() < 6 / np.sqrt(4096)


def test_seed_and_name_are_not_run_together() -> None:
    assert len({stream_key(1, "1/x"), stream_key(11, "x"), stream_key(1, "x"), stream_key(11, "/x")}) == 4
