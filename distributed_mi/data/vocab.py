"""Outside ids -> dense integers: items by popularity from 1 (0 is padding), users from 0 in split order."""

import random

import polars as pl


def index_items(counts: pl.DataFrame) -> pl.DataFrame:
    """Number the items: id 1 has the most events, ties in order of first appearance in the log.

    Args:
        counts: `item_id`, `count`, `first_order`.

    Returns:
        `item_index`, `item_id`, `count` in order of `item_index`.
    """
    ordered = counts.sort(["count", "first_order"], descending=[True, False])
    return ordered.with_row_index("item_index", offset=1).select(
        pl.col("item_index").cast(pl.Int64), "item_id", "count"
    )


def index_users(users: pl.DataFrame, shuffle_seed: int | None) -> pl.DataFrame:
    """Number the users.

    Args:
        users: `user_id` and `first_order`, the `source_order` of the user's first row in the log.
        shuffle_seed: seed of Python's `random.Random(seed).shuffle` of the users in order of first appearance, which is
            ComiRec's order for 1230; None keeps the order of first appearance.

    Returns:
        The frame with `user_index`, in its order.
    """
    ordered = users.sort("first_order")
    if shuffle_seed is not None:
        order = list(range(ordered.height))
        random.Random(shuffle_seed).shuffle(order)
        ordered = ordered[order]
    return ordered.with_row_index("user_index").with_columns(pl.col("user_index").cast(pl.Int64))
