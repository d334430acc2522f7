"""Raw columns -> canonical rows and rejected rows. The checks are the same for every format and run on whole columns.

A row is refused with exactly one reason, the first that applies: what the parser said, then user, item, timestamp,
position, rating.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from distributed_mi.core import schema
from distributed_mi.data.readers.base import ITEMS, Parsed, ReadTask, no_rejects

MALFORMED = "malformed line"
INVALID_UTF8 = "invalid UTF-8"
NOT_A_NUMBER_TIME = "NaN timestamp"
NEGATIVE_TIME = "negative timestamp"
FAR_TIME = "timestamp after the year 3000 (wrong timestamp_unit?)"

CONTENT_BYTES = 1024
"""Most bytes of a rejected row's text that are kept."""
_YEAR_3000_MS = 32_503_680_000_000
_UNIT_MS = {"s": 1000, "ms": 1}


def empty(column: str) -> str:
    """Reason of a row without a value in a column."""
    return f"empty {column}"


def wrong_type(column: str) -> str:
    """Reason of a row whose value in a column is of another type than it must be."""
    return f"wrong type: {column}"


def check_events(
    raw: pl.DataFrame, task: ReadTask, *, timestamp_unit: str, content: Callable[[int], str]
) -> Parsed:
    """Check and convert a chunk of events.

    Args:
        raw: `row` (1-based number in the file), `user`, `item` (strings), `timestamp` (text, number or time), `reason`
            (text, null where the parser had nothing to say); optional `position` and `rating`.
        task: where the rows come from.
        timestamp_unit: `s` or `ms`; does not matter for columns of a time type.
        content: index into `raw` -> the row as text, asked for rejected rows only.
    """
    stamp, stamp_reason = _timestamps(raw["timestamp"], timestamp_unit)
    reasons = [raw["reason"], _id_reason(raw["user"], "user"), _id_reason(raw["item"], "item"), stamp_reason]
    columns = [
        raw["user"].alias("user_id"),
        raw["item"].alias("item_id"),
        stamp.alias("timestamp"),
        (raw["row"] + task.order(0)).alias("source_order"),
    ]
    for name, dtype in (("position", pl.Int64), ("rating", pl.Float64)):
        if name in raw.columns:
            values = _number(raw[name], dtype)
            reasons.append(_reason(raw[name].is_not_null() & values.is_null(), wrong_type(name)))
            columns.append(values.alias(name))
    reason = pl.select(pl.coalesce(reasons)).to_series()
    good = reason.is_null()
    events = pl.DataFrame(columns).filter(good).to_arrow()
    declared = pa.schema(
        [
            *schema.TABLES["events"],
            *(
                pa.field(n, t)
                for n, t in (("position", pa.int64()), ("rating", pa.float64()))
                if n in raw.columns
            ),
        ]
    )
    return Parsed(events.cast(declared), rejected_rows(raw["row"], reason, task.source, content))


def check_items(raw: Mapping[str, Sequence[Any]], task: ReadTask, *, content: Callable[[int], str]) -> Parsed:
    """Check and convert a chunk of item metadata.

    Args:
        raw: lists `row`, `item`, `title`, `brand` (strings or None), `categories` (lists of strings or None), `reason`.
        task: where the rows come from.
        content: index into the lists -> the row as text, asked for rejected rows only.
    """
    rows = pl.Series("row", raw["row"], dtype=pl.Int64)
    items = pl.Series("item_id", raw["item"], dtype=pl.String)
    reasons = [pl.Series(raw["reason"], dtype=pl.String), _id_reason(items, "item")]
    reason = pl.select(pl.coalesce(reasons)).to_series()
    table = pl.DataFrame(
        [
            items,
            *(_text(pl.Series(c, raw[c], dtype=pl.String)) for c in ("title", "brand")),
            pl.Series("categories", raw["categories"], dtype=pl.List(pl.String)),
            (rows + task.order(0)).alias("source_order"),
        ]
    ).filter(reason.is_null())
    return Parsed(table.to_arrow().cast(ITEMS), rejected_rows(rows, reason, task.source, content))


def rejected_rows(rows: pl.Series, reason: pl.Series, source: str, content: Callable[[int], str]) -> pa.Table:
    """The `rejected` table of the rows that have a reason."""
    bad = reason.is_not_null().arg_true().to_list()
    if not bad:
        return no_rejects()
    return pa.table(
        {
            "source": [source] * len(bad),
            "row": rows.gather(bad).to_list(),
            "reason": reason.gather(bad).to_list(),
            "content": [clip(content(index)) for index in bad],
        },
        schema=schema.TABLES["rejected"],
    )


def clip(text: str) -> str:
    """At most `CONTENT_BYTES` bytes of a text, without half a character; what is not a character becomes `?`."""
    return text.encode("utf-8", "replace")[:CONTENT_BYTES].decode("utf-8", "ignore")


def as_text(value: Any) -> str | None:
    """A JSON scalar as text; None stays None.

    Raises:
        TypeError: the value is a list, an object or a boolean. UnicodeError: it cannot be written as UTF-8.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value.encode("utf-8")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(type(value).__name__)
    return str(value)


def as_json(row: Mapping[str, Any]) -> str:
    """A row of a columnar file as text, for the rejected table."""
    return json.dumps(dict(row), default=str, ensure_ascii=False)


def _id_reason(ids: pl.Series, column: str) -> pl.Series:
    return _reason(ids.is_null() | (ids.str.strip_chars().str.len_bytes() == 0), empty(f"{column} id"))


def _reason(where: pl.Series, text: str) -> pl.Series:
    return pl.select(pl.when(where.fill_null(False)).then(pl.lit(text)).otherwise(None)).to_series()


def _text(values: pl.Series) -> pl.Series:
    """White space trimmed; an empty text is a missing one."""
    stripped = values.str.strip_chars()
    return stripped.set(stripped == "", None)


def _number(values: pl.Series, dtype: Any) -> pl.Series:
    """Values as a number, null where they are none; text such as `5.0` counts as a whole number."""
    if values.dtype != pl.String:
        return values.cast(dtype, strict=False)
    values = values.str.strip_chars()
    if dtype != pl.Int64:
        return values.cast(dtype, strict=False)
    return pl.select(
        pl.coalesce(
            values.cast(pl.Int64, strict=False),
            values.cast(pl.Float64, strict=False).cast(pl.Int64, strict=False),
        )
    ).to_series()


def _timestamps(values: pl.Series, unit: str) -> tuple[pl.Series, pl.Series]:
    """Milliseconds UTC (null where unusable) and the reason where there is one."""
    if values.dtype.is_temporal():
        moments = values.cast(pl.Datetime("ms")) if values.dtype == pl.Date else values
        stamp = moments.dt.epoch("ms")
        return stamp, _stamp_reason(values.is_null(), stamp.is_null(), stamp.is_null() & False, stamp)
    missing = values.is_null()
    if values.dtype == pl.String:
        values = values.str.strip_chars()
        missing = missing | (values == "")
    as_float = values.cast(pl.Float64, strict=False)
    not_finite = (as_float.is_nan() | as_float.is_infinite()).fill_null(False)
    exact = values.cast(pl.Int64, strict=False) if not values.dtype.is_float() else None
    in_range = as_float.abs() < 2.0**62 / _UNIT_MS[unit]
    scaled = (
        (as_float.set(~in_range | not_finite, None) * _UNIT_MS[unit]).floor().cast(pl.Int64, strict=False)
    )
    if exact is not None:
        scaled = pl.select(pl.coalesce(exact.set(~in_range, None) * _UNIT_MS[unit], scaled)).to_series()
    too_large = (~in_range & ~not_finite).fill_null(False)
    stamp = scaled.set(too_large, _YEAR_3000_MS)
    return stamp, _stamp_reason(missing, as_float.is_null(), not_finite, stamp)


def _stamp_reason(missing: pl.Series, wrong: pl.Series, nan: pl.Series, stamp: pl.Series) -> pl.Series:
    return pl.select(
        pl.when(missing.fill_null(True))
        .then(pl.lit(empty("timestamp")))
        .when(nan)
        .then(pl.lit(NOT_A_NUMBER_TIME))
        .when(wrong)
        .then(pl.lit(wrong_type("timestamp")))
        .when(stamp < 0)
        .then(pl.lit(NEGATIVE_TIME))
        .when(stamp >= _YEAR_3000_MS)
        .then(pl.lit(FAR_TIME))
        .otherwise(None)
    ).to_series()
