"""Nearest neighbours of users: exactly, from similarities in blocks, or approximately, from a faiss index.

Shapes:  U users, R rows of a range, D width of the vectors, K neighbours.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_mi.exemplars import kernels
from distributed_mi.exemplars.lists import NeighbourLists
from distributed_mi.exemplars.messages import num_threads
from distributed_mi.exemplars.similarity import BLOCK_BYTES, Similarities, VectorSimilarities, row_blocks

FIRST_LENGTH = 32
"""Entries of a list before anything is known about how many its row needs."""

_GROWTH = 1.25
"""A list that grows gets this many times the entries that are known to be needed."""

_FLAT_LIMIT = 20_000
"""Up to so many users an index without cells is faster to build and search than it is to train one with cells."""

_CELL_POINTS = 64
"""Points a cell that the coarse quantizer is trained on; faiss warns below 39."""

OnRows = Callable[[int], None]
"""Called with the number of rows that are done."""


class ExactNeighbours:
    """Neighbours by similarity to every user; see `lists.NeighbourSource`.

    Args:
        similarities: of all users.
        first_row: where the range of rows begins; positions count from it.
    """

    def __init__(self, similarities: Similarities, first_row: int = 0) -> None:
        self.similarities, self.first_row = similarities, first_row

    def lists(self, rows: int, length: int, on_rows: OnRows | None = None) -> NeighbourLists:
        """The `length` nearest of each row of the range (all, when there are fewer), nearest first."""
        users = self.similarities.users
        length = min(length, users - 1)
        columns = np.empty((rows, length), dtype=np.int32)
        bound = np.full(rows, -np.inf, dtype=np.float32)
        for low, high in row_blocks(rows, 4 * users):
            block, shift, error = self._block(np.arange(low, high))
            top = block.topk(length, dim=1)
            columns[low:high] = top.indices.cpu().numpy()
            if 0 < length < users - 1:
                bound[low:high] = (top.values[:, -1] + shift + error).cpu().numpy()
            if on_rows:
                on_rows(high - low)
        own = np.repeat(np.arange(rows) + self.first_row, length)
        values = self.similarities.pairs(own, columns.ravel())
        return NeighbourLists.of_equal_length(columns, values.reshape(columns.shape), bound)

    def further(
        self, rows: np.ndarray, columns: list[np.ndarray], above: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """As in `lists.NeighbourSource`; each list becomes `_GROWTH` times as long as the similarities ask for."""
        users = self.similarities.users
        bounds = np.full(len(rows), -np.inf, dtype=np.float32)
        new_columns: list[np.ndarray] = []
        new_values: list[np.ndarray] = []
        for low, high in row_blocks(len(rows), 4 * users):
            block, shift, error = self._block(rows[low:high])
            known = [torch.from_numpy(c).to(block.device, torch.int64) for c in columns[low:high]]
            lengths = torch.tensor([len(c) for c in known], device=block.device)
            places = torch.arange(high - low, device=block.device).repeat_interleave(lengths)
            block[places, torch.cat(known)] = -torch.inf
            least = torch.from_numpy(above[low:high]).to(block.device, torch.float32) - shift - error
            needed = (block > least[:, None]).sum(dim=1)
            wanted = (_GROWTH * (needed + lengths)).long() + 1 - lengths
            wanted = torch.minimum(torch.maximum(wanted, needed), users - 1 - lengths)
            top = block.topk(int(wanted.max()), dim=1)
            ends = (top.values + (shift + error)[:, None]).cpu().numpy()
            indices = top.indices.cpu().numpy().astype(np.int32)
            counts = wanted.tolist()
            found = np.concatenate([indices[i, :count] for i, count in enumerate(counts)])
            values = self.similarities.pairs(np.repeat(rows[low:high] + self.first_row, counts), found)
            new_columns += np.split(found, np.cumsum(counts)[:-1])
            new_values += np.split(values, np.cumsum(counts)[:-1])
            for i, count in enumerate(counts):
                if count + int(lengths[i]) < users - 1:
                    bounds[low + i] = ends[i, count - 1]
        return new_columns, new_values, bounds

    def _block(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """As `Similarities.ordered_rows`, -inf to themselves."""
        ids = torch.from_numpy(rows + self.first_row).to(self.similarities.device)
        block, shift, error = self.similarities.ordered_rows(ids)
        block[torch.arange(len(rows), device=block.device), ids] = -torch.inf
        return block, shift, error


class NeighbourIndex:
    """A faiss index over some users' vectors: flat up to 20,000 of them, inverted lists above.

    Args:
        vectors_UD: float32 vectors of the indexed users.
        first_row: position of the first of them among all users.
        probes: cells that a search looks into; more finds more of the true neighbours.
        seed: of the coarse quantizer's training.
    """

    def __init__(
        self, vectors_UD: np.ndarray, *, first_row: int = 0, probes: int = 16, seed: int = 0
    ) -> None:
        import faiss

        faiss.omp_set_num_threads(num_threads())
        count, width = vectors_UD.shape
        self.first_row, self.count = first_row, count
        if count <= _FLAT_LIMIT:
            self.index: Any = faiss.IndexFlatL2(width)
        else:
            cells = int(4 * np.sqrt(count))
            self.index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, cells)
            self.index.nprobe = min(probes, cells)
            self.index.cp.seed, self.index.cp.niter = seed, 8
            chosen = np.random.default_rng(seed).permutation(count)[: _CELL_POINTS * cells]
            self.index.train(np.ascontiguousarray(vectors_UD[np.sort(chosen)]))
        self.index.add(np.ascontiguousarray(vectors_UD, dtype=np.float32))

    def search(self, queries_BD: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest `length` indexed users of each query.

        Returns:
            columns `[B, length]` int64 positions among all users, -1 where none was found; similarities float32, -inf
            there.
        """
        found = min(length, self.count)
        distances, columns = self.index.search(np.ascontiguousarray(queries_BD, dtype=np.float32), found)
        missing = columns < 0
        columns = np.where(missing, -1, columns + self.first_row)
        return columns, np.where(missing, -np.inf, -distances).astype(np.float32)


def merge_found(parts: list[tuple[np.ndarray, np.ndarray]], own: np.ndarray, length: int) -> NeighbourLists:
    """Lists of the nearest `length` users out of what several indexes found.

    Args:
        parts: columns and similarities of each index, `[B, any]`.
        own: position of each query among all users; not listed.
        length: entries wanted of each row; a row for which fewer were found has fewer.
    """
    columns = np.concatenate([p[0] for p in parts], axis=1)
    values = np.concatenate([p[1] for p in parts], axis=1)
    if len(parts) > 1:
        order = np.argsort(-values, axis=1, kind="stable")[:, : length + 1]
        columns, values = (
            np.take_along_axis(columns, order, axis=1),
            np.take_along_axis(values, order, axis=1),
        )
    real = np.isfinite(values) & (columns != own[:, None])
    real &= np.cumsum(real, axis=1) <= length
    starts = np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int64)
    bound = np.where(real.any(axis=1), np.where(real, values, np.inf).min(axis=1), 0.0)
    return NeighbourLists(starts, columns[real].astype(np.int32), values[real], bound.astype(np.float32))


def nearest_lists(
    vectors_UD: np.ndarray,
    index: NeighbourIndex,
    rows: slice,
    length: int,
    on_rows: OnRows | None = None,
) -> NeighbourLists:
    """Approximate lists of a range of rows from one index over all users, in blocks."""
    parts = []
    for low, high in row_blocks(rows.stop - rows.start, 16 * length, BLOCK_BYTES):
        own = np.arange(rows.start + low, rows.start + high)
        parts.append(merge_found([index.search(vectors_UD[own], length + 1)], own, length))
        if on_rows:
            on_rows(high - low)
    return concatenate(parts)


def concatenate(parts: list[NeighbourLists]) -> NeighbourLists:
    """Ranges one after the other."""
    ends = np.cumsum([0] + [p.entries for p in parts])
    return NeighbourLists(
        np.concatenate([p.starts_R[:-1] + end for p, end in zip(parts, ends, strict=False)] + [ends[-1:]]),
        np.concatenate([p.columns_M for p in parts]),
        np.concatenate([p.similarities_M for p in parts]),
        np.concatenate([p.bound_R for p in parts]),
    )


def reverse_edges(lists: NeighbourLists, first_row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The listed pairs the other way round: rows int64 and columns int32 among all users, similarities float32."""
    rows = np.repeat(np.arange(lists.rows) + first_row, np.diff(lists.starts_R))
    return lists.columns_M.astype(np.int64), rows.astype(np.int32), lists.similarities_M


def with_edges(
    lists: NeighbourLists, first_row: int, rows: np.ndarray, columns: np.ndarray, values: np.ndarray
) -> NeighbourLists:
    """Lists with further pairs added where they are not listed yet; bounds stay, they still hold.

    Args:
        lists: of a range of rows.
        first_row: where the range begins.
        rows: int64 rows of the new pairs among all users, all in the range.
        columns: int32.
        values: float32 similarities.
    """
    own = np.repeat(np.arange(lists.rows, dtype=np.int64), np.diff(lists.starts_R))
    known = np.sort(own << 32 | lists.columns_M)
    local = rows - first_row
    wanted, first = np.unique(local << 32 | columns, return_index=True)
    place = np.minimum(np.searchsorted(known, wanted), max(len(known) - 1, 0))
    new = first[known[place] != wanted] if len(known) else first
    extra = np.bincount(local[new], minlength=lists.rows)
    starts = lists.starts_R + np.concatenate([[0], np.cumsum(extra)])
    places = np.repeat(starts[1:] - extra, extra) + _ranks(extra)

    def merged(old: np.ndarray, added: np.ndarray) -> np.ndarray:
        longer = np.empty(int(starts[-1]), dtype=old.dtype)
        kernels.copy_lists(lists.starts_R, starts, old, longer)
        longer[places] = added[new]
        return longer

    return NeighbourLists(
        starts, merged(lists.columns_M, columns), merged(lists.similarities_M, values), lists.bound_R
    )


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, ..."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


class IndexNeighbours:
    """Further neighbours from an approximate index, up to a limit; see `lists.NeighbourSource`.

    A row whose list has reached the limit gets nothing more and a bound of -inf: it is counted in `stopped`.

    Args:
        similarities: of all users.
        search: vectors and length -> columns and similarities, over all users.
        first_row: where the range of rows begins.
        most: longest list.
    """

    def __init__(
        self,
        similarities: VectorSimilarities,
        search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
        first_row: int,
        most: int,
    ) -> None:
        self.similarities, self.search, self.first_row, self.most = similarities, search, first_row, most
        self.stopped = 0
        """Rows that would have grown beyond the limit."""

    def further(
        self, rows: np.ndarray, columns: list[np.ndarray], above: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """As in `lists.NeighbourSource`, but lists only double, and stop at the limit."""
        lengths = np.array([len(c) for c in columns])
        known = np.repeat(np.arange(len(rows), dtype=np.int64), lengths) << 32 | np.concatenate(columns)
        known.sort()
        vectors = self.similarities.vectors_UD.numpy()
        bounds = np.full(len(rows), -np.inf, dtype=np.float32)
        wanted = np.minimum(2 * lengths, self.most)
        pairs = []
        for length in np.unique(wanted[wanted > lengths]):
            chosen = np.flatnonzero((wanted == length) & (wanted > lengths))
            for low, high in row_blocks(len(chosen), 32 * int(length), BLOCK_BYTES):
                some = chosen[low:high]
                own = rows[some] + self.first_row
                found, values = self.search(vectors[own], int(length) + 1)
                real = (found >= 0) & (found != own[:, None])
                pair = (some[:, None] << 32 | found)[real]
                place = np.minimum(np.searchsorted(known, pair), len(known) - 1)
                pair = pair[known[place] != pair]
                pairs.append(pair)
                # a list that found nothing new has all that the index can give it
                more = np.isin(some, pair >> 32)
                farthest = np.where(real, values, np.inf).min(axis=1)
                bounds[some[more]] = farthest[more]
        pair = np.sort(np.concatenate(pairs)) if pairs else np.empty(0, dtype=np.int64)
        of, found = pair >> 32, (pair & 0xFFFFFFFF).astype(np.int32)
        exact = self.similarities.pairs(rows[of] + self.first_row, found)
        ends = np.cumsum(np.bincount(of, minlength=len(rows)))[:-1]
        self.stopped += int((wanted <= lengths).sum())
        return np.split(found, ends), np.split(exact, ends), bounds
