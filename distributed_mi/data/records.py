"""Text files of one record per line (JSON, Python literals, separated values) -> checked rows.

Python runs once per line here, nowhere else in this stage: lines are where bad data have to be told apart one by one.
"""

import ast
import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from distributed_mi.core.errors import InputError
from distributed_mi.data.lines import LineChunk, read_chunks
from distributed_mi.data.readers.base import Parsed, ReadTask
from distributed_mi.data.rows import INVALID_UTF8, MALFORMED, as_text, check_events, check_items, wrong_type

Record = Mapping[str, Any]
Decode = Callable[[str], Record]
"""One line -> field name -> value; raises ValueError with the reason when the line is not a record."""


@dataclass(frozen=True)
class EventColumns:
    """Names of the fields of an interaction log; None where the log has no such field."""

    user: str
    item: str
    timestamp: str
    position: str | None = None
    rating: str | None = None

    def named(self) -> dict[str, str]:
        """What it is -> its name in the file, without those that are None."""
        return {what: name for what, name in vars(self).items() if name is not None}


@dataclass
class RecordChunk:
    """Lines of a chunk that are not blank, each with its record or the reason why it has none."""

    rows: list[int]
    lines: list[bytes]
    records: list[Record]
    reasons: list[str | None]

    def content(self, index: int) -> str:
        """A line as text, for the rejected table."""
        return self.lines[index].decode("utf-8", "replace")


def read_records(
    task: ReadTask, decode: Decode, *, encoding: str = "utf-8", skip_rows: int = 0
) -> Iterator[RecordChunk]:
    """Decode the lines of a file; blank ones are no rows, `skip_rows` at the top (a header) neither."""
    if task.filesystem is None:
        raise ValueError(f"task for {task.source} has no file system")
    for chunk in read_chunks(task.filesystem, task.path):
        yield _decode_chunk(chunk, decode, encoding, skip_rows)


def _decode_chunk(chunk: LineChunk, decode: Decode, encoding: str, skip_rows: int) -> RecordChunk:
    out = RecordChunk([], [], [], [])
    last = len(chunk.lines) - 1
    for index, line in enumerate(chunk.lines):
        broken = chunk.broken if index == last else None
        row = chunk.first_row + index
        if row <= skip_rows or (not line.strip() and broken is None):
            continue
        record, reason = ({}, broken) if broken else _decode_line(line, decode, encoding)
        out.rows.append(row)
        out.lines.append(line)
        out.records.append(record)
        out.reasons.append(reason)
    return out


def _decode_line(line: bytes, decode: Decode, encoding: str) -> tuple[Record, str | None]:
    try:
        return decode(line.decode(encoding)), None
    except UnicodeDecodeError:
        return {}, INVALID_UTF8
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return {}, MALFORMED


def decode_json(text: str) -> Record:
    """A JSON object.

    Raises:
        ValueError: it is not one.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def decode_json_or_literal(text: str) -> Record:
    """A JSON object, or a Python dictionary literal as in the Amazon metadata of 2014; nothing is executed.

    Raises:
        ValueError: it is neither. SyntaxError: the same, from the literal parser.
    """
    try:
        return decode_json(text)
    except ValueError:
        value = ast.literal_eval(text)
    if not isinstance(value, dict):
        raise ValueError("not a dictionary")
    return value


def split_fields(text: str, delimiter: str) -> list[str]:
    """Fields of a line of separated values; quotes are understood for delimiters of one character.

    Raises:
        ValueError: a quote is not closed on the line, or stands in the middle of a field.
    """
    if '"' not in text or len(delimiter) > 1 or delimiter in "\t|":
        return text.split(delimiter)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error


def decode_fields(names: Sequence[str], delimiter: str) -> Decode:
    """Decoder of lines of separated values with these columns; more or fewer fields are an error of the line."""

    def decode(text: str) -> Record:
        fields = split_fields(text, delimiter)
        if len(fields) != len(names):
            raise ValueError(f"{len(fields)} fields, not {len(names)}")
        return dict(zip(names, fields, strict=True))

    return decode


def read_header(task: ReadTask, delimiter: str, encoding: str) -> list[str]:
    """Column names in the first line of a file.

    Raises:
        InputError: there is no first line, or it is not text.
    """
    if task.filesystem is None:
        raise ValueError(f"task for {task.source} has no file system")
    first = next(read_chunks(task.filesystem, task.path, lines_per_chunk=1), None)
    if first is None or not first.lines[0].strip():
        raise InputError(f"{task.source} is empty; the first line must name its columns")
    try:
        return [name.strip() for name in split_fields(first.lines[0].decode(encoding), delimiter)]
    except ValueError as error:
        raise InputError(f"{task.source}: the first line does not name columns: {error}") from error


def require_columns(source: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a file without a column that the configuration names.

    Raises:
        InputError: names file, column and the columns there are.
    """
    for name in names:
        if name not in known:
            raise InputError(
                f"{source}: no column {name}; it has {', '.join(known)}. Name the right one under [data.reader]."
            )


def events_of(chunk: RecordChunk, task: ReadTask, columns: EventColumns, timestamp_unit: str) -> Parsed:
    """Check a chunk of records as events.

    Raises:
        InputError: no record of the chunk has a field of that name, so the name must be wrong.
    """
    named = columns.named()
    _require_somewhere(chunk, task.source, list(named.values()))
    values: dict[str, list[str | None]] = {what: [] for what in named}
    reasons = list(chunk.reasons)
    for index, record in enumerate(chunk.records):
        for what, name in named.items():
            value, reason = _field_text(record, name, what)
            values[what].append(value)
            reasons[index] = reasons[index] or reason
    raw = pl.DataFrame(
        [
            pl.Series("row", chunk.rows, dtype=pl.Int64),
            pl.Series("reason", reasons, dtype=pl.String),
            *(pl.Series(what, texts, dtype=pl.String) for what, texts in values.items()),
        ]
    )
    return check_events(raw, task, timestamp_unit=timestamp_unit, content=chunk.content)


def items_of(
    chunk: RecordChunk,
    task: ReadTask,
    extract: Callable[[Record], dict[str, Any]],
    *,
    required: Sequence[str] = (),
) -> Parsed:
    """Check a chunk of records as item metadata.

    Args:
        chunk: decoded lines.
        task: where they come from.
        extract: record -> `item`, `title`, `brand` (any scalar or None) and `categories` (list of strings or None).
        required: field names of which at least one record must have each.
    """
    _require_somewhere(chunk, task.source, list(required))
    raw: dict[str, list[Any]] = {c: [] for c in ("item", "title", "brand", "categories")}
    reasons = list(chunk.reasons)
    for index, record in enumerate(chunk.records):
        found = extract(record) if reasons[index] is None else {}
        for what in ("item", "title", "brand"):
            value, reason = _field_text(found, what, what)
            raw[what].append(value)
            reasons[index] = reasons[index] or reason
        raw["categories"].append(found.get("categories"))
    return check_items({"row": chunk.rows, "reason": reasons, **raw}, task, content=chunk.content)


def _field_text(record: Record, name: str, what: str) -> tuple[str | None, str | None]:
    value = record.get(name)
    if isinstance(value, float):
        if what in (
            "user",
            "item",
        ):  # not one id but many ways to write it, and NaN would be a user of its own
            return None, wrong_type(what)
        if what in ("title", "brand") and math.isnan(value):  # how pandas writes that there is none
            return None, None
    try:
        return as_text(value), None
    except TypeError:
        return None, wrong_type(what)
    except UnicodeError:
        return None, INVALID_UTF8


def _require_somewhere(chunk: RecordChunk, source: str, names: Sequence[str]) -> None:
    usable = [record for record, reason in zip(chunk.records, chunk.reasons, strict=True) if reason is None]
    if not usable:
        return
    for name in names:
        if not any(name in record for record in usable):
            require_columns(source, [name], sorted(usable[0]))
