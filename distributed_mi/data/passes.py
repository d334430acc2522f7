"""What the tasks of `prepare` do, one function per pass over the data. No Ray here: `stage.py` sends them out.

    read        one input file (or part) -> staged events or items, rejected rows, counts
    partition   all staged events of some users -> one staged partition, counts of its items
    recount     one partition -> counts of its items inside the k-core so far
    find_users  one partition -> its users in the k-core
    write       one partition -> its shard of sequences/{train,validation,test}
    check       its shards, read back -> leakage counts

Memory: one chunk of a file, or one partition, plus the tables of distinct items and of the partition's users.
Every file is written whole or not at all and always under the same name, so a task may run again at any time.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from distributed_mi.core import artifacts, schema
from distributed_mi.core.errors import InputError
from distributed_mi.data import filters, leakage, sequences, split
from distributed_mi.data.config import SPLITS, FilterConfig
from distributed_mi.data.readers.base import Parsed, Reader, ReadTask, What

STAGING = "_staging"
"""Folder of the generation for what the passes hand to each other; removed before the stage is complete."""


@dataclass(frozen=True)
class Place:
    """The generation that is being written; picklable, so that tasks anywhere write through it."""

    filesystem: pafs.FileSystem
    root: str

    def path(self, *parts: str) -> str:
        """A path inside the generation."""
        return "/".join([self.root, *parts])

    def exists(self, path: str) -> bool:
        """Whether a file is there, and then it is whole."""
        return bool(self.filesystem.get_file_info(path).type == pafs.FileType.File)

    def save(self, frame: pl.DataFrame, *parts: str) -> None:
        """Write a staged frame atomically. Its columns are this stage's own business, so no schema is declared."""
        buffer = io.BytesIO()
        pq.write_table(frame.to_arrow(), buffer, compression="zstd")
        artifacts.write_bytes(self.filesystem, self.path(*parts), buffer.getvalue())

    def load(self, *parts: str) -> pl.DataFrame:
        """Read a staged frame."""
        table = pq.ParquetFile(self.path(*parts), filesystem=self.filesystem).read()
        return pl.DataFrame(pl.from_arrow(table))


def partition_file(partition: int) -> tuple[str, str, str]:
    """Place of a staged partition."""
    return STAGING, "users", f"{partition:05d}.parquet"


def shard_file(folder: str, partition: int) -> str:
    """Place of a partition's shard of a table."""
    return f"{folder}/part-{partition:05d}.parquet"


@dataclass
class ReadOutcome:
    """Counts of a reading task.

    Args:
        rows: rows of the input, rejected ones included.
        kept: rows staged.
        rejected: reason -> rows.
        removed: filter -> rows.
        files: staged files, relative to the generation.
    """

    rows: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)

    def add(self, other: "ReadOutcome") -> None:
        """Take the counts and files of another task."""
        self.rows += other.rows
        self.kept += other.kept
        self.rejected.update(other.rejected)
        self.removed.update(other.removed)
        self.files.extend(other.files)


def read(
    place: Place, reader: Reader, task: ReadTask, index: int, what: What, config: FilterConfig
) -> ReadOutcome:
    """Read one task; when an earlier attempt finished it, only report what that one found."""
    marker = place.path(STAGING, what, f"{index:06d}.json")
    if place.exists(marker):
        with place.filesystem.open_input_stream(marker) as stream:
            values = json.loads(stream.read())
        return ReadOutcome(
            values["rows"],
            values["kept"],
            Counter(values["rejected"]),
            Counter(values["removed"]),
            values["files"],
        )
    outcome = ReadOutcome()
    for chunk, parsed in enumerate(_read_chunks(reader, task, what)):
        name = f"{index:06d}-{chunk:06d}.parquet"
        _stage_chunk(place, parsed, what, name, config, outcome)
    artifacts.write_bytes(place.filesystem, marker, json.dumps(vars(outcome)).encode())
    return outcome


def _read_chunks(reader: Reader, task: ReadTask, what: What) -> Iterator[Parsed]:
    try:
        yield from reader.read(task, what)
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"cannot read {task.source}: {error.strerror or error}") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"cannot read {task.source}: {error}") from error


def _stage_chunk(
    place: Place, parsed: Parsed, what: What, name: str, config: FilterConfig, outcome: ReadOutcome
) -> None:
    outcome.rows += parsed.rows.num_rows + parsed.rejected.num_rows
    if parsed.rejected.num_rows:
        outcome.rejected.update(parsed.rejected["reason"].to_pylist())
        path = place.path("rejected", f"{what}-{name}")
        artifacts.write_table(place.filesystem, path, parsed.rejected, "rejected")
    rows = pl.DataFrame(pl.from_arrow(parsed.rows))
    if what == "interactions":
        rows, removed = filters.keep_rows(rows, config)
        outcome.removed.update(removed)
        rows = rows.drop("rating", strict=False)
    if rows.height:
        outcome.kept += rows.height
        outcome.files.append("/".join([STAGING, what, name]))
        place.save(rows, STAGING, what, name)


def load_for_partition(place: Place, file: str, num_partitions: int) -> pa.Table:
    """Staged events with the partition of each user: a hash of the id, so that one user's events meet in one place."""
    events = place.load(file)
    partition = (pl.col("user_id").hash(seed=0) % num_partitions).cast(pl.Int64).alias("partition")
    return events.with_columns(partition).to_arrow()


@dataclass(frozen=True)
class PartitionSummary:
    """Counts of a staged partition.

    Args:
        partition: its number.
        num_events: events left after the duplicate policy.
        num_duplicates: events that the policy dropped.
        num_users: distinct users.
        first_ms: earliest event.
        last_ms: latest event.
        items: `filters.count_items`.
    """

    partition: int
    num_events: int
    num_duplicates: int
    num_users: int
    first_ms: int
    last_ms: int
    items: pl.DataFrame


def partition(place: Place, events: pl.DataFrame, number: int, duplicates: str) -> PartitionSummary:
    """Stage all events of a partition's users, in an order that does not depend on how they arrived."""
    kept = filters.in_time_order(filters.drop_duplicates(events, duplicates), "user_id")
    place.save(kept, *partition_file(number))
    return PartitionSummary(
        number,
        kept.height,
        events.height - kept.height,
        kept["user_id"].n_unique(),
        _whole(kept["timestamp"].min()),
        _whole(kept["timestamp"].max()),
        filters.count_items(kept),
    )


def partition_files(place: Place, files: list[str], duplicates: str) -> PartitionSummary:
    """The only partition, from all staged files: small inputs need no shuffle."""
    return partition(place, pl.concat([place.load(f) for f in files]), 0, duplicates)


def recount(place: Place, number: int, item_ids: pl.Series, min_user_events: int) -> pl.DataFrame:
    """Counts of a partition's items over the events that `keep_core` leaves."""
    return filters.count_items(
        filters.keep_core(place.load(*partition_file(number)), item_ids, min_user_events)
    )


@dataclass(frozen=True)
class UsersFound:
    """Users of a partition in the k-core.

    Args:
        users: `user_id`, `first_order` (over all rows of the user, as ComiRec orders them).
        num_events: their events.
        num_rare_item_events: events of the partition whose item is not in the k-core.
        histogram: `split.time_histogram` of their events.
    """

    users: pl.DataFrame
    num_events: int
    num_rare_item_events: int
    histogram: pl.DataFrame


def find_users(
    place: Place, number: int, item_ids: pl.Series, min_user_events: int, first_ms: int, width_ms: int
) -> UsersFound:
    """Users with enough events of the given items."""
    events = place.load(*partition_file(number)).with_columns(
        pl.col("source_order").min().over("user_id").alias("first_order")
    )
    of_items = filters.keep_core(events, item_ids, 1)
    kept = filters.keep_core(of_items, None, min_user_events)
    users = kept.select("user_id", "first_order").unique().sort("first_order")
    histogram = split.time_histogram(kept, first_ms, width_ms)
    return UsersFound(users, kept.height, events.height - of_items.height, histogram)


@dataclass(frozen=True)
class WriteSummary:
    """What a partition's shards hold.

    Args:
        rows: split -> users.
        events: kept events of its users.
        item_events: `item_index`, `num_events`, `num_train_events`.
        first_label_ms: earliest label, None without.
        num_single_event_users: users with one event.
        num_without_history: evaluation rows without an event to read.
    """

    rows: dict[str, int]
    events: int
    item_events: pl.DataFrame
    first_label_ms: int | None
    num_single_event_users: int
    num_without_history: int


def write(
    place: Place, number: int, users: pl.DataFrame, items: pl.DataFrame, plan: split.SplitPlan
) -> WriteSummary:
    """Write a partition's shards of the three splits; a split without a user gets no shard."""
    whole = sequences.build_sequences(place.load(*partition_file(number)), users, items)
    parts = split.split_sequences(whole, plan)
    for name, rows in parts.items():
        if rows.height:
            path = place.path("sequences", shard_file(name, number))
            artifacts.write_table(place.filesystem, path, rows.to_arrow(), "sequences")
    evaluation = [parts[name] for name in SPLITS[1:]]
    length = whole["item_indices"].list.len()
    return WriteSummary(
        rows={name: rows.height for name, rows in parts.items()},
        events=int(length.sum()),
        item_events=count_item_events(whole, parts["train"]),
        first_label_ms=leakage.first_label_ms(*evaluation),
        num_single_event_users=int((length == 1).sum()),
        num_without_history=sum(int((rows["num_history"] == 0).sum()) for rows in evaluation),
    )


def count_item_events(whole: pl.DataFrame, train: pl.DataFrame) -> pl.DataFrame:
    """`item_index`, `num_events`, `num_train_events` of some users."""

    def count(rows: pl.DataFrame, name: str) -> pl.DataFrame:
        events = (
            rows.filter(pl.col("item_indices").list.len() > 0).select("item_indices").explode("item_indices")
        )
        return events.group_by(item_index="item_indices").agg(pl.len().cast(pl.Int64).alias(name))

    joined = count(whole, "num_events").join(count(train, "num_train_events"), on="item_index", how="left")
    return joined.with_columns(pl.col("num_train_events").fill_null(0))


def check(place: Place, number: int, first_label_ms: int | None) -> leakage.LeakageCounts:
    """Leakage counts of the users of a partition, from its shards as written."""
    train, *evaluation = (_shard(place, name, number) for name in SPLITS)
    return leakage.count_leaks(train, *evaluation, first_label=first_label_ms)


def _shard(place: Place, name: str, number: int) -> pl.DataFrame:
    path = place.path("sequences", shard_file(name, number))
    if not place.exists(path):
        return pl.DataFrame(pl.from_arrow(schema.empty("sequences")))
    return pl.DataFrame(pl.from_arrow(artifacts.read_table(place.filesystem, path, "sequences")))


def _whole(value: Any) -> int:
    return 0 if value is None else int(value)
