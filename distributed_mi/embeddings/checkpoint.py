"""Save an item table and load it on any number of workers.

Each worker writes its rows into safetensors files `table-<worker>-of-<workers>-<part>.safetensors`; a file holds
the tensors `weight` `[R, D]`, the optimizer's state, and which rows these are: `id_range` `[3]` (first id, step, R)
where the ids are evenly spaced, else `ids` `[R]`. A load hands one file after the other to `ItemTable.assign`, which
keeps the rows that the worker owns now, so the worker count and the placement may differ. safetensors holds numbers
and names only: loading never runs code from the file.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import pyarrow.fs as pafs
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distributed_mi.core.artifacts import write_bytes
from distributed_mi.core.errors import CheckpointError, InputError
from distributed_mi.embeddings.table import ItemTable

MAX_FILE_BYTES = 256 << 20
"""Rows are cut into files of about this size, so that saving and loading need this much memory more, not a
shard's."""


def how_to_mend(directory: str) -> str:
    """What to do about a damaged checkpoint directory; true of `model/` and of a step's directory alike."""
    return (
        f"Remove {directory} and run `distributed-mi train CONFIG` again: a model is exported again, a training "
        "continues from the checkpoint before."
    )


def sha256(data: bytes) -> str:
    """SHA-256 of some bytes, hex."""
    return hashlib.sha256(data).hexdigest()


class HasRows(Protocol):
    """What can be saved: a table, or a snapshot of one."""

    def state(self) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ItemTable.state`."""


@dataclass(frozen=True)
class Snapshot:
    """The rows of a worker as they were at one moment, in main memory."""

    ids_R: Tensor
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, table: HasRows) -> "Snapshot":
        """Copy what a table holds. Ids never change and are not copied."""
        ids_R, tensors = table.state()
        return cls(ids_R, {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()})

    def state(self) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ItemTable.state`."""
        return self.ids_R, self.tensors


def held_bytes(table: HasRows) -> int:
    """Bytes that a `Snapshot` takes."""
    return sum(t.numel() * t.element_size() for t in table.state()[1].values())


def save_table(
    table: HasRows,
    fs: pafs.FileSystem,
    directory: str,
    rank: int,
    size: int,
    *,
    with_optimizer: bool = True,
) -> dict[str, str]:
    """Write the rows of this worker.

    Args:
        table: local or sharded, or a snapshot.
        fs: where to write.
        directory: folder of the checkpoint.
        rank: this worker.
        size: number of workers.
        with_optimizer: also the optimizer's state; not needed to recommend.

    Returns:
        File name -> SHA-256 of the files that this worker wrote.
    """
    ids_R, tensors = table.state()
    if not with_optimizer:
        tensors = {"weight": tensors["weight"]}
    files = {}
    for part, chunk in enumerate(_chunks(ids_R, tensors)):
        name = f"table-{rank:05d}-of-{size:05d}-{part:04d}.safetensors"
        files[name] = write_tensors(fs, f"{directory}/{name}", chunk)
    return files


def write_tensors(fs: pafs.FileSystem, path: str, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file so that it survives a loss of power, and return its SHA-256.

    No metadata: safetensors writes its keys in random order, and equal files hash alike.
    """
    data = save({name: t.contiguous() for name, t in tensors.items()})
    write_bytes(fs, path, data, durable=True)
    return sha256(data)


def _chunks(ids_R: Tensor, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    row_bytes = 8 + sum(t[:1].numel() * t.element_size() for t in tensors.values())
    rows = max(1, MAX_FILE_BYTES // max(row_bytes, 1))
    for at in range(0, len(ids_R), rows):
        chunk = {name: t[at : at + rows].detach().cpu() for name, t in tensors.items()}
        yield pack_ids(ids_R[at : at + rows].cpu()) | chunk


def pack_ids(ids_R: Tensor) -> dict[str, Tensor]:
    """Ids as a file holds them: 24 bytes where they are evenly spaced, else 8 bytes each."""
    step = int(ids_R[1] - ids_R[0]) if len(ids_R) > 1 else 1
    if len(ids_R) and step > 0 and bool((ids_R.diff() == step).all()):
        return {"id_range": torch.tensor([int(ids_R[0]), step, len(ids_R)])}
    return {"ids": ids_R}


def unpack_ids(tensors: Mapping[str, Tensor], where: str) -> Tensor:
    """The ids `[R]` of a table file.

    Args:
        tensors: what the file holds.
        where: its path, for the message.

    Raises:
        CheckpointError: there are none, or not as many as rows; names the file.
    """
    ids, bounds, weight = tensors.get("ids"), tensors.get("id_range"), tensors.get("weight")
    if weight is None or weight.ndim != 2:
        raise CheckpointError(
            f"checkpoint file {where} holds no weight [R, D]: it is no part of an item table"
        )
    if ids is None and bounds is not None and bounds.dtype == torch.int64 and bounds.shape == (3,):
        first, step, count = bounds.tolist()
        if step > 0 and count == len(weight):
            ids = torch.arange(first, first + step * count, step)
    if ids is None or ids.dtype != torch.int64 or ids.shape != (len(weight),):
        raise CheckpointError(
            f"checkpoint file {where} does not say which rows it holds: no ids, or not one a row"
        )
    return ids


def load_table(
    table: ItemTable, fs: pafs.FileSystem, directory: str, files: Mapping[str, str], with_optimizer: bool
) -> None:
    """Fill a table from the files of all workers that saved it; every worker calls it with the same files.

    Holds one file at a time, and one bit of bookkeeping (a byte in memory) for each row of the table.

    Args:
        table: local or sharded, of the same rows and width; of the same optimizer when its state is wanted.
        fs: where to read.
        directory: folder of the checkpoint.
        files: file name -> SHA-256, of all workers.
        with_optimizer: also the optimizer's state.

    Raises:
        CheckpointError: a file is missing, its hash differs, it is no table, or rows are missing; the message names
            the file.
    """
    names = table.state()[1].keys() if with_optimizer else ("weight",)
    seen = torch.zeros(table.num_rows, dtype=torch.bool)
    for name in sorted(files):
        path = f"{directory}/{name}"
        tensors = read_tensors(fs, directory, name, files[name])
        ids = unpack_ids(tensors, path)
        missing = [n for n in names if n not in tensors]
        if missing:
            raise CheckpointError(
                f"checkpoint file {path} holds no {', '.join(missing)}: it was saved without the optimizer's "
                "state, or with another optimizer"
            )
        try:
            table.assign(ids, {n: tensors[n] for n in names})
        except (InputError, CheckpointError) as error:
            raise CheckpointError(f"checkpoint file {path} does not fit the item table: {error}") from error
        seen[ids] = True
    if not bool(seen.all()):
        first = int((~seen).nonzero()[0])
        raise CheckpointError(
            f"checkpoint {directory} holds {int(seen.sum())} of {table.num_rows} item rows; row {first} is missing"
        )


def read_tensors(fs: pafs.FileSystem, directory: str, name: str, expected: str) -> dict[str, Tensor]:
    """Read one safetensors file of a checkpoint.

    Args:
        fs: where it lies.
        directory: folder of the checkpoint.
        name: the file in it.
        expected: its SHA-256 according to the manifest.

    Raises:
        CheckpointError: it is missing, has another hash, or is no safetensors file; names the file.
    """
    path = f"{directory}/{name}"
    try:
        with fs.open_input_stream(path) as stream:
            data = stream.read()
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint file {path} is missing. {how_to_mend(directory)}") from error
    except OSError as error:
        raise CheckpointError(
            f"checkpoint file {path} cannot be read: {error}. {how_to_mend(directory)}"
        ) from error
    found = sha256(data)
    if found != expected:
        raise CheckpointError(
            f"checkpoint file {path} is damaged: its SHA-256 is {found[:16]}..., the manifest says "
            f"{expected[:16]}... {how_to_mend(directory)}"
        )
    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"checkpoint file {path} is not a safetensors file: {error}") from error
