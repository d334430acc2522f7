"""Checkpoints: safetensors and JSON, complete or absent, loadable on any number of workers.

    step-000001500/
        table-*.safetensors      rows that each worker held, with the state of their optimizer
        dense.safetensors        every dense parameter, gathered
        dense_optimizer.safetensors   Adam's state by parameter name, gathered: any engine, any ZeRO stage
        manifest.json            written last: step, model, SHA-256 of each file, state of the loop

A directory without a manifest is an attempt that was killed: it is ignored and overwritten. A file that does not
match its hash is an error, never skipped silently. Random numbers need no room here: batches, negatives and dropout
are functions of (seed, step). Older checkpoints are removed only after the manifest of a newer one is written.

Each worker writes its files, by default in a thread from a copy in memory, then a note with their hashes. Worker 0
waits for the notes of all in the same thread, and replaces them by the manifest. So nothing of it is a collective,
training goes on meanwhile, and the next checkpoint waits for the one before.

`model/` has the same format without optimizer state: what evaluation and serving load.
"""

import json
import logging
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import pyarrow.fs as pafs
import torch
from torch import Tensor

from distributed_mi.core.config import validate
from distributed_mi.core.errors import CheckpointError
from distributed_mi.core.registry import resolve
from distributed_mi.embeddings.checkpoint import (
    HasRows,
    Snapshot,
    how_to_mend,
    load_table,
    read_tensors,
)
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.optimizer import TableOptimizer, make_optimizer
from distributed_mi.embeddings.sharded import ShardedItemTable
from distributed_mi.embeddings.table import ItemTable, LocalItemTable
from distributed_mi.models.base import Recommender
from distributed_mi.training.checkpoint_writer import (
    MANIFEST,
    BackgroundWriter,
    CheckpointPart,
    has_room_for_copy,
)
from distributed_mi.training.engine import Engine

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the checkpoint layout: what this version writes, and the newest that it reads. 2: evenly spaced ids are
stored as a range."""

DENSE = "dense.safetensors"
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
        return {n: h for n, h in self.files.items() if n not in (DENSE, _DENSE_OPTIMIZER)}

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Parse a manifest.

        Raises:
            CheckpointError: it is not one, or a newer version wrote it.
        """
        try:
            values = json.loads(data)
            version = values["format"]
            if isinstance(version, int) and version > FORMAT:
                raise CheckpointError(
                    f"{where} was written by a newer version of distributed-mi: its checkpoint format is {version}, "
                    f"this version reads up to {FORMAT}. Read it with the version that wrote it."
                )
            if version not in range(1, FORMAT + 1):
                raise ValueError(f"its format is {version!r}")
            values["model"] = ModelSpec(**values["model"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            directory = where.removesuffix(f"/{MANIFEST}")
            raise CheckpointError(
                f"{where} is not a checkpoint manifest: {error}. {how_to_mend(directory)}"
            ) from error


def directory_name(step: int) -> str:
    """`step-` and nine digits."""
    return f"step-{step:09d}"


def has_manifest(fs: pafs.FileSystem, path: str) -> bool:
    """Whether a checkpoint directory, or `model/`, is complete."""
    return bool(fs.get_file_info(f"{path}/{MANIFEST}").type == pafs.FileType.File)


def read_manifest(fs: pafs.FileSystem, path: str) -> CheckpointManifest:
    """The manifest of a checkpoint directory or of `model/`.

    Raises:
        CheckpointError: there is none (the checkpoint is incomplete), or it cannot be read.
    """
    where = f"{path}/{MANIFEST}"
    if not has_manifest(fs, path):
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST}. "
            "Run `distributed-mi train CONFIG` to write it."
        )
    with fs.open_input_stream(where) as stream:
        return CheckpointManifest.from_json(stream.read(), where)


@dataclass(frozen=True)
class Keep:
    """Which complete checkpoints stay once a newer one is complete."""

    newest: int
    """How many of the newest."""
    best_step: int
    """And this one."""


class CheckpointStore:
    """The checkpoints of one run. Its methods are collective over the workers of the run.

    Args:
        fs: where they lie.
        root: folder of the checkpoints.
        group: the workers.
        background: write while training goes on, where memory has room for a copy; see
            `TrainConfig.checkpoint_async`.
    """

    def __init__(
        self, fs: pafs.FileSystem, root: str, group: WorkerGroup, *, background: bool = False
    ) -> None:
        self.fs, self.root, self.group, self.background = fs, root, group, background
        self.writer = BackgroundWriter()
        self._begun = False

    def path(self, step: int) -> str:
        """Directory of a step."""
        return f"{self.root}/{directory_name(step)}"

    def complete_steps(self) -> list[int]:
        """Steps with a manifest, ascending. Not collective."""
        steps = self._steps()
        infos = self.fs.get_file_info([f"{self.path(s)}/{MANIFEST}" for s in steps])
        return [s for s, info in zip(steps, infos, strict=True) if info.type == pafs.FileType.File]

    def _steps(self) -> list[int]:
        """Steps with a directory, ascending."""
        selector = pafs.FileSelector(self.root, recursive=False, allow_not_found=True)
        names = [i.base_name for i in self.fs.get_file_info(selector) if i.type == pafs.FileType.Directory]
        return sorted(int(n.removeprefix("step-")) for n in names if n.removeprefix("step-").isdecimal())

    def newest(self) -> CheckpointManifest | None:
        """The newest complete checkpoint, the same for all workers because worker 0 looks."""
        steps = self.group.broadcast_json(self.complete_steps() if self.group.rank == 0 else None)
        return read_manifest(self.fs, self.path(steps[-1])) if steps else None

    def save(
        self,
        step: int,
        spec: ModelSpec,
        engine: Engine,
        table: ItemTable,
        state: dict[str, Any],
        keep: Keep | None = None,
    ) -> None:
        """Begin to write a checkpoint of what model, table and optimizers are now; `wait` says when it is complete.

        Args:
            step: finished steps.
            spec: the model.
            engine: its dense part.
            table: its rows.
            state: of the loop.
            keep: remove all but these once this one is complete; None: remove nothing.

        Raises:
            CheckpointError: the checkpoint before could not be written.
        """
        self.wait()
        dense, optimizer = engine.dense_state(), engine.optimizer_state()  # copies; collective under ZeRO
        tensors = {DENSE: dense, _DENSE_OPTIMIZER: optimizer}
        background = self.background and has_room_for_copy(table)
        rows: HasRows = Snapshot.of(table) if background else table
        part = self._begin(self.path(step), step, spec, rows, tensors, state, keep)
        self.writer.run(part.write, background=background)

    def check(self) -> None:
        """Raise what went wrong while writing in the background, if it is known by now. Not collective."""
        self.writer.check()

    def wait(self) -> None:
        """Return when the checkpoint begun last is complete for every worker.

        Raises:
            CheckpointError: it could not be written.
        """
        self.writer.wait()
        if self._begun:
            self.group.barrier()
            self._begun = False

    def give_up(self) -> None:
        """Before an error ends this worker: write what it can write alone, wait for no other. Not collective."""
        self.writer.give_up()

    def export(self, source_step: int, path: str, table: ItemTable) -> None:
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
        dense = _read_dense(self.fs, source, DENSE, manifest.files)
        load_table(table, self.fs, source, manifest.table_files, with_optimizer=False)
        self._write(path, source_step, manifest.model, table, {DENSE: dense}, manifest.state)

    def export_model(
        self, path: str, spec: ModelSpec, model: Recommender, table: ItemTable, state: dict[str, Any]
    ) -> None:
        """Write a model that was fitted without steps, in the format of `export`."""
        dense = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        self._write(path, 0, spec, table, {DENSE: dense}, state)

    def _write(
        self,
        path: str,
        step: int,
        spec: ModelSpec,
        table: ItemTable,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
    ) -> None:
        """Write at once; it is complete for every worker on return."""
        self.wait()
        part = self._begin(path, step, spec, table, tensors, state, None)
        self.writer.run(part.write, background=False)
        self.wait()

    def _begin(
        self,
        path: str,
        step: int,
        spec: ModelSpec,
        rows: HasRows,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        keep: Keep | None,
    ) -> CheckpointPart:
        """Make the directory and agree on an attempt, which a worker that is still dying cannot take part in."""
        self._begun = True
        if self.group.rank == 0:
            if self.fs.get_file_info(path).type == pafs.FileType.Directory:  # left by a killed attempt
                _remove(self.fs, path)
            self.fs.create_dir(path, recursive=True)
        attempt = self.group.broadcast_json(
            uuid.uuid4().hex[:8]
        )  # nobody is past this before the directory exists
        manifest = CheckpointManifest(
            step=step,
            model=spec,
            world_size=self.group.size,
            files={},
            has_optimizer=_DENSE_OPTIMIZER in tensors,
            state=state,
        )

        def complete() -> None:
            if keep is not None:
                self.prune(keep.newest, also=[keep.best_step])

        return CheckpointPart(
            fs=self.fs,
            path=path,
            attempt=attempt,
            rank=self.group.rank,
            rows=rows,
            tensors=tensors,
            manifest=manifest,
            complete=complete,
            given_up=self.writer.given_up,
        )

    def restore(self, manifest: CheckpointManifest, engine: Engine, table: ItemTable) -> None:
        """Load a checkpoint to continue from it.

        Raises:
            CheckpointError: a file is missing or does not match its hash; names the file.
        """
        path = self.path(manifest.step)
        dense = _read_dense(self.fs, path, DENSE, manifest.files)
        optimizer = _read_dense(self.fs, path, _DENSE_OPTIMIZER, manifest.files)
        load_table(table, self.fs, path, manifest.table_files, with_optimizer=True)
        engine.load_state(dense, optimizer)

    def prune(self, keep: int, also: Iterable[int]) -> None:
        """Remove all checkpoints but the newest `keep` complete ones and those of `also`.

        For worker 0, not collective. Attempts that were killed go too, unless they are newer than all that is complete.
        """
        complete, steps = self.complete_steps(), self._steps()
        kept = {*complete[-keep:], *also, *(s for s in steps if s > complete[-1])} if complete else set(steps)
        for step in set(steps) - kept:
            _remove(self.fs, self.path(step))


def _remove(fs: pafs.FileSystem, path: str) -> None:
    """Remove a checkpoint, its manifest first: a half-removed directory must not read as complete."""
    if has_manifest(fs, path):
        fs.delete_file(f"{path}/{MANIFEST}")
    fs.delete_dir(path)


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
    model.load_state_dict(_read_dense(fs, path, DENSE, manifest.files))
    if group is not None:
        model.to(group.device)
    return model.eval()


def _read_dense(fs: pafs.FileSystem, directory: str, name: str, files: dict[str, str]) -> dict[str, Tensor]:
    if name not in files:
        raise CheckpointError(f"{directory} has no {name}: it is not a checkpoint to continue training from")
    return read_tensors(fs, directory, name, files[name])
