"""Batches of the next steps, made before they are asked for.

A step's batches are a function of the step, so making them ahead changes nothing but the time: after a restart it
begins at whatever step is asked for.

Beside a GPU a thread makes them while the step runs. On a CPU it would take turns with training at the interpreter's
lock; there the batches of some steps are made at once, between steps. Code that runs several times in a row is in the
caches, so a batch takes half as long (0.16 instead of 0.36 ms for 128 users).
"""

import queue
import threading
from collections.abc import Sequence
from typing import Protocol

from distributed_mi.models.base import TrainBatch

_LOOK_S = 0.2
"""Seconds after which a thread with a full queue looks whether it is still wanted."""


class StepSource(Protocol):
    """Where the batches come from. Not collective."""

    num_users: int
    """Users of a global step."""

    def __call__(self, step: int) -> Sequence[TrainBatch]:
        """This worker's share of a step, in `accumulation` parts."""


class InBlocks:
    """A `StepSource` that makes the batches of some steps at once, in the thread that asks.

    Steps are expected in order; another order is right too and begins a new block. An error of the source is raised by
    the call for the step that it belongs to.
    """

    def __init__(self, source: StepSource, size: int) -> None:
        """Wrap a source.

        Args:
            source: makes the batches.
            size: steps of a block, at least 1.
        """
        self.source, self.size = source, size
        self.num_users = source.num_users
        self._ready: dict[int, Sequence[TrainBatch]] = {}

    def __call__(self, step: int) -> Sequence[TrainBatch]:
        """See `StepSource`."""
        batches = self.peek(step)
        del self._ready[step]
        return batches

    def peek(self, step: int) -> Sequence[TrainBatch]:
        """The batches that the next call will give."""
        if step not in self._ready:
            self._ready = {step: self.source(step)}
            for later in range(step + 1, step + self.size):
                try:
                    self._ready[later] = self.source(later)
                except Exception:  # comes again when this step is asked for
                    break
        return self._ready[step]

    def close(self) -> None:
        """Forget what is ready."""
        self._ready = {}


class Prefetched:
    """A `StepSource` that keeps the next steps of another one ready.

    Steps are expected in order; another order is right too and begins anew. An error of the source is raised by the
    call for the step that it belongs to.
    """

    def __init__(self, source: StepSource, depth: int) -> None:
        """Wrap a source; nothing starts before the first call.

        Args:
            source: makes the batches.
            depth: steps kept ready, at least 1.
        """
        self.source, self.depth = source, depth
        self.num_users = source.num_users
        self._expected: int | None = None
        self._held: Sequence[TrainBatch] | None = None
        self._ahead: _Ahead | None = None

    def __call__(self, step: int) -> Sequence[TrainBatch]:
        """See `StepSource`."""
        batches = self.peek(step)
        self._held, self._expected = None, step + 1
        return batches

    def peek(self, step: int) -> Sequence[TrainBatch]:
        """The batches that the next call will give."""
        if self._ahead is None or step != self._expected:
            self.close()
            self._ahead = _Ahead(self.source, step, self.depth)
            self._expected = step
        if self._held is None:
            found = self._ahead.ready.get()
            if isinstance(found, BaseException):
                self.close()
                raise found
            self._held = found
        return self._held

    def close(self) -> None:
        """End the thread. A later call starts another one."""
        self._held = None
        if self._ahead is not None:
            self._ahead.stop.set()
            self._ahead.thread.join()
            self._ahead = None


class _Ahead:
    """A thread that fills a bounded queue with one step after the other, until it fails or is stopped."""

    def __init__(self, source: StepSource, first: int, depth: int) -> None:
        self.source, self.first = source, first
        self.stop = threading.Event()
        self.ready: queue.Queue[Sequence[TrainBatch] | BaseException] = queue.Queue(depth)
        self.thread = threading.Thread(target=self._fill, name="train batches", daemon=True)
        self.thread.start()

    def _fill(self) -> None:
        step = self.first
        while not self.stop.is_set():
            made: Sequence[TrainBatch] | BaseException
            try:
                made = self.source(step)
            except BaseException as error:  # raised by the thread that asks for this step
                made = error
            self._put(made)
            if isinstance(made, BaseException):
                return
            step += 1

    def _put(self, made: "Sequence[TrainBatch] | BaseException") -> None:
        while not self.stop.is_set():
            try:
                self.ready.put(made, timeout=_LOOK_S)
            except queue.Full:
                continue
            return
