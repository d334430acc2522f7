"""Item metadata joined to the kept items: the catalogue table."""

from collections.abc import Iterable

import polars as pl

from distributed_mi.core import schema

ROWS_PER_SHARD = 1_000_000
"""Items per shard of the catalogue."""


def collect_metadata(chunks: Iterable[pl.DataFrame], item_ids: pl.Series) -> pl.DataFrame:
    """Metadata of the given items, one row each; of several the first in the files wins, whole.

    Args:
        chunks: staged item metadata; only one is held at a time.
        item_ids: kept items; memory is bounded by their number.
    """
    wanted = item_ids.implode()
    found: pl.DataFrame | None = None
    for chunk in chunks:
        kept = chunk.filter(pl.col("item_id").is_in(wanted))
        found = kept if found is None else pl.concat([found, kept])
        found = found.sort("source_order").unique("item_id", keep="first", maintain_order=True)
    return _no_metadata() if found is None else found


def _no_metadata() -> pl.DataFrame:
    text = dict.fromkeys(("item_id", "title", "brand"), pl.String)
    return pl.DataFrame(schema={**text, "categories": pl.List(pl.String), "source_order": pl.Int64})


def build_catalogue(items: pl.DataFrame, item_events: pl.DataFrame, metadata: pl.DataFrame) -> pl.DataFrame:
    """The catalogue in order of `item_index`; items without metadata keep null titles, brands and categories.

    Args:
        items: `item_index`, `item_id`.
        item_events: `item_index`, `num_events`, `num_train_events`; may name an item several times or not at all.
        metadata: `item_id`, `title`, `brand`, `categories`, one row per item.
    """
    totals = item_events.group_by("item_index").agg(
        pl.col("num_events").sum(), pl.col("num_train_events").sum()
    )
    joined = items.join(metadata.drop("source_order"), on="item_id", how="left").join(
        totals, on="item_index", how="left"
    )
    counts = pl.col("num_events", "num_train_events").fill_null(0)
    return joined.with_columns(counts).select(schema.TABLES["catalogue"].names).sort("item_index")
