"""Sequences and the three splits, against hand calculations."""

import polars as pl
import pytest

from distributed_mi.data.config import SplitConfig
from distributed_mi.data.sequences import build_sequences
from distributed_mi.data.split import (
    SplitPlan,
    bucket_ms,
    split_sequences,
    temporal_cuts,
    time_histogram,
)


def sequences_of(*lengths, step_ms=10):
    """User u has so many events, at u, u + 10, u + 20, ... milliseconds, items 1, 2, 3, ..."""
    return pl.DataFrame(
        {
            "user_index": list(range(len(lengths))),
            "user_id": [f"u{n}" for n in range(len(lengths))],
            "item_indices": [list(range(1, n + 1)) for n in lengths],
            "timestamps": [[u + step_ms * i for i in range(n)] for u, n in enumerate(lengths)],
        }
    )


def rows(frame):
    return [(r["user_index"], len(r["item_indices"]), r["num_history"]) for r in frame.to_dicts()]


@pytest.mark.parametrize(
    ("num_users", "cuts"),
    # model-facts 2.1: floor(0.8 n), floor(0.9 n) - floor(0.8 n), the rest
    [
        (22_363, (17_890, 2_236, 2_237)),
        (14_681, (11_744, 1_468, 1_469)),
        (4_905, (3_924, 490, 491)),
        (10, (8, 1, 1)),
    ],
)
def test_by_user_sizes_are_those_of_the_paper(num_users, cuts):
    first, second = SplitPlan(SplitConfig(), num_users).user_cuts
    assert (first, second - first, num_users - second) == cuts


def test_shares_add_up_without_rounding_noise():
    # 0.7 + 0.1 is 0.7999999999999999 in binary; eight of ten users are meant
    assert SplitPlan(SplitConfig(train_fraction=0.7, validation_fraction=0.1), 10).user_cuts == (7, 8)


def test_by_user_history_is_the_floor_of_four_fifths():
    # model-facts 4.4: n = 5 -> 4 inputs; 6..9 -> 4, 5, 6, 7; 10 -> 8; one event leaves nothing to read
    lengths = (3, 3, 5, 6, 7, 8, 9, 10, 1)
    split = split_sequences(sequences_of(*lengths), SplitPlan(SplitConfig(train_fraction=0.25), 9))
    assert rows(split["train"]) == [(0, 3, 3), (1, 3, 3)]
    assert rows(split["validation"]) == [(2, 5, 4)]
    assert rows(split["test"]) == [(3, 6, 4), (4, 7, 5), (5, 8, 6), (6, 9, 7), (7, 10, 8), (8, 1, 0)]


def test_leave_one_out_holds_back_two_events_and_trains_on_short_users():
    split = split_sequences(sequences_of(4, 2, 3, 1), SplitPlan(SplitConfig(name="leave-one-out"), 4))
    assert rows(split["train"]) == [(0, 2, 2), (1, 2, 2), (2, 1, 1), (3, 1, 1)]
    assert rows(split["validation"]) == [(0, 3, 2), (2, 2, 1)]
    assert rows(split["test"]) == [(0, 4, 3), (2, 3, 2)]
    assert split["test"]["item_indices"].to_list() == [[1, 2, 3, 4], [1, 2, 3]]


def test_global_temporal_cuts_every_user_at_the_same_times():
    # user 0 at 0 10 20 30, user 1 at 1 11, user 2 at 2 12 22; cuts at 11 and 21
    plan = SplitPlan(SplitConfig(name="global-temporal"), 3, (11, 21))
    split = split_sequences(sequences_of(4, 2, 3), plan)
    assert rows(split["train"]) == [(0, 2, 2), (1, 1, 1), (2, 1, 1)]  # before 11: 0 10 | 1 | 2
    assert rows(split["validation"]) == [(0, 3, 2), (1, 2, 1), (2, 2, 1)]  # labels 20 | 11 | 12
    assert rows(split["test"]) == [(0, 4, 3), (2, 3, 2)]  # labels 30 | - | 22
    assert split["train"].columns == split["test"].columns


def test_temporal_cuts_are_where_the_shares_are_reached():
    events = pl.DataFrame({"timestamp": list(range(100, 200))})
    width = bucket_ms(100, 199)
    parts = [time_histogram(events[:37], 100, width), time_histogram(events[37:], 100, width)]
    config = SplitConfig(name="global-temporal", train_fraction=0.5, validation_fraction=0.2)
    assert width == 1
    assert temporal_cuts(pl.concat(parts), 100, width, config) == (150, 170)


def test_buckets_cover_a_long_span():
    first, last = 0, 20 * 365 * 86_400_000
    width = bucket_ms(first, last)
    assert (last - first) // width < 1 << 16
    assert (last - first) // (width - 1) >= (1 << 16) - 1


def test_sequences_order_by_time_position_and_file_and_drop_what_is_not_kept():
    events = pl.DataFrame(
        {
            "user_id": ["a", "b", "a", "a", "c"],
            "item_id": ["x", "x", "y", "gone", "x"],
            "timestamp": [5, 1, 5, 1, 1],
            "position": [1, 0, 0, 0, 0],
            "source_order": [1, 2, 3, 4, 5],
        }
    )
    users = pl.DataFrame({"user_id": ["b", "a"], "user_index": [0, 1]})
    items = pl.DataFrame({"item_id": ["x", "y"], "item_index": [1, 2]})
    assert build_sequences(events, users, items).to_dicts() == [
        {"user_index": 0, "user_id": "b", "item_indices": [1], "timestamps": [1]},
        {"user_index": 1, "user_id": "a", "item_indices": [2, 1], "timestamps": [5, 5]},
    ]
