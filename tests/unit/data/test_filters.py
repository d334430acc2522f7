"""Row filters, duplicates and the k-core, against hand calculations."""

import polars as pl
import pytest

from distributed_mi.core.errors import InputError
from distributed_mi.data import filters
from distributed_mi.data.config import FilterConfig, KCoreConfig


def events_of(pairs, **extra):
    """Events `(user, item)` in file order; times fall, so that file order and time order differ."""
    n = len(pairs)
    return pl.DataFrame(
        {
            "user_id": [p[0] for p in pairs],
            "item_id": [p[1] for p in pairs],
            "timestamp": [1000 * (n - i) for i in range(n)],
            "source_order": list(range(1, n + 1)),
            **extra,
        }
    )


def core(events, **config):
    """The k-core as the stage computes it, in one block. Returns item -> count, and the kept (user, item) pairs."""
    config = KCoreConfig(**config)
    least = filters.min_user_events(config)
    items = filters.core_items(
        config,
        filters.combine_counts(filters.count_items(events)),
        lambda ids: filters.combine_counts(filters.count_items(filters.keep_core(events, ids, least))),
    )
    kept = filters.keep_core(events, items["item_id"], least)
    counts = dict(zip(items["item_id"].to_list(), items["count"].to_list(), strict=True))
    return counts, sorted(zip(kept["user_id"].to_list(), kept["item_id"].to_list(), strict=True))


# Minima 2 and 2.  Users: 1 has a b, 2 has a b c, 3 has c d, 4 has e.
# Counts over all rows: a 2, b 2, c 2, d 1, e 1.
PAIRS = [("1", "a"), ("1", "b"), ("2", "a"), ("2", "b"), ("2", "c"), ("3", "c"), ("3", "d"), ("4", "e")]


def test_one_pass_does_not_count_items_again():
    # a, b, c stay. User 3 keeps only c (1 event) and goes, user 4 too. c has one event left and stays.
    counts, kept = core(events_of(PAIRS), method="one-pass", min_user_events=2, min_item_events=2)
    assert counts == {"a": 2, "b": 2, "c": 2}
    assert kept == [("1", "a"), ("1", "b"), ("2", "a"), ("2", "b"), ("2", "c")]


def test_iterative_goes_on_until_nothing_changes():
    # As above, then c (1 event) goes as well; users 1 and 2 still have a and b.
    counts, kept = core(events_of(PAIRS), method="iterative", min_user_events=2, min_item_events=2)
    assert counts == {"a": 2, "b": 2}
    assert kept == [("1", "a"), ("1", "b"), ("2", "a"), ("2", "b")]


def test_iterative_may_end_with_nothing():
    # A chain: every removal takes the next one along.
    chain = [("1", "a"), ("1", "b"), ("2", "b"), ("2", "c"), ("3", "c"), ("3", "d")]
    counts, kept = core(events_of(chain), method="iterative", min_user_events=2, min_item_events=2)
    assert (counts, kept) == ({}, [])


def test_none_keeps_everything():
    counts, kept = core(events_of(PAIRS), method="none", min_user_events=9, min_item_events=9)
    assert sum(counts.values()) == len(kept) == len(PAIRS)


def test_iterative_result_satisfies_both_minima_and_one_pass_contains_it(rng):
    pairs = [(str(u), str(i)) for u, i in zip(rng.integers(0, 60, 400), rng.zipf(1.4, 400) % 90, strict=True)]
    events = events_of(pairs)
    _, iterative = core(events, method="iterative", min_user_events=5, min_item_events=4)
    _, one_pass = core(events, method="one-pass", min_user_events=5, min_item_events=4)
    kept = pl.DataFrame(iterative, schema=["u", "i"], orient="row")
    assert kept.height > 0
    assert kept.group_by("u").len()["len"].min() >= 5
    assert kept.group_by("i").len()["len"].min() >= 4
    assert set(iterative) <= set(one_pass)


def test_counts_of_blocks_add_up_to_the_count_of_all():
    events = events_of(PAIRS)
    parts = [filters.count_items(events[:3]), filters.count_items(events[3:])]
    whole = filters.combine_counts(filters.count_items(events))
    assert filters.combine_counts(*parts).equals(whole)
    assert dict(zip(whole["item_id"], whole["first_order"], strict=True)) == {
        "a": 1,
        "b": 2,
        "c": 5,
        "d": 7,
        "e": 8,
    }


@pytest.mark.parametrize(
    ("policy", "orders"),
    # u/a at rows 1, 3, 4; times fall with the row, so the first in time is row 4. Row 2 is another item.
    [("keep", [1, 2, 3, 4]), ("first", [2, 4]), ("last", [1, 2])],
)
def test_duplicates_are_chosen_by_time(policy, orders):
    events = events_of([("u", "a"), ("u", "b"), ("u", "a"), ("u", "a")])
    assert sorted(filters.drop_duplicates(events, policy)["source_order"].to_list()) == orders


def test_row_filters_count_what_they_remove():
    events = events_of([("u", "a")] * 5, rating=[5.0, 3.0, None, 4.0, 4.0])  # times 5, 4, 3, 2, 1 seconds
    config = FilterConfig(min_rating=4, start="1970-01-01T00:00:02", end="1970-01-01T00:00:05+00:00")
    kept, removed = filters.keep_rows(events, config)
    # min_rating removes rows 2 and 3 (no rating is not enough); start removes row 5; end, exclusive, removes row 1.
    assert removed == {"min_rating": 2, "start": 1, "end": 1}
    assert kept["source_order"].to_list() == [4]


def test_a_rating_threshold_needs_a_rating():
    with pytest.raises(InputError, match=r"min_rating.*data\.reader\.rating"):
        filters.keep_rows(events_of(PAIRS), FilterConfig(min_rating=4))


def test_order_in_time_uses_position_before_file_order():
    events = events_of([("u", "a"), ("u", "b"), ("u", "c")], position=[2, 0, 1]).with_columns(
        timestamp=pl.lit(7)
    )
    assert filters.in_time_order(events)["item_id"].to_list() == ["b", "c", "a"]
    assert filters.in_time_order(events.drop("position"))["item_id"].to_list() == ["a", "b", "c"]
