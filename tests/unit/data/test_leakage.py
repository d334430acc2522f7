"""The leakage check passes on real splits and fails on planted leaks."""

import polars as pl
import pytest

from distributed_mi.core.errors import LeakageError
from distributed_mi.data.config import SPLITS, SplitConfig
from distributed_mi.data.leakage import LeakageCounts, count_leaks, first_label_ms, require_clean, verdict
from distributed_mi.data.split import SplitPlan, split_sequences


def split_of(name, rng, num_users=40):
    lengths = rng.integers(3, 12, num_users)
    sequences = pl.DataFrame(
        {
            "user_index": list(range(num_users)),
            "user_id": [f"u{n}" for n in range(num_users)],
            "item_indices": [rng.integers(1, 6, n).tolist() for n in lengths],
            "timestamps": [sorted(rng.integers(0, 50, n).tolist()) for n in lengths],  # many equal events
        }
    )
    parts = split_sequences(sequences, SplitPlan(SplitConfig(name=name), num_users, (25, 35)))
    return [parts[s] for s in SPLITS]


@pytest.mark.parametrize("name", ["by-user", "leave-one-out", "global-temporal"])
def test_real_splits_pass(name, rng):
    train, *evaluation = split_of(name, rng)
    counts = count_leaks(train, *evaluation)
    expected = sum(int((e["item_indices"].list.len() - e["num_history"]).sum()) for e in evaluation)
    assert counts.label_events == expected > 0
    found = require_clean(counts, name)
    assert found["passed"]
    assert found["label_events_in_train"] == 0
    assert (found["shared_users"] == 0) == (name == "by-user")


@pytest.mark.parametrize("name", ["by-user", "leave-one-out", "global-temporal"])
def test_training_on_an_evaluation_users_whole_sequence_is_found(name, rng):
    train, validation, test = split_of(name, rng)
    leaked = test[2:3]
    train = pl.concat([train.filter(pl.col("user_id") != leaked["user_id"][0]), leaked])
    counts = count_leaks(train, validation, test)
    assert counts.label_events_in_train >= len(leaked["item_indices"][0]) - leaked["num_history"][0] > 0
    with pytest.raises(LeakageError, match=rf"FAILED for {name}: [1-9][\d,]* of "):
        require_clean(counts, name)


def test_by_user_refuses_a_shared_user_even_without_label_events(rng):
    train, validation, test = split_of("by-user", rng)
    history_only = test[:1].with_columns(
        pl.col("item_indices", "timestamps").list.head(pl.col("num_history"))
    )
    counts = count_leaks(pl.concat([train, history_only]), validation, test)
    assert (counts.label_events_in_train, counts.shared_users) == (0, 1)
    with pytest.raises(LeakageError):
        require_clean(counts, "by-user")


def test_global_temporal_refuses_training_events_after_the_first_label(rng):
    train, validation, test = split_of("global-temporal", rng)
    late = train[:1].with_columns(
        user_id=pl.lit("nobody else"), timestamps=pl.lit([40, 41]), item_indices=pl.lit([1, 2])
    )
    counts = count_leaks(pl.concat([train, late]), validation, test)
    assert (counts.future_train_events, counts.label_events_in_train) == (2, 0)
    with pytest.raises(LeakageError, match="2 training events are not before the first label"):
        require_clean(counts, "global-temporal")


def test_identical_events_are_told_apart_by_number():
    # Item 1 three times at time 5: two in the history, one is the label. Training on two is right, on three is a leak.
    test = pl.DataFrame(
        {
            "user_index": [0],
            "user_id": ["u"],
            "item_indices": [[1, 1, 1]],
            "timestamps": [[5, 5, 5]],
            "num_history": [2],
        }
    )
    right = test.with_columns(pl.col("item_indices", "timestamps").list.head(2))
    assert count_leaks(right, test).label_events_in_train == 0
    assert count_leaks(test, test).label_events_in_train == 1


def test_counts_of_partitions_add_up(rng):
    train, *evaluation = split_of("leave-one-out", rng)
    even = pl.col("user_index") % 2 == 0
    first = first_label_ms(*evaluation)
    parts = [
        count_leaks(train.filter(where), *(e.filter(where) for e in evaluation), first_label=first)
        for where in (even, ~even)
    ]
    assert parts[0] + parts[1] == count_leaks(train, *evaluation)


def test_nothing_to_evaluate_is_no_leak(rng):
    train, validation, test = split_of("by-user", rng)
    counts = count_leaks(train, validation.clear(), test.clear())
    assert counts == LeakageCounts()
    assert verdict(counts, "by-user")["text"].startswith("Leakage check passed for by-user: 0 of 0")
