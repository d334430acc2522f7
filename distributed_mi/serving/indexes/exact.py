"""Every query against every item: the reference that other indexes are measured against."""

import numpy as np

from distributed_mi.core.config import ConfigModel
from distributed_mi.core.errors import InputError
from distributed_mi.serving.indexes.base import Ids, ItemIndex, Vectors, check_items


class ExactIndex(ItemIndex):
    """Brute force: one matrix product per query block; 2 * R * D operations a query."""

    class Config(ConfigModel):
        """Nothing to choose."""

    def __init__(self, config: "ExactIndex.Config", dim: int) -> None:
        super().__init__(config, dim)
        self._ids = np.zeros(0, dtype=np.int64)
        self._vectors = np.zeros((0, dim), dtype=np.float32)

    @property
    def num_items(self) -> int:
        """See `ItemIndex.num_items`."""
        return len(self._ids)

    def add(self, ids_R: Ids, vectors_RD: Vectors) -> None:
        """See `ItemIndex.add`."""
        check_items(ids_R, vectors_RD, self.dim)
        if not len(self._ids):
            ids, vectors = ids_R, vectors_RD  # the usual single call keeps the caller's memory
        else:
            ids, vectors = np.concatenate([self._ids, ids_R]), np.concatenate([self._vectors, vectors_RD])
        distinct, counts = np.unique(ids, return_counts=True)
        if len(distinct) != len(ids):
            raise InputError(f"index: item id {int(distinct[counts.argmax()])} is added twice")
        self._ids, self._vectors = ids, vectors

    def search(self, queries_QD: Vectors, k: int) -> tuple[Vectors, Ids]:
        """See `ItemIndex.search`."""
        scores_Qk = np.full((len(queries_QD), k), -np.inf, dtype=np.float32)
        ids_Qk = np.zeros((len(queries_QD), k), dtype=np.int64)
        found = min(k, self.num_items)
        if found == 0:
            return scores_Qk, ids_Qk
        for row, query in enumerate(queries_QD):  # one at a time: memory stays at one number per item
            scores = self._vectors @ query
            worst = np.partition(scores, -found)[-found]
            candidates = np.flatnonzero(scores >= worst)  # more than k when the last place is tied
            order = candidates[np.lexsort((self._ids[candidates], -scores[candidates]))[:found]]
            scores_Qk[row, :found], ids_Qk[row, :found] = scores[order], self._ids[order]
        return scores_Qk, ids_Qk


INDEX = ExactIndex
