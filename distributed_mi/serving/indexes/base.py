"""What an item index takes and gives. A file of this folder exports its subclass as `INDEX`.

Shapes:  R items, Q queries, D width, k list length.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from distributed_mi.core.config import ConfigModel
from distributed_mi.core.errors import InputError

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


class ItemIndex(ABC):
    """Items by largest inner product. `exact` is the reference; others may miss items but never invent one."""

    Config: ClassVar[type[ConfigModel]]

    def __init__(self, config: Any, dim: int) -> None:
        self.config = config
        self.dim = dim

    @property
    @abstractmethod
    def num_items(self) -> int:
        """Items added so far."""

    @abstractmethod
    def add(self, ids_R: Ids, vectors_RD: Vectors) -> None:
        """Add items.

        Args:
            ids_R: int64, each at least 1 and not added before.
            vectors_RD: float32; kept by reference where the index can.

        Raises:
            InputError: shapes do not fit, a vector is not finite, or an id is 0 or there already.
        """

    @abstractmethod
    def search(self, queries_QD: Vectors, k: int) -> tuple[Vectors, Ids]:
        """The k items with the largest inner product for each query.

        Returns:
            scores_Qk float32 descending and ids_Qk int64; ties go to the smaller id. Places beyond the items that were
            found hold -inf and id 0.
        """


def check_items(ids_R: Ids, vectors_RD: Vectors, dim: int) -> None:
    """Checks that `add` of every index needs; see there for the errors."""
    if vectors_RD.shape != (len(ids_R), dim):
        raise InputError(
            f"index: {len(ids_R)} ids but vectors of shape {vectors_RD.shape}, width must be {dim}"
        )
    if len(ids_R) and int(ids_R.min()) < 1:
        raise InputError(f"index: item id {int(ids_R.min())}; ids count from 1, 0 is padding")
    bad = ~np.isfinite(vectors_RD).all(axis=1)
    if bad.any():
        raise InputError(
            f"index: the vector of item {int(ids_R[bad.argmax()])} has a value that is not a number"
        )
