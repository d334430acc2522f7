"""Any log with one event per row: Parquet, CSV or JSON lines (`.gz`, `.zst`), columns named in the configuration."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from distributed_mi.core.config import ConfigModel
from distributed_mi.core.errors import InputError
from distributed_mi.data import rows
from distributed_mi.data.readers.base import Parsed, Reader, ReadTask, What
from distributed_mi.data.records import (
    EventColumns,
    Record,
    RecordChunk,
    decode_fields,
    decode_json,
    events_of,
    items_of,
    read_header,
    read_records,
    require_columns,
)

_TASK_BYTES = 128 << 20
"""Row groups of a Parquet file are read together up to this uncompressed size."""


class TableReader(Reader):
    """Reads events and items from columns; see the module docstring."""

    class Config(ConfigModel):
        """Format and column names."""

        format: Literal["auto", "parquet", "csv", "jsonl"] = "auto"
        """File format. `auto`: by the name: `.parquet`, or `.csv`, `.tsv`, `.jsonl`, `.json`, also `.gz`, `.zst`."""
        delimiter: str | None = None
        """Separator of CSV columns. None: a tab for `.tsv`, else a comma."""
        encoding: Literal["utf-8", "latin-1"] = "utf-8"
        """Text encoding of CSV and JSON lines."""
        user: str = "user"
        """Column of the user id (text or whole number)."""
        item: str = "item"
        """Column of the item id (text or whole number), in the interactions and in the item metadata."""
        timestamp: str = "timestamp"
        """Column of the time of the event: a number in `timestamp_unit`, or a Parquet time."""
        timestamp_unit: Literal["s", "ms"] = "s"
        """Unit of numeric times, since 1970 UTC: seconds or milliseconds."""
        position: str | None = None
        """Column of whole numbers that orders events of a user with equal times. None: the order of the file does."""
        rating: str | None = None
        """Column of the rating, for `data.filters.min_rating`. None: events have none."""
        title: str = "title"
        """Metadata column of the title; may be absent."""
        brand: str = "brand"
        """Metadata column of the brand; may be absent."""
        categories: str = "categories"
        """Metadata column of the categories: a list, or text separated by `categories_separator`; may be absent."""
        categories_separator: str = "|"
        """Separator of categories given as text."""

    def plan(self, filesystem: pafs.FileSystem, paths: Sequence[str], what: What) -> list[ReadTask]:
        """One task per text file; Parquet files are cut at row groups. Columns are checked where a file names them."""
        tasks: list[ReadTask] = []
        for task in super().plan(filesystem, paths, what):
            kind = self._format(task.path)
            if kind == "parquet":
                tasks.extend(self._plan_parquet(task, what))
            else:
                if kind == "csv":
                    self._check(
                        task.source, what, read_header(task, self._delimiter(task.path), self.config.encoding)
                    )
                tasks.append(task)
        return tasks

    def read(self, task: ReadTask, what: What) -> Iterator[Parsed]:
        """Rows of one file or of some row groups of it."""
        kind = self._format(task.path)
        if kind == "parquet":
            yield from self._read_parquet(task, what)
            return
        if kind == "csv":
            delimiter = self._delimiter(task.path)
            names = read_header(task, delimiter, self.config.encoding)
            chunks = read_records(
                task, decode_fields(names, delimiter), encoding=self.config.encoding, skip_rows=1
            )
        else:
            chunks = read_records(task, decode_json, encoding=self.config.encoding)
        for chunk in chunks:
            yield self._check_records(chunk, task, what)

    @property
    def _columns(self) -> EventColumns:
        c = self.config
        return EventColumns(c.user, c.item, c.timestamp, c.position, c.rating)

    def _format(self, path: str) -> str:
        if self.config.format != "auto":
            return str(self.config.format)
        name = _uncompressed(path)
        for suffix, kind in (
            (".parquet", "parquet"),
            (".pq", "parquet"),
            (".csv", "csv"),
            (".tsv", "csv"),
            (".jsonl", "jsonl"),
            (".json", "jsonl"),
            (".ndjson", "jsonl"),
        ):
            if name.endswith(suffix):
                return kind
        raise InputError(
            f"{path.rsplit('/', 1)[-1]}: cannot tell the format from the name; "
            'set data.reader.format to "parquet", "csv" or "jsonl"'
        )

    def _delimiter(self, path: str) -> str:
        return self.config.delimiter or ("\t" if _uncompressed(path).endswith(".tsv") else ",")

    def _check(self, source: str, what: What, known: Sequence[str]) -> None:
        names = list(self._columns.named().values()) if what == "interactions" else [self.config.item]
        require_columns(source, names, known)

    def _check_records(self, chunk: RecordChunk, task: ReadTask, what: What) -> Parsed:
        if what == "interactions":
            return events_of(chunk, task, self._columns, self.config.timestamp_unit)
        return items_of(chunk, task, self._item, required=[self.config.item])

    def _item(self, record: Record) -> dict[str, Any]:
        c = self.config
        return {
            "item": record.get(c.item),
            "title": record.get(c.title),
            "brand": record.get(c.brand),
            "categories": self._categories(record.get(c.categories)),
        }

    def _categories(self, value: Any) -> list[str] | None:
        if isinstance(value, str):
            value = value.split(self.config.categories_separator)
        if not isinstance(value, list):
            return None
        return [str(v).strip() for v in value if v is not None and str(v).strip()]

    def _plan_parquet(self, task: ReadTask, what: What) -> Iterator[ReadTask]:
        with _open_parquet(task) as file:
            self._check(task.source, what, file.schema_arrow.names)
            self._check_types(task.source, file.schema_arrow, what)
            start, size, row = 0, 0, 1
            first_row = 1
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                size += metadata.total_byte_size
                row += metadata.num_rows
                if size >= _TASK_BYTES or group == file.num_row_groups - 1:
                    yield ReadTask(
                        task.number, task.filesystem, task.path, task.source, start, group + 1, first_row
                    )
                    start, size, first_row = group + 1, 0, row

    def _check_types(self, source: str, types: pa.Schema, what: What) -> None:
        ids = [self.config.item] + ([self.config.user] if what == "interactions" else [])
        for name in ids:
            kind = types.field(name).type
            if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_dictionary(kind)):
                raise InputError(f"{source}: column {name} is {kind}; ids must be strings or whole numbers")
        if what == "interactions":
            kind = types.field(self.config.timestamp).type
            usable = pa.types.is_integer(kind) or pa.types.is_floating(kind) or _is_text(kind)
            if not (usable or pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
                raise InputError(
                    f"{source}: column {self.config.timestamp} is {kind}; it must be a number or a time"
                )

    def _read_parquet(self, task: ReadTask, what: What) -> Iterator[Parsed]:
        row = task.first_row
        with _open_parquet(task) as file:
            known = file.schema_arrow.names
            c = self.config
            wanted = [c.item, c.title, c.brand, c.categories]
            if what == "interactions":
                wanted = list(self._columns.named().values())
            wanted = [name for name in dict.fromkeys(wanted) if name in known]
            for group in range(task.start, task.stop):
                table = file.read_row_group(group, columns=wanted)
                yield self._check_table(table, task, row, what)
                row += table.num_rows

    def _check_table(self, table: pa.Table, task: ReadTask, first_row: int, what: What) -> Parsed:
        table, reasons = _decode_text(table)
        numbers = list(range(first_row, first_row + table.num_rows))

        def content(index: int) -> str:
            return rows.as_json(table.slice(index, 1).to_pylist()[0])

        if what == "items":
            found: list[Record] = [self._item(record) for record in table.to_pylist()]
            raw = {k: [f[k] for f in found] for k in ("item", "title", "brand", "categories")}
            raw["item"] = [None if v is None else str(v) for v in raw["item"]]
            return rows.check_items({"row": numbers, "reason": reasons, **raw}, task, content=content)
        frame = pl.DataFrame(
            [
                pl.Series("row", numbers, dtype=pl.Int64),
                pl.Series("reason", reasons, dtype=pl.String),
                *(_series(what, table[name]) for what, name in self._columns.named().items()),
            ]
        )
        return rows.check_events(frame, task, timestamp_unit=self.config.timestamp_unit, content=content)


def _series(what: str, column: pa.ChunkedArray) -> pl.Series:
    series = pl.Series(what, pl.from_arrow(column))
    return series.cast(pl.String) if what in ("user", "item") else series


def _decode_text(table: pa.Table) -> tuple[pa.Table, list[str | None]]:
    """Check text columns as UTF-8 (Parquet does not); a bad value becomes null and its row gets a reason."""
    reasons: list[str | None] = [None] * table.num_rows
    for position, field in enumerate(table.schema):
        if not _is_text(field.type):
            continue
        column = table.column(position).combine_chunks()
        array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        try:
            array = array.cast(pa.large_string())
            array.validate(full=True)
        except pa.ArrowInvalid:
            array = pa.array(_decoded(array, reasons), pa.large_string())
        table = table.set_column(position, field.name, array)
    return table, reasons


def _decoded(array: pa.Array, reasons: list[str | None]) -> list[str | None]:
    binary = array.cast(pa.large_binary()) if not pa.types.is_large_binary(array.type) else array
    values: list[str | None] = []
    for index, value in enumerate(binary.to_pylist()):
        try:
            values.append(None if value is None else value.decode("utf-8"))
        except UnicodeDecodeError:
            values.append(value.decode("utf-8", "replace"))
            reasons[index] = rows.INVALID_UTF8
    return values


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _uncompressed(path: str) -> str:
    name = path.lower()
    for suffix in (".gz", ".gzip", ".zst", ".zstd"):
        name = name.removesuffix(suffix)
    return name


def _open_parquet(task: ReadTask) -> pq.ParquetFile:
    if task.filesystem is None:
        raise ValueError(f"task for {task.source} has no file system")
    try:
        return pq.ParquetFile(task.path, filesystem=task.filesystem)
    except pa.ArrowInvalid as error:
        raise InputError(f"{task.source} is not a Parquet file: {error}") from error


READER = TableReader
