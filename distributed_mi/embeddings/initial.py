"""First values of table rows: normal numbers that depend on (seed, row, column) alone.

So a table starts the same on any number of workers and at any number of rows, and a shard of a large table costs
its own rows only. The numbers come from a counter: a 64-bit mixing function (the finaliser of splitmix64, Steele et
al. 2014) hashes (seed, row, pair of columns), and Box-Muller turns the two halves of the hash into two normal
numbers.
"""

import numpy as np

from distributed_mi.core.seeding import stream_key

_ROWS_AT_ONCE = 65_536
"""Rows made in one go; bounds the temporary memory (a few float64 arrays of this many rows)."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """Bijection of 64-bit numbers in which every input bit flips each output bit with probability near one half."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def normal_rows(ids_R: np.ndarray, dim: int, *, seed: int, std: float) -> np.ndarray:
    """Initial values of some rows.

    Args:
        ids_R: row numbers; row 0 is padding and stays zero.
        dim: D, width of a row.
        seed: seed of the run.
        std: standard deviation of a value.

    Returns:
        `[R, D]` float32.
    """
    out = np.empty((len(ids_R), dim), dtype=np.float32)
    for start in range(0, len(ids_R), _ROWS_AT_ONCE):
        part = ids_R[start : start + _ROWS_AT_ONCE]
        out[start : start + _ROWS_AT_ONCE] = _normal(part, dim, stream_key(seed, "item-table")) * std
    out[ids_R == 0] = 0.0
    return out


def _normal(ids_R: np.ndarray, dim: int, key: int) -> np.ndarray:
    rows = _mix(ids_R.astype(np.uint64) * _GOLDEN + np.uint64(key))[:, None]
    pairs = np.arange(1, (dim + 1) // 2 + 1, dtype=np.uint64)[None, :]
    bits = _mix(rows + pairs * _GOLDEN)
    radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(32)).astype(np.float64) + 1.0) * 2.0**-32))
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return normal.reshape(len(ids_R), -1)[:, :dim]
