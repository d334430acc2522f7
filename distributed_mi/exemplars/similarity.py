"""Negative squared Euclidean distances in row blocks, and the memory they take.

Sums run in float64 on centred vectors and are rounded to float32 once, so that the similarities of close users do not
drown in the length of their vectors (|x|^2 + |y|^2 - 2 x.y cancels). Equal vectors have a similarity of exactly 0.

Shapes:  U users, D text width, B rows of a block.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 32 << 20
"""Size of the float64 scratch block: large enough for an efficient matrix product, small beside the result."""

_ROUNDING = 1e-14
"""Squared distances below this fraction of |x|^2 + |y|^2 are float64 rounding (2e-16 * sqrt(D)): they are zero."""


def row_blocks(rows: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """First and last-plus-one row of consecutive blocks of about `block_bytes`."""
    step = max(1, block_bytes // max(row_bytes, 1))
    for low in range(0, rows, step):
        yield low, min(low + step, rows)


class Similarity:
    """Similarities of any users to a fixed set of points.

    Args:
        points_PD: the fixed points.
    """

    def __init__(self, points_PD: Tensor) -> None:
        points = points_PD.to(torch.float64)
        self._mean_D = points.mean(dim=0)
        self._points_PD = points - self._mean_D
        self._norms_P = self._points_PD.square().sum(dim=1)

    def rows(self, vectors_BD: Tensor) -> Tensor:
        """Similarities `[B, P]` float32 of a block of vectors to every point."""
        block = vectors_BD.to(torch.float64) - self._mean_D
        norms = block.square().sum(dim=1, keepdim=True) + self._norms_P
        distances = torch.addmm(norms, block, self._points_PD.T, alpha=-2.0)
        distances.masked_fill_(distances <= norms.mul_(_ROUNDING), 0.0)
        return distances.neg_().to(torch.float32)


def similarity_matrix(vectors_UD: Tensor) -> Tensor:
    """The whole matrix `[U, U]` float32: 4 * U * U bytes; the diagonal is 0."""
    users = len(vectors_UD)
    similarity = Similarity(vectors_UD)
    matrix_UU = torch.empty(users, users, dtype=torch.float32, device=vectors_UD.device)
    for low, high in row_blocks(users, 8 * users):
        matrix_UU[low:high] = similarity.rows(vectors_UD[low:high])
    matrix_UU.fill_diagonal_(0.0)
    return matrix_UU


def available_memory_bytes() -> int | None:
    """Memory that this machine or container still has, in bytes; None where Linux does not say."""
    found = [n for n in (_meminfo_available(), _cgroup_available()) if n is not None]
    return min(found) if found else None


def _meminfo_available() -> int | None:
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    folder = Path("/sys/fs/cgroup")
    limit, used = folder / "memory.max", folder / "memory.current"
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text(encoding="utf-8").strip()
    if text == "max":
        return None
    # file cache that the kernel would give up first does not count as used
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    held = int(used.read_text(encoding="utf-8")) - int(stat.get("inactive_file", 0))
    return max(0, int(text) - held)
