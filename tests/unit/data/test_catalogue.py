"""Metadata joined to the kept items."""

import polars as pl

from distributed_mi.core import schema
from distributed_mi.data.catalogue import build_catalogue, collect_metadata


def metadata(*rows):
    return pl.DataFrame(
        rows,
        schema={
            "item_id": pl.String,
            "title": pl.String,
            "brand": pl.String,
            "categories": pl.List(pl.String),
            "source_order": pl.Int64,
        },
        orient="row",
    )


ITEMS = pl.DataFrame({"item_index": [1, 2, 3], "item_id": ["a", "b", "c"], "count": [9, 8, 7]})


def test_the_first_row_of_an_item_wins_and_others_are_dropped():
    chunks = [
        metadata(("b", "late", None, None, 30), ("z", "not kept", None, None, 31)),
        metadata(("b", "early", None, None, 2)),
    ]
    found = collect_metadata(chunks, ITEMS["item_id"])
    assert found.select("item_id", "title").rows() == [("b", "early")]


def test_items_without_metadata_or_title_stay_with_nulls():
    known = metadata(("a", "Soap", "Acme", ["Bath"], 1), ("b", None, None, [], 2))
    counts = pl.DataFrame({"item_index": [1, 2, 1], "num_events": [3, 1, 2], "num_train_events": [2, 0, 2]})
    table = build_catalogue(ITEMS, counts, known)
    assert schema.conform(table.to_arrow(), "catalogue").to_pylist() == [
        {
            "item_index": 1,
            "item_id": "a",
            "title": "Soap",
            "brand": "Acme",
            "categories": ["Bath"],
            "num_events": 5,
            "num_train_events": 4,
        },
        {
            "item_index": 2,
            "item_id": "b",
            "title": None,
            "brand": None,
            "categories": [],
            "num_events": 1,
            "num_train_events": 0,
        },
        {
            "item_index": 3,
            "item_id": "c",
            "title": None,
            "brand": None,
            "categories": None,
            "num_events": 0,
            "num_train_events": 0,
        },
    ]


def test_no_metadata_at_all():
    none = collect_metadata([], ITEMS["item_id"])
    counts = pl.DataFrame({"item_index": [1], "num_events": [3], "num_train_events": [2]})
    assert build_catalogue(ITEMS, counts, none)["title"].null_count() == 3
