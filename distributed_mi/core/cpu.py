"""Work on a CPU: cut into independent pieces, each done on one core, and what compiled kernels can read.

Operations on small blocks that are spread over threads meet at a barrier after each of them. Pieces of their own need
no barrier, and a matrix product on one thread gives the same bits whatever the number of threads of the process.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from distributed_mi.core.crew import Crew

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_WORTH_A_WAKE, _WORTH_A_THREAD = 1 << 18, 1 << 14
"""Numbers to work through below which another thread costs more than it saves, where it may sleep and where not."""


class _Here(threading.local):
    """Of each thread."""

    kernels = 0
    """Threads that compiled kernels have and torch has not; 0: kernels use torch's."""


_here = _Here()
_in_use = threading.Lock()
_crew: "Crew | None" = None


def map_single_threaded(work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
    """Results of all pieces in order, from as many threads as torch has been given.

    The threads begin in torch's default modes: with gradients, without autocast.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(threads)  # what threads of the future start with


@contextmanager
def threads_for_kernels() -> Iterator[None]:
    """Within, torch's operations have one thread and compiled kernels (`map_slices`) those that torch had.

    For work made of many small operations, where each of torch's barriers costs more than it gains. The two cannot
    share a core: threads of both wait for work awake.
    """
    import torch

    before = torch.get_num_threads()
    _here.kernels = min(before, _num_cores())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _here.kernels = 0
        torch.set_num_threads(before)


def map_slices(work: Callable[[slice], Result], rows: int, numbers_per_row: int) -> list[Result]:
    """Results of `work` on slices that make up `rows`: one where that is as fast, else one a thread.

    See `map_pieces` for what holds inside.
    """
    if _here.kernels:
        available, worth = _here.kernels, _WORTH_A_THREAD
    else:
        import torch

        available, worth = min(torch.get_num_threads(), _num_cores()), _WORTH_A_WAKE
    threads = max(1, min(available, rows * numbers_per_row // worth, rows))
    cuts = [rows * i // threads for i in range(threads + 1)]
    return map_pieces(work, list(map(slice, cuts, cuts[1:])))


def map_pieces(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """Results of `work`, which spends its time where no interpreter's lock is held, in order.

    The first piece is done in this thread, each other one in a thread of its own, in which torch records no gradients
    and knows no autocast. Torch's operations use one thread everywhere. If the threads are busy with the pieces of
    another caller, all is done here.

    Raises:
        the error of the first piece that has one, when all have ended.
    """
    if len(pieces) < 2 or not _in_use.acquire(blocking=False):
        return [work(piece) for piece in pieces]
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return _the_crew().map(work, pieces, stay_awake=_here.kernels > 0)
    finally:
        torch.set_num_threads(before)
        _in_use.release()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _the_crew() -> "Crew":
    global _crew
    if _crew is None:
        from distributed_mi.core.crew import Crew  # compiles

        _crew = Crew()
    return _crew


def _forget_crew() -> None:
    """After a fork the other threads are not there."""
    global _crew, _in_use
    _crew, _in_use = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_crew)


def is_plain(tensor: "Tensor") -> bool:
    """Whether a tensor is a float32 one that a compiled kernel can read where it lies."""
    import torch

    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
