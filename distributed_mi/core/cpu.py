"""Work on a CPU: cut into independent pieces, each done on one core, and what compiled kernels can read.

Operations on small blocks that are spread over threads meet at a barrier after each of them. Pieces of their own need
no barrier, and a matrix product on one thread gives the same bits whatever the number of threads of the process.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_WORTH_A_THREAD = 1 << 18
"""Numbers to work through below which starting threads costs more than they save."""


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


def map_slices(work: Callable[[slice], None], rows: int, numbers_per_row: int) -> None:
    """Call `work`, which spends its time in kernels that need no interpreter's lock, on slices that make up `rows`.

    In this thread where that is as fast, else in as many as torch has been given.
    """
    import torch

    threads = min(torch.get_num_threads(), rows * numbers_per_row // _WORTH_A_THREAD, rows)
    if threads <= 1:
        work(slice(0, rows))
        return
    cuts = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, map(slice, cuts, cuts[1:])))


def is_plain(tensor: "Tensor") -> bool:
    """Whether a tensor is a float32 one that a compiled kernel can read where it lies."""
    import torch

    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
