"""Rows in which the tasks of Ray Data hand their counts to the driver: one row per task, with declared columns."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa

from distributed_mi.data.passes import PartitionSummary, ReadOutcome

OUTCOME = pa.schema(
    [
        ("index", pa.int64()),
        ("rows", pa.int64()),
        ("kept", pa.int64()),
        ("rejected", pa.map_(pa.string(), pa.int64())),
        ("removed", pa.map_(pa.string(), pa.int64())),
        ("files", pa.list_(pa.string())),
    ]
)
"""A `ReadOutcome` and the number of its task."""

SUMMARY = pa.schema(
    [
        ("partition", pa.int64()),
        ("num_events", pa.int64()),
        ("num_duplicates", pa.int64()),
        ("num_users", pa.int64()),
        ("first_ms", pa.int64()),
        ("last_ms", pa.int64()),
        ("item_id", pa.list_(pa.string())),
        ("count", pa.list_(pa.int64())),
        ("first_order", pa.list_(pa.int64())),
    ]
)
"""A `PartitionSummary`; the last three columns are its `items`."""

ITEM_COUNTS = {"item_id": pl.String, "count": pl.Int64, "first_order": pl.Int64}
"""Columns of `filters.count_items`."""


def outcome_table(index: int, outcome: ReadOutcome) -> pa.Table:
    """One row of `OUTCOME`."""
    return pa.Table.from_pylist([{"index": index, **vars(outcome)}], schema=OUTCOME)


def outcome_of(row: Mapping[str, Any]) -> ReadOutcome:
    """Inverse of `outcome_table`."""
    rejected, removed = Counter(dict(row["rejected"])), Counter(dict(row["removed"]))
    return ReadOutcome(row["rows"], row["kept"], rejected, removed, list(row["files"]))


def summary_table(summaries: list[PartitionSummary]) -> pa.Table:
    """One row of `SUMMARY` for each partition; none for none."""
    rows = []
    for summary in summaries:
        values = dict(vars(summary))
        rows.append({**values, **values.pop("items").to_dict(as_series=False)})
    return pa.Table.from_pylist(rows, schema=SUMMARY)


def summary_of(row: Mapping[str, Any]) -> PartitionSummary:
    """Inverse of a row of `summary_table`."""
    items = pl.DataFrame({name: row[name] for name in ITEM_COUNTS}, schema=ITEM_COUNTS)
    return PartitionSummary(**{k: v for k, v in row.items() if k not in ITEM_COUNTS}, items=items)
