"""A run that dies: after any single operation on the store nothing false reads as complete, and the next run finishes.

The store counts every operation that changes it and "kills" the run before the n-th. A file being written at that
moment is left cut short, as a killed process would leave it.
"""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from distributed_mi.core import artifacts, schema
from distributed_mi.core.artifacts import StageKey, Workspace
from distributed_mi.core.errors import WorkspaceLockedError


class KilledError(Exception):
    """The process died here."""


class MortalHandler(pafs.FSSpecHandler):
    """A store that fails before its n-th change."""

    left: float = float("inf")

    def _tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        try:
            self._tick()
        except KilledError:
            self.fs.pipe(path, b"PAR1 cut short")
            raise
        return super().open_output_stream(path, metadata)

    def move(self, src: str, dest: str) -> None:
        self._tick()
        super().move(src, dest)

    def delete_file(self, path: str) -> None:
        self._tick()
        super().delete_file(path)

    def delete_dir(self, path: str) -> None:
        self._tick()
        super().delete_dir(path)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._tick()
        super().create_dir(path, recursive)


KEYS = {user: StageKey("evaluate/remi", {}, {"user": user}) for user in (1, 2, 3)}


@pytest.fixture
def store() -> Iterator[tuple[Workspace, MortalHandler]]:
    bucket = f"bucket-{uuid.uuid4().hex}"
    workspace = Workspace(f"memory://{bucket}/ws")
    handler = MortalHandler(fsspec.filesystem("memory"))
    workspace.fs = pafs.PyFileSystem(handler)
    yield workspace, handler
    fsspec.filesystem("memory").rm(f"/{bucket}", recursive=True)


def shard(user: int, part: int) -> pa.Table:
    values = {"user_index": [user * 10 + part], "vector": [[0.0]]}
    return pa.table(values, schema=schema.TABLES["user_vectors"])


def work(workspace: Workspace, user: int) -> None:
    """What every stage does: write the shards that are not there yet, commit."""
    run = workspace.stage("evaluate/remi").open(KEYS[user])
    if run.complete:
        return
    done = run.valid_shards("user_vectors", "user_vectors")
    for part in range(2):
        if run.path(f"user_vectors/part-{part}.parquet") not in done:
            run.write_table(f"user_vectors/part-{part}.parquet", shard(user, part), "user_vectors")
    run.commit(rows={"user_vectors": 2}, top_files={"report.json": str(user).encode()})


def completed_user(workspace: Workspace) -> int | None:
    """Whose result reads as complete; checks that all of it is there."""
    stage = workspace.stage("evaluate/remi")
    manifest = stage.manifest()
    if manifest is None:
        return None
    user = manifest.config["user"]
    table = stage.read("user_vectors", "user_vectors")
    assert table["user_index"].to_pylist() == [user * 10, user * 10 + 1]
    with workspace.fs.open_input_stream(f"{stage.base}/report.json") as stream:
        assert stream.read() == str(user).encode()
    return user


@pytest.mark.parametrize("old", [None, 1], ids=["first run", "over another key's result"])
def test_killed_before_any_operation(store: tuple[Workspace, MortalHandler], old: int | None) -> None:
    workspace, handler = store
    seen = set()
    for survived in range(200):
        handler.left = float("inf")
        if handler.fs.exists(workspace.root):
            handler.fs.rm(workspace.root, recursive=True)
        if old:
            work(workspace, old)
        handler.left = survived
        try:
            work(workspace, 2)
        except KilledError:
            finished = False
        else:
            finished = True
        handler.left = float("inf")
        seen.add(completed_user(workspace))
        if finished:
            break
        work(workspace, 2)
        assert completed_user(workspace) == 2, f"after a kill at operation {survived}"
        work(workspace, 3)  # whatever the kill left behind goes with the next success
        stage = workspace.stage("evaluate/remi")
        left = artifacts.list_files_with_temporaries(workspace.fs, stage.base)
        assert len(left) == 4, left
        assert sum(KEYS[3].generation in path for path in left) == 2
    assert finished
    assert survived > 8  # there were as many places to die
    assert seen == {old, None, 2}


HOLDER = """
import subprocess, sys, time
from distributed_mi.core.artifacts import Workspace
with Workspace(sys.argv[1]).lock("train"):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_lock_is_refused_to_a_second_process_and_freed_by_sigkill(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path / "ws"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, workspace.url], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    orphan = int(holder.stdout.readline())
    try:
        with pytest.raises(WorkspaceLockedError) as caught, workspace.lock("evaluate"):
            pass
        assert f"train (process {holder.pid} on " in str(caught.value)
        holder.kill()
        holder.wait()
        with workspace.lock("evaluate"):  # although a child of the holder is still alive
            assert "evaluate" in (tmp_path / "ws" / ".lock").read_text()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        subprocess.run(["kill", str(orphan)], check=True)


def test_lock_is_freed_by_an_error_and_taken_again(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    with pytest.raises(RuntimeError, match="inside"), workspace.lock("train"):
        raise RuntimeError("inside")
    with (
        workspace.lock("a much longer purpose than the first"),
        pytest.raises(WorkspaceLockedError, match="longer"),
    ):
        Workspace(str(tmp_path)).lock("x").__enter__()
    with workspace.lock("x"):
        assert (tmp_path / ".lock").read_text().startswith("x (process")


def test_object_store_has_no_lock() -> None:
    workspace = Workspace("memory://somewhere/ws")
    with workspace.lock("a"), workspace.lock("b"):
        assert not workspace.is_local
