"""Save an item table and load it on any number of workers.

Each worker writes its rows into safetensors files `table-<worker>-of-<workers>-<part>.safetensors`; a file holds
the tensors `ids` `[R]`, `weight` `[R, D]` and the optimizer's state. A load hands every file to `ItemTable.assign`,
which keeps the rows that the worker owns now, so the worker count and the placement may differ. safetensors holds
numbers and names only: loading never runs code from the file.
"""

import hashlib
from collections.abc import Iterator, Mapping

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


def save_table(
    table: ItemTable,
    fs: pafs.FileSystem,
    directory: str,
    rank: int,
    size: int,
    *,
    with_optimizer: bool = True,
) -> dict[str, str]:
    """Write the rows of this worker.

    Args:
        table: local or sharded.
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
        data = save(
            chunk
        )  # no metadata: safetensors writes its keys in random order, and equal files hash alike
        write_bytes(fs, f"{directory}/{name}", data)
        files[name] = sha256(data)
    return files


def _chunks(ids_R: Tensor, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    row_bytes = 8 + sum(t[:1].numel() * t.element_size() for t in tensors.values())
    rows = max(1, MAX_FILE_BYTES // max(row_bytes, 1))
    for at in range(0, len(ids_R), rows):
        chunk = {name: t[at : at + rows].detach().cpu().contiguous() for name, t in tensors.items()}
        yield {"ids": ids_R[at : at + rows].cpu().contiguous(), **chunk}


def load_table(
    table: ItemTable, fs: pafs.FileSystem, directory: str, files: Mapping[str, str], with_optimizer: bool
) -> None:
    """Fill a table from the files of all workers that saved it; every worker calls it with the same files.

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
        tensors = _read(fs, directory, name, files[name])
        missing = [n for n in ("ids", *names) if n not in tensors]
        if missing:
            raise CheckpointError(
                f"checkpoint file {path} holds no {', '.join(missing)}: it was saved without the optimizer's "
                "state, or with another optimizer"
            )
        ids = tensors["ids"]
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


def _read(fs: pafs.FileSystem, directory: str, name: str, expected: str) -> dict[str, Tensor]:
    path = f"{directory}/{name}"
    try:
        with fs.open_input_stream(path) as stream:
            data = stream.read()
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint file {path} is missing. {how_to_mend(directory)}") from error
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
