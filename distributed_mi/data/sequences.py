"""Events -> one row per user, items in the order of time."""

import polars as pl

from distributed_mi.data.filters import in_time_order

SEQUENCE_COLUMNS = ("user_index", "user_id", "item_indices", "timestamps")
"""Columns of a whole sequence; a split adds `num_history`."""


def build_sequences(events: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Join the ids and gather each user's events; needs whole users.

    Args:
        events: kept events, any order.
        users: `user_id`, `user_index`; others are dropped.
        items: `item_id`, `item_index`; others are dropped.

    Returns:
        `SEQUENCE_COLUMNS`, ordered by `user_index`.
    """
    numbered = events.join(users.select("user_id", "user_index"), on="user_id").join(
        items.select("item_id", "item_index"), on="item_id"
    )
    return (
        in_time_order(numbered, "user_index")
        .group_by("user_index", maintain_order=True)
        .agg(
            pl.col("user_id").first(),
            pl.col("item_index").alias("item_indices"),
            pl.col("timestamp").alias("timestamps"),
        )
    )
