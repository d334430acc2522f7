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

_LENGTH_STEPS = 4
"""Lists that grow are searched for together when the lengths that they want differ by less than the root of this order
of two."""

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

    def further(self, rows: np.ndarray, known: NeighbourLists, above: np.ndarray) -> NeighbourLists:
        """As in `lists.NeighbourSource`; each list becomes `_GROWTH` times as long as the similarities ask for."""
        users = self.similarities.users
        bounds = np.full(len(rows), -np.inf, dtype=np.float32)
        columns: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for low, high in row_blocks(len(rows), 4 * users):
            block, shift, error = self._block(rows[low:high])
            lengths = torch.from_numpy(np.diff(known.starts_R[low : high + 1])).to(block.device)
            places = torch.arange(high - low, device=block.device).repeat_interleave(lengths)
            listed = known.columns_M[known.starts_R[low] : known.starts_R[high]]
            block[places, torch.from_numpy(listed).to(block.device, torch.int64)] = -torch.inf
            least = torch.from_numpy(above[low:high]).to(block.device, torch.float32) - shift - error
            needed = (block > least[:, None]).sum(dim=1)
            wanted = (_GROWTH * (needed + lengths)).long() + 1 - lengths
            wanted = torch.minimum(torch.maximum(wanted, needed), users - 1 - lengths)
            top = block.topk(int(wanted.max()), dim=1)
            chosen = torch.arange(top.indices.shape[1], device=block.device) < wanted[:, None]
            columns.append(top.indices[chosen].cpu().numpy().astype(np.int32))
            counts.append(wanted.cpu().numpy())
            last = top.values.gather(1, (wanted - 1).clamp_min(0)[:, None]).flatten() + shift + error
            more = (wanted > 0) & (wanted + lengths < users - 1)
            bounds[low:high] = torch.where(more, last, -torch.inf).cpu().numpy()
        found, count = np.concatenate(columns), np.concatenate(counts)
        values = self.similarities.pairs(np.repeat(rows + self.first_row, count), found)
        return NeighbourLists(np.concatenate([[0], np.cumsum(count)]), found, values, bounds)

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

    def order(self) -> np.ndarray | None:
        """The indexed users cell by cell, int64 positions among them; None for an index without cells.

        Those who ask one after the other in this order look into the same cells, and find much the same users.
        """
        import faiss

        if not hasattr(self.index, "invlists"):
            return None
        cells = self.index.invlists
        sizes = [cells.list_size(c) for c in range(cells.nlist)]
        return np.concatenate(
            [faiss.rev_swig_ptr(cells.get_ids(c), size).copy() for c, size in enumerate(sizes) if size]
        )

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
    order = index.order()
    if order is None or len(order) != len(vectors_UD):
        order = np.arange(rows.start, rows.stop)
    else:
        order = order[(order >= rows.start) & (order < rows.stop)]
    parts = []
    for low, high in row_blocks(len(order), 16 * length, BLOCK_BYTES):
        own = order[low:high]
        parts.append(merge_found([index.search(vectors_UD[own], length + 1)], own, length))
        if on_rows:
            on_rows(high - low)
    back = np.empty(len(order), dtype=np.int64)
    back[order - rows.start] = np.arange(len(order))
    return concatenate(parts).take(back)


def measure(lists: NeighbourLists, similarities: Similarities, first_row: int = 0) -> None:
    """Replace the similarities of the listed pairs, which an index rounds, by exact ones."""
    for low, high in row_blocks(lists.rows, 16 * max(1, lists.entries // max(1, lists.rows))):
        part = slice(lists.starts_R[low], lists.starts_R[high])
        own = np.repeat(np.arange(low, high) + first_row, np.diff(lists.starts_R[low : high + 1]))
        lists.similarities_M[part] = similarities.pairs(own, lists.columns_M[part])


def concatenate(parts: list[NeighbourLists]) -> NeighbourLists:
    """Ranges one after the other."""
    ends = np.cumsum([0] + [p.entries for p in parts])
    return NeighbourLists(
        np.concatenate([p.starts_R[:-1] + end for p, end in zip(parts, ends, strict=False)] + [ends[-1:]]),
        np.concatenate([p.columns_M[: p.entries] for p in parts]),
        np.concatenate([p.similarities_M[: p.entries] for p in parts]),
        np.concatenate([p.bound_R for p in parts]),
    )


def reverse_edges(lists: NeighbourLists, first_row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The listed pairs the other way round: rows int64 and columns int32 among all users, similarities float32."""
    rows = np.repeat(np.arange(lists.rows) + first_row, np.diff(lists.starts_R))
    entries = slice(0, lists.entries)
    return (
        lists.columns_M[entries].astype(np.int64),
        rows.astype(np.int32),
        lists.similarities_M[entries],
    )


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
    counts = np.bincount(rows - first_row, minlength=lists.rows)
    other_starts = np.concatenate([[0], np.cumsum(counts)])
    others, other_values = np.empty(len(rows), dtype=np.int32), np.empty(len(rows), dtype=np.float32)
    kernels.sort_by_row(rows, first_row, columns, values, other_starts[:-1].copy(), others, other_values)
    users = 1 + max(int(lists.columns_M[: lists.entries].max(initial=-1)), int(others.max(initial=-1)))
    starts = np.empty_like(lists.starts_R)
    joined = np.empty(lists.entries + len(rows), dtype=np.int32)
    similarities = np.empty(len(joined), dtype=np.float32)
    kernels.join_lists(
        lists.starts_R,
        lists.columns_M,
        lists.similarities_M,
        other_starts,
        others,
        other_values,
        np.full(users, -1, dtype=np.int64),
        starts,
        joined,
        similarities,
    )
    end = int(starts[-1])
    return NeighbourLists(starts, joined[:end].copy(), similarities[:end].copy(), lists.bound_R)


class IndexNeighbours:
    """Further neighbours from an approximate index, up to a limit; see `lists.NeighbourSource`.

    A row whose list has reached the limit gets nothing more and a bound of -inf: it is counted in `stopped`.

    Args:
        similarities: of all users.
        search: vectors and length -> columns and similarities, over all users.
        first_row: where the range of rows begins.
        most: longest list.
        order_R: the range's rows in the order in which the index is best asked for them; see `NeighbourIndex.order`.
    """

    def __init__(
        self,
        similarities: VectorSimilarities,
        search: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
        first_row: int,
        most: int,
        order_R: np.ndarray | None = None,
    ) -> None:
        self.similarities, self.search, self.first_row, self.most = similarities, search, first_row, most
        self.rank_R: np.ndarray | None = None
        if order_R is not None:
            self.rank_R = np.empty_like(order_R)
            self.rank_R[order_R] = np.arange(len(order_R))
        self._mark_U = np.full(similarities.users, -1, dtype=np.int64)
        self.stopped = 0
        """Rows that would have grown beyond the limit."""

    def further(self, rows: np.ndarray, known: NeighbourLists, above: np.ndarray) -> NeighbourLists:
        """As in `lists.NeighbourSource`, but lists only double, and stop at the limit."""
        lengths = np.diff(known.starts_R)
        vectors = self.similarities.vectors_UD.numpy()
        wanted = np.minimum(2 * lengths, self.most)
        self.stopped += int((wanted <= lengths).sum())
        bounds = np.full(len(rows), -np.inf, dtype=np.float32)
        of: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
        columns: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
        # lists of about the same length ask together, for as many as the longest of them wants
        step = np.ceil(np.log2(np.maximum(wanted, 1)) * _LENGTH_STEPS)
        for this in np.unique(step[wanted > lengths]):
            chosen = np.flatnonzero((step == this) & (wanted > lengths))
            if self.rank_R is not None:
                chosen = chosen[np.argsort(self.rank_R[rows[chosen]])]
            length = int(wanted[chosen].max())
            for low, high in row_blocks(len(chosen), 32 * length, BLOCK_BYTES):
                some = chosen[low:high]
                own = rows[some] + self.first_row
                found, values = self.search(vectors[own], length + 1)
                keep = np.empty(found.shape, dtype=np.bool_)
                listed = known.take(some)
                # a list that found nothing new has all that the index can give it
                farthest = np.empty(len(some), dtype=np.float32)
                kernels.keep_new(
                    found, values, own, listed.starts_R, listed.columns_M, self._mark_U, keep, farthest
                )
                bounds[some] = farthest
                of.append(np.repeat(some, keep.sum(axis=1)))
                columns.append(found[keep].astype(np.int32))
        row_of, column = np.concatenate(of), np.concatenate(columns)
        order = np.argsort(row_of, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(rows)))])
        new = NeighbourLists(starts, column[order], np.empty(len(column), dtype=np.float32), bounds)
        new.similarities_M = self.similarities.pairs(rows[row_of[order]] + self.first_row, new.columns_M)
        return new
