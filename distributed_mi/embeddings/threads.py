"""Work cut into independent pieces, each done by torch on one core.

Operations on small blocks that are spread over threads meet at a barrier after each of them. Pieces of their own need
no barrier, and a matrix product on one thread gives the same bits whatever the number of threads of the process.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def map_single_threaded(work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
    """Results of all pieces in order, from as many threads as torch has been given.

    The threads begin in torch's default modes: with gradients, without autocast.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(threads)  # what threads of the future start with
