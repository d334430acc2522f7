"""Looking into checkpoints, checking them, and taking the model out of them: `distributed-mi checkpoint`.

Works on a checkpoint directory, on `model/`, and on a `checkpoints/` folder, local or behind a URL. Holds one file at a
time, so a table need not fit into memory.
"""

import json
import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import torch
from torch import Tensor

from distributed_mi.core.artifacts import resolve_url, write_bytes
from distributed_mi.core.errors import CheckpointError
from distributed_mi.embeddings.checkpoint import pack_ids, read_tensors, unpack_ids, write_tensors
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.training.checkpoint import (
    DENSE,
    CheckpointManifest,
    CheckpointStore,
    has_manifest,
    read_manifest,
)
from distributed_mi.training.checkpoint_writer import MANIFEST

DENSE_PREFIX = "dense."
"""What the names of dense parameters begin with in a single file."""


def find(url: str) -> tuple[pafs.FileSystem, list[str]]:
    """Complete checkpoints at a path or URL: the directory itself, or those of a `checkpoints/` folder, oldest first.

    Raises:
        CheckpointError: there is none.
    """
    fs, path = resolve_url(url)
    if has_manifest(fs, path):
        return fs, [path]
    store = CheckpointStore(fs, path, WorkerGroup.alone())
    found = [store.path(step) for step in store.complete_steps()]
    if not found:
        raise CheckpointError(
            f"no complete checkpoint at {url}: it holds neither {MANIFEST} nor a step-* folder with one. Give a "
            "checkpoint directory, a checkpoints/ folder or model/, as they lie under WORKSPACE/train/RUN/GENERATION"
        )
    return fs, found


def inspect(url: str) -> dict[str, Any]:
    """What the newest checkpoint at a path says about itself, JSON-ready; nothing of the values is read.

    Raises:
        CheckpointError: there is none, or its manifest cannot be read.
    """
    fs, paths = find(url)
    path = paths[-1]
    manifest = read_manifest(fs, path)
    infos = fs.get_file_info([f"{path}/{name}" for name in manifest.files])
    sizes = {i.base_name: i.size if i.type == pafs.FileType.File else None for i in infos}
    return {
        "path": path,
        "complete": [p.rsplit("/", 1)[-1] for p in paths],
        "format": manifest.format,
        "step": manifest.step,
        "model": asdict(manifest.model),
        "has_optimizer": manifest.has_optimizer,
        "num_workers": manifest.world_size,
        "files": {name: {"bytes": sizes[name], "sha256": digest} for name, digest in manifest.files.items()},
        "state": manifest.state,
    }


def render(facts: dict[str, Any]) -> str:
    """The facts of `inspect` for people."""
    model, files = facts["model"], facts["files"]
    settings = ", ".join(f"{k} {v}" for k, v in model["settings"].items())
    optimizer = model["table_optimizer"].get("name", "unknown")
    rows = {
        "checkpoint": facts["path"],
        "step": f"{facts['step']:,}",
        "model": f"{model['name']} ({settings})",
        "table": f"{model['num_rows']:,} rows x {model['dim']}, {optimizer}"
        + ("" if facts["has_optimizer"] else ", without the optimizer's state"),
        "history": f"{model['max_history']} items",
        "written by": f"{facts['num_workers']} worker(s), format {facts['format']}",
        "state": json.dumps(facts["state"], sort_keys=True),
    }
    if len(facts["complete"]) > 1:
        rows["complete"] = ", ".join(facts["complete"])
    lines = [f"{name:<12}{value}" for name, value in rows.items()]
    total = sum(f["bytes"] or 0 for f in files.values())
    lines.append(f"{'files':<12}{len(files)}, {total:,} bytes")
    for name, file in files.items():
        size = "missing" if file["bytes"] is None else f"{file['bytes']:,}"
        lines.append(f"  {name:<44}{size:>16}  {file['sha256'][:16]}")
    return "\n".join(lines)


def verify(url: str) -> Iterator[tuple[str, int]]:
    """Read every file of every complete checkpoint at a path: hashes, format, and that no row is missing.

    Yields:
        A checkpoint that is whole, and how many files it has.

    Raises:
        CheckpointError: names the first file or row that is wrong.
    """
    fs, paths = find(url)
    for path in paths:
        manifest = read_manifest(fs, path)
        seen_V = torch.zeros(manifest.model.num_rows, dtype=torch.bool)
        for name, digest in manifest.files.items():
            tensors = read_tensors(fs, path, name, digest)
            if name in manifest.table_files:
                seen_V[_ids(tensors, f"{path}/{name}", manifest)] = True
        _refuse_missing_rows(seen_V, path)
        yield path, len(manifest.files)


def _ids(tensors: dict[str, Tensor], where: str, manifest: CheckpointManifest) -> Tensor:
    """Ids of a table file, checked against the table's size."""
    ids, model = unpack_ids(tensors, where), manifest.model
    width = tensors["weight"].shape[1]
    if width != model.dim or (len(ids) and not (0 <= int(ids.min()) <= int(ids.max()) < model.num_rows)):
        raise CheckpointError(
            f"checkpoint file {where} holds rows of another table: {width} wide, ids up to {int(ids.max())}; the "
            f"manifest says {model.num_rows} rows of {model.dim}"
        )
    return ids


def _refuse_missing_rows(seen_V: Tensor, path: str) -> None:
    if not bool(seen_V.all()):
        first = int((~seen_V).nonzero()[0])
        raise CheckpointError(
            f"checkpoint {path} holds {int(seen_V.sum())} of {len(seen_V)} item rows; row {first} is missing"
        )


def export(url: str, out: str) -> str:
    """Take the model, without optimizer state, out of the newest checkpoint at a path.

    Args:
        url: where the checkpoint lies.
        out: a directory or URL, which gets the format of `model/`; or a local file that ends in `.safetensors`, which
            gets `weight` `[V, D]` in id order, the dense parameters as `dense.<name>`, and the model's specification
            as JSON under `model` of its metadata.

    Returns:
        The checkpoint it was taken from.

    Raises:
        CheckpointError: there is none or it is damaged, or `out` exists.
    """
    fs, paths = find(url)
    path = paths[-1]
    manifest = read_manifest(fs, path)
    single = out.endswith(".safetensors")
    if single and "://" in out:
        raise CheckpointError(
            f"a single file must be local, got {out}. Export to a folder (without .safetensors)"
        )
    out_fs, out_path = resolve_url(out)
    if out_fs.get_file_info(out_path).type != pafs.FileType.NotFound:
        raise CheckpointError(f"{out} exists; nothing was written. Choose another name, or remove it")
    if single:
        _export_file(fs, path, manifest, Path(out_path))
    else:
        _export_folder(fs, path, manifest, out_fs, out_path)
    return path


def _export_folder(
    fs: pafs.FileSystem, path: str, manifest: CheckpointManifest, out_fs: pafs.FileSystem, out: str
) -> None:
    files = {}
    seen_V = torch.zeros(manifest.model.num_rows, dtype=torch.bool)
    for name, digest in manifest.table_files.items():
        tensors = read_tensors(fs, path, name, digest)
        ids = _ids(tensors, f"{path}/{name}", manifest)
        seen_V[ids] = True
        files[name] = write_tensors(out_fs, f"{out}/{name}", pack_ids(ids) | {"weight": tensors["weight"]})
    _refuse_missing_rows(seen_V, path)
    dense = read_tensors(fs, path, DENSE, manifest.files[DENSE])
    files[DENSE] = write_tensors(out_fs, f"{out}/{DENSE}", dense)
    written = replace(manifest, files=dict(sorted(files.items())), has_optimizer=False)
    write_bytes(out_fs, f"{out}/{MANIFEST}", written.to_json(), durable=True)


def _export_file(fs: pafs.FileSystem, path: str, manifest: CheckpointManifest, out: Path) -> None:
    """Write a safetensors file in place, row by row, because the library wants all of it in memory."""
    model = manifest.model
    dense = read_tensors(fs, path, DENSE, manifest.files[DENSE])
    dense_bytes = {f"{DENSE_PREFIX}{n}": _raw(t) for n, t in dense.items()}
    table_bytes = 4 * model.num_rows * model.dim
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "model": json.dumps(asdict(model), sort_keys=True)},
        "weight": {"dtype": "F32", "shape": [model.num_rows, model.dim], "data_offsets": [0, table_bytes]},
    }
    at = table_bytes
    for name, data in dense_bytes.items():
        tensor = dense[name.removeprefix(DENSE_PREFIX)]
        end = at + len(data)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.seek(table_bytes, os.SEEK_CUR)
            stream.write(b"".join(dense_bytes.values()))
            stream.truncate(8 + len(text) + at)
        _fill_rows(fs, path, manifest, temporary, offset=8 + len(text))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the format for what models hold."""


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _fill_rows(
    fs: pafs.FileSystem, path: str, manifest: CheckpointManifest, file: Path, *, offset: int
) -> None:
    shape = (manifest.model.num_rows, manifest.model.dim)
    weight_VD = np.memmap(file, np.float32, "r+", offset=offset, shape=shape)
    seen_V = torch.zeros(shape[0], dtype=torch.bool)
    for name, digest in manifest.table_files.items():
        tensors = read_tensors(fs, path, name, digest)
        ids = _ids(tensors, f"{path}/{name}", manifest)
        weight_VD[ids.numpy()] = tensors["weight"].float().numpy()
        seen_V[ids] = True
    _refuse_missing_rows(seen_V, path)
    weight_VD.flush()
