"""Sequences of a split as flat arrays in files that are mapped into memory, so that they need not fit into it.

    <folder>/items.npy         int64 [S], users in order of user_index, oldest event first
    <folder>/offsets.npy       int64 [U + 1]
    <folder>/user_index.npy    int64 [U], ascending
    <folder>/num_history.npy   int64 [U]
    <folder>/user_id.arrow     outside ids, one string column

Parquet cannot be mapped, so it is converted once, shard by shard: beside a shard only a few numbers per user are in
memory. The folder appears when it is complete. Workers of one machine share the pages of a mapped file, and the kernel
drops them when memory is short.

Shapes:  U users, S events of all users.
"""

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from distributed_mi.core.artifacts import list_files

_BATCH_ROWS = 65_536
"""Users converted at once."""


@dataclass(frozen=True)
class MappedArrays:
    """What `read` gives; the fields of `batches.Sequences`."""

    user_index_U: np.ndarray
    user_id_U: pa.Array
    items: np.ndarray
    offsets: np.ndarray
    num_history_U: np.ndarray


def exists(folder: str) -> bool:
    """Whether a conversion to this folder was finished."""
    return Path(folder).is_dir()


def write(fs: pafs.FileSystem, shards: str, folder: str) -> None:
    """Convert the Parquet shards of a `sequences` table, in any order of users.

    Args:
        fs: file system of the shards.
        shards: their folder.
        folder: a folder on the local file system, made here.
    """
    files = list_files(fs, shards, ".parquet")
    user_index, lengths, num_history, user_id = _read_users(fs, files)
    order_U = np.argsort(user_index, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(lengths[order_U])]).astype(np.int64)
    begin = np.empty(len(order_U), np.int64)  # where the events of the n-th user of the shards belong
    begin[order_U] = offsets[:-1]
    temporary = Path(f"{folder}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    np.save(temporary / "offsets.npy", offsets)
    np.save(temporary / "user_index.npy", user_index[order_U])
    np.save(temporary / "num_history.npy", num_history[order_U])
    _write_ids(temporary / "user_id.arrow", user_id.take(pa.array(order_U)))
    _write_items(temporary / "items.npy", fs, files, begin, int(offsets[-1]))
    try:
        temporary.rename(folder)
    except OSError:
        if not exists(folder):
            raise
        shutil.rmtree(temporary)  # another process was faster


def read(folder: str) -> MappedArrays:
    """Map what `write` wrote."""
    path = Path(folder)
    with pa.memory_map(str(path / "user_id.arrow")) as source:
        ids = pa.ipc.open_file(source).read_all().column("user_id")
    return MappedArrays(
        user_index_U=_map(path / "user_index.npy"),
        user_id_U=ids.chunk(0) if ids.num_chunks else pa.array([], pa.large_string()),
        items=_map(path / "items.npy"),
        offsets=_map(path / "offsets.npy"),
        num_history_U=_map(path / "num_history.npy"),
    )


def _map(path: Path) -> np.ndarray:
    """An array over a mapped file; a plain view, because `np.memmap` makes every index operation slower."""
    array = np.load(
        path, mmap_mode="r" if path.stat().st_size > 128 else None
    )  # an empty file cannot be mapped
    return np.asarray(array)


def _batches(fs: pafs.FileSystem, files: list[str], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for file in files:
        with fs.open_input_file(file) as source:
            yield from pq.ParquetFile(source).iter_batches(_BATCH_ROWS, columns=columns)


def _read_users(
    fs: pafs.FileSystem, files: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, pa.ChunkedArray]:
    """User index, number of events, number of history events and outside id of each row of the shards."""
    index, lengths, history, ids = [], [], [], []
    for batch in _batches(fs, files, ["user_index", "num_history", "user_id", "item_indices"]):
        index.append(batch.column("user_index").to_numpy())
        history.append(batch.column("num_history").to_numpy().astype(np.int64))
        lengths.append(pc.list_value_length(batch.column("item_indices")).to_numpy().astype(np.int64))
        ids.append(batch.column("user_id").cast(pa.large_string()))
    empty = np.zeros(0, np.int64)
    return (
        np.concatenate([empty, *index]),
        np.concatenate([empty, *lengths]),
        np.concatenate([empty, *history]),
        pa.chunked_array(ids, pa.large_string()),
    )


def _write_ids(path: Path, ids: pa.ChunkedArray) -> None:
    table = pa.table({"user_id": ids.combine_chunks()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, table.num_rows))


def _write_items(
    path: Path, fs: pafs.FileSystem, files: list[str], begin: np.ndarray, num_events: int
) -> None:
    """Put the events of each row of the shards where they belong."""
    if num_events == 0:
        np.save(path, np.zeros(0, np.int64))
        return
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(num_events,))
    first = 0
    for batch in _batches(fs, files, ["item_indices"]):
        lists = batch.column("item_indices")
        lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        within = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        out[np.repeat(begin[first : first + len(lists)], lengths) + within] = lists.flatten().to_numpy()
        first += len(lists)
    out.flush()
