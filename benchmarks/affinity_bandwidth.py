"""Bytes per second of a message round beside those of a copy with as many threads, in one process, taking turns."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.affinity_sides import DENSE_PASS_BYTES, LIST_PASS_BYTES
from distributed_mi.exemplars.lists import ListMessages, NeighbourLists
from distributed_mi.exemplars.messages import DenseMessages, num_threads
from distributed_mi.exemplars.similarity import similarity_matrix

LIST_LENGTH = 64
"""Entries a row of the lists; 100,000 rows are 102 MB, more than caches hold."""

_CALLS = 3
"""Rounds or copies in one measurement."""

_CHUNKS_PER_THREAD = 4


def bandwidth(
    vectors: np.ndarray, preference: float, list_users: int, repeats: int, seed: int
) -> dict[str, Any]:
    """GB/s of a round of `DenseMessages`, of `ListMessages` and of a copy, repeat by repeat.

    Args:
        vectors: whose similarities the whole rows hold.
        preference: of all users.
        list_users: rows of the lists. Their columns are drawn at random: unsorted, as neighbours are.
        repeats: measurements of each.
        seed: of the lists.
    """
    users = len(vectors)
    matrix = similarity_matrix(torch.from_numpy(vectors)).numpy()
    dense = DenseMessages(matrix, 0, np.full(users, preference), 0.5)
    lists = random_lists(list_users, min(LIST_LENGTH, list_users - 1), seed)
    listed = ListMessages(lists, list_users, 0, np.full(list_users, preference), 0.5)
    source, target = np.ones_like(matrix).ravel(), np.zeros(matrix.size, dtype=np.float32)
    threads = num_threads()
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (copier(source, target, threads), 2 * source.nbytes),
        "dense": (dense.round, DENSE_PASS_BYTES * matrix.size),
        "lists": (listed.round, LIST_PASS_BYTES * lists.entries),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):  # the first does not count: it touches fresh memory
        for name, (call, size) in work.items():
            started = time.perf_counter()
            for _ in range(_CALLS):
                call()
            if repeat:
                rates[name].append(_CALLS * size / (time.perf_counter() - started) / 1e9)
    return {"gb_per_s": rates, "threads_used": threads, "list_entries": lists.entries}


def random_lists(users: int, length: int, seed: int) -> NeighbourLists:
    """Lists with columns and similarities drawn at random; a column may come twice in a row, which costs the same."""
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, users - 1, (users, length), dtype=np.int32)
    columns += columns >= np.arange(users, dtype=np.int32)[:, None]  # nobody lists himself
    similarities = -rng.random((users, length), dtype=np.float32)
    return NeighbourLists.of_equal_length(columns, similarities, np.full(users, -np.inf, dtype=np.float32))


def copier(source: np.ndarray, target: np.ndarray, threads: int) -> Callable[[], None]:
    """A call that copies one array into another with so many threads."""
    pool = ThreadPoolExecutor(threads)
    chunks = _CHUNKS_PER_THREAD * threads
    cuts = [len(source) * c // chunks for c in range(chunks + 1)]
    bounds = list(pairwise(cuts))

    def copy() -> None:
        list(pool.map(lambda b: np.copyto(target[b[0] : b[1]], source[b[0] : b[1]]), bounds))

    return copy
