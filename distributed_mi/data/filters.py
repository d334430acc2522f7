"""Which events stay: rating and time of a row, duplicates of a user, and the k-core.

Everything works on polars frames with the columns of `events` (plus `position`, `rating` where the log has them);
counting is split into a part per block of events and a combination, so that no step holds all events.
"""

from collections.abc import Callable

import polars as pl

from distributed_mi.core.errors import InputError
from distributed_mi.data.config import FilterConfig, KCoreConfig

TIME_ORDER = ("timestamp", "position", "source_order")
"""Order of a user's events: time, then the log's own position if it has one, then place in the log."""


def keep_rows(events: pl.DataFrame, config: FilterConfig) -> tuple[pl.DataFrame, dict[str, int]]:
    """Apply the filters that look at one row.

    Returns:
        The kept events and how many each filter removed (`min_rating`, `start`, `end`).

    Raises:
        InputError: `min_rating` is set and the log has no rating.
    """
    removed: dict[str, int] = {}
    conditions: list[tuple[str, pl.Expr]] = []
    if config.min_rating is not None:
        if "rating" not in events.columns:
            raise InputError(
                "data.filters.min_rating is set but the reader gives no rating; "
                "name its column (data.reader.rating) or remove min_rating"
            )
        conditions.append(("min_rating", pl.col("rating") >= config.min_rating))
    if config.start_ms is not None:
        conditions.append(("start", pl.col("timestamp") >= config.start_ms))
    if config.end_ms is not None:
        conditions.append(("end", pl.col("timestamp") < config.end_ms))
    for name, condition in conditions:
        kept = events.filter(condition)
        removed[name] = events.height - kept.height
        events = kept
    return events, removed


def in_time_order(events: pl.DataFrame, *first: str) -> pl.DataFrame:
    """Events sorted by the columns `first`, then as a user made them."""
    return events.sort([*first, *(c for c in TIME_ORDER if c in events.columns)], nulls_last=True)


def drop_duplicates(events: pl.DataFrame, policy: str) -> pl.DataFrame:
    """Keep the first or last event in time of every (user, item); `keep` changes nothing. Needs whole users."""
    if policy == "keep":
        return events
    ordered = in_time_order(events, "user_id")
    return ordered.unique(
        ["user_id", "item_id"], keep="first" if policy == "first" else "last", maintain_order=True
    )


def count_items(events: pl.DataFrame) -> pl.DataFrame:
    """`item_id`, `count` and `first_order` (the smallest `source_order`) of a block of events."""
    return events.group_by("item_id").agg(
        pl.len().cast(pl.Int64).alias("count"), pl.col("source_order").min().alias("first_order")
    )


def combine_counts(*counts: pl.DataFrame) -> pl.DataFrame:
    """Counts of several blocks as one; memory is bounded by the number of distinct items."""
    return (
        pl.concat(counts)
        .group_by("item_id")
        .agg(pl.col("count").sum(), pl.col("first_order").min())
        .sort("item_id")
    )


def keep_core(events: pl.DataFrame, item_ids: pl.Series | None, min_user_events: int) -> pl.DataFrame:
    """Events of the given items (None: of all), of users who have at least so many of them. Needs whole users."""
    if item_ids is not None:
        events = events.filter(pl.col("item_id").is_in(item_ids.implode()))
    if min_user_events > 1:
        events = events.filter(pl.len().over("user_id") >= min_user_events)
    return events


def core_items(
    config: KCoreConfig, counts: pl.DataFrame, recount: Callable[[pl.Series], pl.DataFrame]
) -> pl.DataFrame:
    """Items of the k-core, as `count_items` gives them.

    `one-pass` (ComiRec's preprocess/data.py): items with enough events over all rows, counted over all rows.
    `iterative`: items and users are dropped in turns until nothing changes; counts are those of the result.

    Args:
        config: method and minima.
        counts: counts over all rows.
        recount: item ids -> counts over the events that `keep_core` leaves with these items; a pass over the data.
    """
    if config.method == "none":
        return counts
    kept = counts.filter(pl.col("count") >= config.min_item_events)
    while config.method == "iterative" and kept.height:
        again = recount(kept["item_id"])
        survivors = again.filter(pl.col("count") >= config.min_item_events)
        settled = survivors.height == kept.height
        kept = survivors
        if settled:
            break
    return kept


def min_user_events(config: KCoreConfig) -> int:
    """Fewest events of a user under a k-core configuration."""
    return 1 if config.method == "none" else config.min_user_events
