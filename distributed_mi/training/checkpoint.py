"""Checkpoints: safetensors and JSON, complete or absent, loadable on any number of workers.

    step-000001500/
        table-*.safetensors      rows that each worker held, with the state of their optimizer
        dense.safetensors        every dense parameter, gathered
        dense_optimizer.safetensors   Adam's state by parameter name, gathered: any engine, any ZeRO stage
        manifest.json            written last: step, model, SHA-256 of each file, state of the loop

A directory without a manifest is an attempt that was killed: it is ignored and overwritten. A file that does not
match its hash is an error, never skipped silently. Random numbers need no room here: batches, negatives and dropout
are functions of (seed, step). Older checkpoints are removed only after the manifest of a newer one is written.

`model/` has the same format without optimizer state: what evaluation and serving load.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import pyarrow.fs as pafs
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distributed_mi.core.artifacts import write_bytes
from distributed_mi.core.config import validate
from distributed_mi.core.errors import CheckpointError
from distributed_mi.core.registry import resolve
from distributed_mi.embeddings.checkpoint import how_to_mend, load_table, save_table
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.optimizer import TableOptimizer, make_optimizer
from distributed_mi.embeddings.sharded import ShardedItemTable
from distributed_mi.embeddings.table import ItemTable, LocalItemTable
from distributed_mi.models.base import Recommender
from distributed_mi.training.engine import Engine

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the checkpoint layout."""

_MANIFEST = "manifest.json"
_DENSE = "dense.safetensors"
_DENSE_OPTIMIZER = "dense_optimizer.safetensors"


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build the model and its table again, without values."""

    name: str
    """Registry name of the model."""
    settings: dict[str, Any]
    """Every field of the model's `Config`."""
    dim: int
    num_rows: int
    """V of the table, padding included."""
    max_history: int
    text_dim: int
    """Width of text vectors; 0 for models without semantics."""
    table_optimizer: dict[str, Any] = field(default_factory=dict)

    def build_table(
        self,
        group: WorkerGroup | None,
        *,
        seed: int = 0,
        std: float | None = None,
        trainable: bool = True,
        **sharding: Any,
    ) -> ItemTable:
        """A table with first values: local for one worker, sharded for several.

        Args:
            group: the workers; None: this process alone.
            seed: of the first values.
            std: of the first values.
            trainable: False leaves out the optimizer's state, which takes twice the room of the rows.
            sharding: how several workers hold it; see `ShardedItemTable`.
        """
        optimizer: TableOptimizer = make_optimizer(TableOptimizerConfig(name="sgd"))
        if trainable:
            optimizer = make_optimizer(TableOptimizerConfig(**self.table_optimizer))
        if group is None or group.size == 1:
            device = group.device if group else torch.device("cpu")
            return LocalItemTable(
                self.num_rows, self.dim, seed=seed, std=std, optimizer=optimizer, device=device
            )
        return ShardedItemTable(
            self.num_rows, self.dim, group=group, seed=seed, std=std, optimizer=optimizer, **sharding
        )

    def build_model(self, items: ItemTable, *, seed: int = 0) -> Recommender:
        """The model with first values that depend on the seed alone."""
        owner = resolve("model", self.name)
        settings = validate(owner.Config, self.settings, where="model", owner=f"{owner.__name__}.Config")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = owner(settings, items=items, max_history=self.max_history, text_dim=self.text_dim)
        assert isinstance(model, Recommender)
        return model


@dataclass(frozen=True)
class CheckpointManifest:
    """`manifest.json` of a checkpoint."""

    step: int
    model: ModelSpec
    world_size: int
    """Workers that wrote it; says nothing about who may read it."""
    files: dict[str, str]
    """File -> SHA-256, in hexadecimal."""
    has_optimizer: bool
    state: dict[str, Any]
    """The loop's own state (`loop.TrainState`)."""
    format: int = FORMAT

    @property
    def table_files(self) -> dict[str, str]:
        """The table's files and their hashes."""
        return {n: h for n, h in self.files.items() if n not in (_DENSE, _DENSE_OPTIMIZER)}

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Parse a manifest.

        Raises:
            CheckpointError: it is not one, or of another format.
        """
        try:
            values = json.loads(data)
            if values["format"] != FORMAT:
                raise CheckpointError(f"{where} has checkpoint format {values['format']}; this is {FORMAT}")
            values["model"] = ModelSpec(**values["model"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            directory = where.removesuffix(f"/{_MANIFEST}")
            raise CheckpointError(
                f"{where} is not a checkpoint manifest: {error}. {how_to_mend(directory)}"
            ) from error


def directory_name(step: int) -> str:
    """`step-` and nine digits."""
    return f"step-{step:09d}"


def has_manifest(fs: pafs.FileSystem, path: str) -> bool:
    """Whether a checkpoint directory, or `model/`, is complete."""
    return bool(fs.get_file_info(f"{path}/{_MANIFEST}").type == pafs.FileType.File)


def read_manifest(fs: pafs.FileSystem, path: str) -> CheckpointManifest:
    """The manifest of a checkpoint directory or of `model/`.

    Raises:
        CheckpointError: there is none (the checkpoint is incomplete), or it cannot be read.
    """
    where = f"{path}/{_MANIFEST}"
    if not has_manifest(fs, path):
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {_MANIFEST}. "
            "Run `distributed-mi train CONFIG` to write it."
        )
    with fs.open_input_stream(where) as stream:
        return CheckpointManifest.from_json(stream.read(), where)


class CheckpointStore:
    """The checkpoints of one run. Its methods are collective over the workers of the run."""

    def __init__(self, fs: pafs.FileSystem, root: str, group: WorkerGroup) -> None:
        self.fs, self.root, self.group = fs, root, group

    def path(self, step: int) -> str:
        """Directory of a step."""
        return f"{self.root}/{directory_name(step)}"

    def complete_steps(self) -> list[int]:
        """Steps with a manifest, ascending. Not collective."""
        selector = pafs.FileSelector(self.root, recursive=False, allow_not_found=True)
        names = [i.base_name for i in self.fs.get_file_info(selector) if i.type == pafs.FileType.Directory]
        steps = sorted(int(n.removeprefix("step-")) for n in names if n.removeprefix("step-").isdecimal())
        infos = self.fs.get_file_info([f"{self.path(s)}/{_MANIFEST}" for s in steps])
        return [s for s, info in zip(steps, infos, strict=True) if info.type == pafs.FileType.File]

    def newest(self) -> CheckpointManifest | None:
        """The newest complete checkpoint, the same for all workers because worker 0 looks."""
        steps = self.group.broadcast_json(self.complete_steps() if self.group.rank == 0 else None)
        return read_manifest(self.fs, self.path(steps[-1])) if steps else None

    def save(
        self, step: int, spec: ModelSpec, engine: Engine, table: ItemTable, state: dict[str, Any]
    ) -> CheckpointManifest:
        """Write a checkpoint; it exists for every worker once this returns."""
        dense, optimizer = engine.dense_state(), engine.optimizer_state()  # collective under ZeRO
        tensors = {_DENSE: dense, _DENSE_OPTIMIZER: optimizer}
        return self._write(self.path(step), step, spec, table, tensors, state)

    def export(self, source_step: int, path: str, table: ItemTable) -> CheckpointManifest:
        """Copy a checkpoint to `path` without optimizer state; `table` is overwritten by its rows on the way.

        Raises:
            CheckpointError: the checkpoint is gone or damaged.
        """
        source = self.path(source_step)
        if not has_manifest(self.fs, source):
            # Later checkpoints say that this one is the best, so going back to one of them cannot help.
            raise CheckpointError(
                f"{source}, the best checkpoint of the run, is gone. Remove {self.root} and run `distributed-mi train "
                "CONFIG` again, which trains from the start."
            )
        manifest = read_manifest(self.fs, source)
        dense = _read_tensors(self.fs, source, _DENSE, manifest.files)
        load_table(table, self.fs, source, manifest.table_files, with_optimizer=False)
        return self._write(path, source_step, manifest.model, table, {_DENSE: dense}, manifest.state)

    def export_model(
        self, path: str, spec: ModelSpec, model: Recommender, table: ItemTable, state: dict[str, Any]
    ) -> CheckpointManifest:
        """Write a model that was fitted without steps, in the format of `export`."""
        dense = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        return self._write(path, 0, spec, table, {_DENSE: dense}, state)

    def _write(
        self,
        path: str,
        step: int,
        spec: ModelSpec,
        table: ItemTable,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
    ) -> CheckpointManifest:
        if self.group.rank == 0:
            if self.fs.get_file_info(path).type == pafs.FileType.Directory:  # left by a killed attempt
                self.fs.delete_dir(path)
            self.fs.create_dir(path, recursive=True)
        self.group.barrier()
        has_optimizer = _DENSE_OPTIMIZER in tensors
        rank, size = self.group.rank, self.group.size
        hashes = save_table(table, self.fs, path, rank, size, with_optimizer=has_optimizer)
        if self.group.rank == 0:
            hashes |= {name: _write_tensors(self.fs, f"{path}/{name}", t) for name, t in tensors.items()}
        files = {name: digest for part in self.group.all_gather_json(hashes) for name, digest in part.items()}
        manifest = CheckpointManifest(
            step=step,
            model=spec,
            world_size=self.group.size,
            files=dict(sorted(files.items())),
            has_optimizer=has_optimizer,
            state=state,
        )
        if self.group.rank == 0:
            data = json.dumps(asdict(manifest), indent=2, sort_keys=True).encode() + b"\n"
            write_bytes(self.fs, f"{path}/{_MANIFEST}", data)
        self.group.barrier()
        return manifest

    def restore(self, manifest: CheckpointManifest, engine: Engine, table: ItemTable) -> None:
        """Load a checkpoint to continue from it.

        Raises:
            CheckpointError: a file is missing or does not match its hash; names the file.
        """
        path = self.path(manifest.step)
        dense = _read_tensors(self.fs, path, _DENSE, manifest.files)
        optimizer = _read_tensors(self.fs, path, _DENSE_OPTIMIZER, manifest.files)
        load_table(table, self.fs, path, manifest.table_files, with_optimizer=True)
        engine.load_state(dense, optimizer)

    def prune(self, keep: int, also: Iterable[int]) -> None:
        """Remove all complete checkpoints but the newest `keep` and those of `also`. Worker 0 does it."""
        if self.group.rank != 0:
            return
        steps = self.complete_steps()
        for step in set(steps[:-keep]) - set(also):
            # The manifest first: a half-removed directory must not read as complete.
            self.fs.delete_file(f"{self.path(step)}/{_MANIFEST}")
            self.fs.delete_dir(self.path(step))


def load_model(fs: pafs.FileSystem, path: str, *, group: WorkerGroup | None = None) -> Recommender:
    """Build the model of a checkpoint and load its values, to evaluate or serve.

    Args:
        fs: file system of the checkpoint.
        path: `model/` of a train stage, or a checkpoint directory.
        group: workers that share the table, any number; None: all of it in this process.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: incomplete, or a file does not match its hash.
    """
    manifest = read_manifest(fs, path)
    table = manifest.model.build_table(group, trainable=False)
    model = manifest.model.build_model(table)
    load_table(table, fs, path, manifest.table_files, with_optimizer=False)
    model.load_state_dict(_read_tensors(fs, path, _DENSE, manifest.files))
    if group is not None:
        model.to(group.device)
    return model.eval()


def _write_tensors(fs: pafs.FileSystem, path: str, tensors: dict[str, Tensor]) -> str:
    data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    write_bytes(fs, path, data)
    return hashlib.sha256(data).hexdigest()


def _read_tensors(fs: pafs.FileSystem, directory: str, name: str, files: dict[str, str]) -> dict[str, Tensor]:
    path = f"{directory}/{name}"
    if name not in files:
        raise CheckpointError(f"{directory} has no {name}: it is not a checkpoint to continue training from")
    try:
        with fs.open_input_stream(path) as stream:
            data = stream.read()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint file {path} cannot be read: {error}. {how_to_mend(directory)}"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != files[name]:
        raise CheckpointError(
            f"checkpoint file {path} does not match its hash (SHA-256 {digest[:12]}, manifest says "
            f"{files[name][:12]}). {how_to_mend(directory)}"
        )
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint file {path} is not a safetensors file: {error}") from error
