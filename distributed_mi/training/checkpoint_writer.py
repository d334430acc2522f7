"""Writing a checkpoint: what one worker writes of it, and the thread in which it does so."""

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs
from torch import Tensor

from distributed_mi.core.artifacts import write_bytes
from distributed_mi.core.errors import CheckpointError
from distributed_mi.core.machine import available_memory_bytes
from distributed_mi.embeddings.checkpoint import HasRows, held_bytes, save_table, write_tensors

if TYPE_CHECKING:
    from distributed_mi.training.checkpoint import CheckpointManifest

MANIFEST = "manifest.json"
"""The file that says that a checkpoint is complete."""
COPY_SHARE = 0.5
"""Largest part of a worker's share of the free memory that the copy for asynchronous writing may take."""


class BackgroundWriter:
    """Runs a job in a thread, or at once. An error of the job is raised by the next `check`, `wait` or `run`."""

    def __init__(self) -> None:
        self.given_up = threading.Event()
        """Set once nobody wants the result: a job that waits for others should end."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def run(self, job: Callable[[], None], *, background: bool) -> None:
        """Wait for the job before, then start this one; without `background` it is done on return."""
        self.wait()
        if not background:
            job()
            return
        self._thread = threading.Thread(target=self._work, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def _work(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a job that has failed."""
        if self._error is not None and not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the job; raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def give_up(self) -> None:
        """Wait for what the job can finish by itself; its error is of no interest beside the one that ends the run."""
        self.given_up.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._error = None


@dataclass(frozen=True)
class CheckpointPart:
    """What one worker writes of a checkpoint. Calls no collective, so it may run in any thread."""

    fs: pafs.FileSystem
    path: str
    """Directory of the checkpoint; it is there and empty."""
    attempt: str
    """The same for all workers that write this checkpoint now, and for no others."""
    rank: int
    rows: HasRows
    tensors: dict[str, dict[str, Tensor]]
    """File -> its tensors; worker 0 writes them."""
    manifest: "CheckpointManifest"
    """Without files."""
    complete: Callable[[], None]
    """Called on worker 0 once the manifest is there."""
    given_up: threading.Event
    """Set when nobody wants the checkpoint any more."""

    def write(self) -> None:
        """Write the files; on worker 0 also wait for those of the others and declare all complete."""
        try:
            self._write()
        except OSError as error:
            self._tell({"error": str(error)})
            raise CheckpointError(
                f"checkpoint {self.path} could not be written: {error}. It does not count; earlier ones are whole. "
                "Make room or mend the storage, then run the same command again to continue."
            ) from error

    def _write(self) -> None:
        fs, rank, size = self.fs, self.rank, self.manifest.world_size
        with_optimizer = self.manifest.has_optimizer
        files = save_table(self.rows, fs, self.path, rank, size, with_optimizer=with_optimizer)
        if rank != 0:
            write_bytes(fs, self._note(rank), json.dumps({"files": files}).encode())
            return
        files |= {name: write_tensors(fs, f"{self.path}/{name}", t) for name, t in self.tensors.items()}
        for other in range(1, size):
            found = self._wait_for_note(other)
            if found is None:
                return
            files |= found
        for other in range(1, size):
            fs.delete_file(self._note(other))
        manifest = replace(self.manifest, files=dict(sorted(files.items())))
        write_bytes(fs, f"{self.path}/{MANIFEST}", manifest.to_json(), durable=True)
        self.complete()

    def _note(self, rank: int) -> str:
        """File by which a worker says that its files are complete."""
        return f"{self.path}/written-{self.attempt}-{rank:05d}.json"

    def _tell(self, note: dict[str, Any]) -> None:
        if self.rank != 0:
            with suppress(OSError):  # the storage that failed may fail again
                write_bytes(self.fs, self._note(self.rank), json.dumps(note).encode())

    def _wait_for_note(self, rank: int) -> dict[str, str] | None:
        """The files of another worker; None when nobody wants this checkpoint any more."""
        fs, path, pause_s = self.fs, self._note(rank), 0.005
        while fs.get_file_info(path).type != pafs.FileType.File:
            if self.given_up.wait(pause_s):
                return None
            pause_s = min(1.5 * pause_s, 1.0)
        with fs.open_input_stream(path) as stream:
            note = json.loads(stream.read())
        if "error" in note:
            raise OSError(f"worker {rank}: {note['error']}")
        found: dict[str, str] = note["files"]
        return found


def has_room_for_copy(table: HasRows) -> bool:
    """Whether a copy of this worker's rows takes at most `COPY_SHARE` of its share of the free memory."""
    free = available_memory_bytes()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by Ray Train: workers on this machine
    return free is None or held_bytes(table) * here <= COPY_SHARE * free
