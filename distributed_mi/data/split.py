"""Sequences -> training, validation and test rows.

In an evaluation row `item_indices[:num_history]` may be read and the rest are labels. Training rows have no labels.
"""

from dataclasses import dataclass

import polars as pl

from distributed_mi.data.config import SPLITS, SplitConfig

HISTOGRAM_BUCKETS = 1 << 16
"""Equal pieces of the log's time span that `temporal_cuts` tells apart; bounds the driver's memory."""


@dataclass(frozen=True)
class SplitPlan:
    """What every partition needs to know to split its users, decided once from totals.

    Args:
        config: protocol and fractions.
        num_users: users kept in all; by-user cuts `user_index` at shares of it.
        cuts_ms: global-temporal: first time of validation and of test, milliseconds.
    """

    config: SplitConfig
    num_users: int
    cuts_ms: tuple[int, int] = (0, 0)

    @property
    def user_cuts(self) -> tuple[int, int]:
        """First `user_index` of validation and of test: floors, as in ComiRec."""
        first, second = cumulative_shares(self.config)
        return int(first * self.num_users), int(second * self.num_users)


def cumulative_shares(config: SplitConfig) -> tuple[float, float]:
    """Share of training, and of training and validation together, without the rounding noise of the sum."""
    return config.train_fraction, round(config.train_fraction + config.validation_fraction, 12)


def split_sequences(sequences: pl.DataFrame, plan: SplitPlan) -> dict[str, pl.DataFrame]:
    """Rows of the three splits, each ordered by `user_index`, with `num_history`.

    Args:
        sequences: `user_index`, `user_id`, `item_indices`, `timestamps`, in time order inside.
        plan: protocol and cuts.
    """
    split = {
        "by-user": _by_user,
        "leave-one-out": _leave_one_out,
        "global-temporal": _global_temporal,
    }[plan.config.name]
    parts = split(sequences, plan)
    return dict(zip(SPLITS, (p.sort("user_index") for p in parts), strict=True))


def _by_user(sequences: pl.DataFrame, plan: SplitPlan) -> tuple[pl.DataFrame, ...]:
    """Whole users: train on all their events; evaluate on the last `1 - history_fraction` of other users' events."""
    first, second = plan.user_cuts
    length = pl.col("item_indices").list.len().cast(pl.Int64)
    history = (length * plan.config.history_fraction).floor().cast(pl.Int64)
    user = pl.col("user_index")
    return (
        sequences.filter(user < first).with_columns(length.alias("num_history")),
        sequences.filter((user >= first) & (user < second)).with_columns(history.alias("num_history")),
        sequences.filter(user >= second).with_columns(history.alias("num_history")),
    )


def _leave_one_out(sequences: pl.DataFrame, plan: SplitPlan) -> tuple[pl.DataFrame, ...]:
    """Last event tests, the one before validates; users with fewer than three events are trained on only."""
    del plan
    length = pl.col("item_indices").list.len().cast(pl.Int64)
    short, long = sequences.filter(length < 3), sequences.filter(length >= 3)
    return (
        pl.concat([_cut(short, length, length), _cut(long, length - 2, length - 2)]),
        _cut(long, length - 1, length - 2),
        _cut(long, length, length - 1),
    )


def _global_temporal(sequences: pl.DataFrame, plan: SplitPlan) -> tuple[pl.DataFrame, ...]:
    """Train on events before the first cut; label events between the cuts (validation) and after the second (test)."""
    first, second = plan.cuts_ms
    before = sequences.with_columns(
        _count_before(first).alias("_first"),
        _count_before(second).alias("_second"),
        pl.col("item_indices").list.len().cast(pl.Int64).alias("_all"),
    )
    one, two, every = pl.col("_first"), pl.col("_second"), pl.col("_all")
    parts = (
        _cut(before.filter(one > 0), one, one),
        _cut(before.filter(two > one), two, one),
        _cut(before.filter(every > two), every, two),
    )
    return tuple(p.drop("_first", "_second", "_all") for p in parts)


def _count_before(time_ms: int) -> pl.Expr:
    return pl.col("timestamps").list.eval(pl.element() < time_ms).list.sum().cast(pl.Int64)


def _cut(sequences: pl.DataFrame, stop: pl.Expr, num_history: pl.Expr) -> pl.DataFrame:
    """Sequences up to `stop`, with so many events of history."""
    return sequences.with_columns(
        pl.col("item_indices").list.head(stop),
        pl.col("timestamps").list.head(stop),
        num_history.alias("num_history"),
    )


def bucket_ms(first_ms: int, last_ms: int) -> int:
    """Width of a histogram bucket for a time span, at least one millisecond."""
    return max(1, -(-(last_ms - first_ms + 1) // HISTOGRAM_BUCKETS))


def time_histogram(events: pl.DataFrame, first_ms: int, width_ms: int) -> pl.DataFrame:
    """`bucket` and `count` of a block of events."""
    return events.group_by(((pl.col("timestamp") - first_ms) // width_ms).alias("bucket")).agg(
        pl.len().cast(pl.Int64).alias("count")
    )


def temporal_cuts(
    histogram: pl.DataFrame, first_ms: int, width_ms: int, config: SplitConfig
) -> tuple[int, int]:
    """Cut times: the starts of the buckets in which the shares of training and of training + validation are reached.

    Args:
        histogram: `bucket`, `count` over all kept events; buckets may repeat.
        first_ms: start of bucket 0.
        width_ms: width of a bucket.
        config: the fractions.
    """
    totals = histogram.group_by("bucket").agg(pl.col("count").sum()).sort("bucket")
    before = totals["count"].cum_sum() - totals["count"]
    total = int(totals["count"].sum())
    cuts = []
    for share in cumulative_shares(config):
        reached = totals.filter(before >= int(share * total))
        bucket = reached["bucket"][0] if reached.height else totals["bucket"][-1] + 1
        cuts.append(first_ms + int(bucket) * width_ms)
    return cuts[0], cuts[1]
