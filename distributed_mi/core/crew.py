"""Threads that share a piece of work and wait for the next one awake.

A training step on a CPU is compiled code for a few hundred microseconds, then some lines of Python, in turns. To wake
a thread that sleeps takes 40 to 120 microseconds; one that watches a number in memory begins after 5 to 10. It watches
from compiled code, so it holds no interpreter's lock, and goes to sleep after about a millisecond without work.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distributed_mi.core.watching import tell, watch

PATIENCE = 50_000
"""Looks at the number before a thread falls asleep, each followed by the processor's instruction to pause."""

_JOB, _DONE = 0, 16
"""Places of the number of the newest job and of the newest finished one, on cache lines of their own."""


class Crew:
    """The calling thread and helpers. One job at a time; `map` is not for several threads at once."""

    def __init__(self) -> None:
        self.helpers: list[_Helper] = []

    def map(self, work: Callable[[Any], Any], pieces: Sequence[Any], *, stay_awake: bool) -> list[Any]:
        """Results of `work` in the order of the pieces; the calling thread does the first, a helper each other one.

        Helpers are started when they are needed first and live as long as the process.

        Args:
            work: what to do with a piece.
            pieces: at least one.
            stay_awake: whether helpers watch for the next job when they have ended. They take a core each meanwhile.

        Raises:
            the error of the first piece that has one, when all have ended.
        """
        while len(self.helpers) < len(pieces) - 1:
            self.helpers.append(_Helper())
        busy = list(zip(self.helpers, pieces[1:], strict=False))
        for helper, piece in busy:
            helper.start(work, piece, PATIENCE if stay_awake else 0)
        try:
            results = [work(piece) for piece in pieces[:1]]
        finally:
            for helper, _ in busy:
                helper.wait()
        for helper, _ in busy:
            results.append(helper.take())
        return results


class _Helper:
    """One thread with one job at a time."""

    def __init__(self) -> None:
        self.words = np.zeros(32, np.int64)
        self.number = self.patience = 0
        self.sleeps = False
        self.lock, self.wake, self.ready = threading.Lock(), threading.Semaphore(0), threading.Event()
        self.work: Callable[[Any], Any] | None = None
        self.piece: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        threading.Thread(target=self._serve, name="crew", daemon=True).start()
        self.ready.wait()

    def start(self, work: Callable[[Any], Any], piece: Any, patience: int) -> None:
        """Give it a job; `patience` is for the time after it."""
        self.work, self.piece, self.number = work, piece, self.number + 1
        self.patience, self.result, self.error = patience, None, None
        with self.lock:
            tell(self.words, _JOB, self.number)
            slept, self.sleeps = self.sleeps, False
        if slept:
            self.wake.release()

    def wait(self) -> None:
        """Until the job is done."""
        while not watch(self.words, _DONE, self.number, 1 << 20):  # between two, signals get their turn
            pass

    def take(self) -> Any:
        """What the job gave."""
        result, error, self.work = self.result, self.error, None
        self.piece = self.result = self.error = None
        if error is not None:
            raise error
        return result

    def _serve(self) -> None:
        import torch

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.ready.set()
        number = 1
        while True:
            if not watch(self.words, _JOB, number, self.patience):
                with self.lock:
                    self.sleeps = falls_asleep = bool(self.words[_JOB] != number)
                if falls_asleep:
                    self.wake.acquire()
            assert self.work is not None
            try:
                self.result = self.work(self.piece)
            except BaseException as error:  # raised by `take`
                self.error = error
            tell(self.words, _DONE, number)
            number += 1
