"""Checks of whole columns: times, ids, and the text kept of rejected rows."""

from datetime import UTC, date, datetime

import polars as pl
import pytest

from distributed_mi.data.readers.base import ROWS_PER_FILE, ReadTask
from distributed_mi.data.rows import CONTENT_BYTES, check_events, clip

TASK = ReadTask(3, None, "folder/log.csv", "log.csv")


def check(timestamps, *, unit="s", users=None, **extra):
    n = len(timestamps)
    raw = pl.DataFrame(
        {
            "row": list(range(1, n + 1)),
            "reason": pl.Series([None] * n, dtype=pl.String),
            "user": users or ["u"] * n,
            "item": ["i"] * n,
            "timestamp": timestamps,
            **extra,
        },
        strict=False,
    )
    return check_events(raw, TASK, timestamp_unit=unit, content=lambda i: f"row {i}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN timestamp"),
        ("nan", "NaN timestamp"),
        ("inf", "NaN timestamp"),
        ("-1", "negative timestamp"),
        ("-0.5", "negative timestamp"),
        ("soon", "wrong type: timestamp"),
        ("12 13", "wrong type: timestamp"),
        ("", "empty timestamp"),
        ("  ", "empty timestamp"),
        (None, "empty timestamp"),
        ("99999999999999", "timestamp after the year 3000 (wrong timestamp_unit?)"),
        ("1e300", "timestamp after the year 3000 (wrong timestamp_unit?)"),
    ],
)
def test_unusable_times_are_told_apart(text, reason):
    parsed = check(["7", text])
    assert parsed.rows["timestamp"].to_pylist() == [7000]
    assert parsed.rejected.to_pylist() == [
        {"source": "log.csv", "row": 2, "reason": reason, "content": "row 1"}
    ]


@pytest.mark.parametrize(
    ("unit", "values", "milliseconds"),
    [
        ("s", ["1318896000", " 1318896000.5 ", "0"], [1318896000000, 1318896000500, 0]),
        ("ms", ["1318896000123", "1.5"], [1318896000123, 1]),
        ("s", [5, 6], [5000, 6000]),
        ("s", [5.25, 6.0], [5250, 6000]),
        ("s", [date(1970, 1, 2)], [86_400_000]),
        ("s", [datetime(1970, 1, 1, 0, 0, 1, 250_000, tzinfo=UTC)], [1250]),
    ],
)
def test_times_become_milliseconds(unit, values, milliseconds):
    assert check(values, unit=unit).rows["timestamp"].to_pylist() == milliseconds


def test_the_first_reason_counts_and_blank_ids_are_empty():
    parsed = check(["-1", "1", "1"], users=["  ", None, "u"])
    assert parsed.rejected["reason"].to_pylist() == ["empty user id"] * 2
    assert parsed.rows.num_rows == 1


def test_source_order_counts_over_files():
    assert check(["1", "2"]).rows["source_order"].to_pylist() == [
        3 * ROWS_PER_FILE + 1,
        3 * ROWS_PER_FILE + 2,
    ]


def test_ratings_and_positions_may_be_missing_but_not_of_another_type():
    parsed = check(["1"] * 4, rating=["5", "x", None, "4.5"], position=["0", "1", "2", "?"])
    assert parsed.rows["rating"].to_pylist() == [5.0, None]
    assert parsed.rows["position"].to_pylist() == [0, 2]
    assert parsed.rejected["reason"].to_pylist() == ["wrong type: rating", "wrong type: position"]


def test_content_is_clipped_between_characters():
    assert clip("a" * 5) == "a" * 5
    clipped = clip("ä" * CONTENT_BYTES)
    assert clipped == "ä" * (CONTENT_BYTES // 2)
    assert clip("x\ud800") == "x?"
