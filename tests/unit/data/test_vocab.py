"""Numbers of items and users."""

import random

import polars as pl

from distributed_mi.data.vocab import index_items, index_users


def test_items_are_numbered_by_count_then_first_appearance():
    counts = pl.DataFrame(
        {"item_id": ["x", "y", "z", "w"], "count": [2, 5, 2, 2], "first_order": [9, 8, 3, 7]}
    )
    indexed = index_items(counts)
    assert indexed["item_id"].to_list() == ["y", "z", "w", "x"]
    assert indexed["item_index"].to_list() == [1, 2, 3, 4]


def test_users_are_shuffled_as_comirec_does_whatever_the_order_they_arrive_in():
    names = [f"u{i}" for i in range(50)]
    expected = list(names)  # ComiRec: random.seed(1230); users in order of first appearance; random.shuffle
    random.seed(1230)
    random.shuffle(expected)
    users = pl.DataFrame({"user_id": names, "first_order": list(range(0, 500, 10))})
    for arrived in (users, users.reverse(), users.sample(fraction=1, shuffle=True, seed=3)):
        indexed = index_users(arrived, 1230)
        assert indexed["user_id"].to_list() == expected
        assert indexed["user_index"].to_list() == list(range(50))


def test_users_without_shuffle_stay_in_order_of_first_appearance():
    users = pl.DataFrame({"user_id": ["b", "a", "c"], "first_order": [7, 2, 9]})
    assert index_users(users, None)["user_id"].to_list() == ["a", "b", "c"]
