"""Progress of work that happens in other processes: worker 0 leaves a small file, the driver's bar follows it.

A file in the folder that all workers share needs no further process and works on object stores too.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from distributed_mi.core.artifacts import resolve_url, write_bytes
from distributed_mi.core.progress import track

INTERVAL_S = 1.0
"""Seconds between two looks, and at least between two writes."""


@dataclass(frozen=True)
class Follow:
    """What the driver shows while the workers work."""

    what: str
    total: int
    unit: str


class FileBar:
    """The worker's side: a bar that writes what it is told."""

    def __init__(self, url: str) -> None:
        self.fs, self.path = resolve_url(url)
        self.done, self._written = 0, 0.0

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished units."""
        self.done += count
        if time.monotonic() - self._written >= INTERVAL_S:
            self._written = time.monotonic()
            write_bytes(self.fs, self.path, json.dumps({"done": self.done, "note": note}).encode())


@dataclass(frozen=True)
class FileFlag:
    """The worker's side of a question to the driver: yes once a file is there."""

    url: str

    def __call__(self) -> bool:
        """Whether it is."""
        fs, path = resolve_url(self.url)
        return bool(fs.get_file_info(path).type == pafs.FileType.File)


@contextmanager
def following(url: str, follow: Follow) -> Iterator[None]:
    """Show a bar in this process that follows the file at `url`, from a thread of its own."""
    finished = threading.Event()
    thread = threading.Thread(target=_watch, args=(url, follow, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _watch(url: str, follow: Follow, finished: threading.Event) -> None:
    fs, path = resolve_url(url)
    shown = 0
    with track(follow.what, follow.total, follow.unit) as bar:
        while not finished.wait(INTERVAL_S):
            found = _read(fs, path)
            if found is not None and found["done"] != shown:
                bar.advance(found["done"] - shown, found["note"])
                shown = found["done"]


def _read(fs: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    if fs.get_file_info(path).type != pafs.FileType.File:
        return None
    with fs.open_input_stream(path) as stream:
        found: dict[str, Any] = json.loads(stream.read())
    return found
