"""The messages of affinity propagation for a range of rows, and what they have in common however they are kept.

    r(i,k) <- s(i,k) - max_{k' != k} (a(i,k') + s(i,k'))
    a(i,k) <- min(0, r(k,k) + sum_{i' not in {i,k}} max(0, r(i',k)))        a(k,k) <- sum_{i' != k} max(0, r(i',k))

A responsibility needs its row, an availability its row and one sum per column. So the availabilities of round t and the
responsibilities of round t + 1 are made in one pass over memory, row by row; only the column sums and the diagonals
wait for the end of a round. That is also all that row ranges on different machines have to exchange.

    TorchMessages   whole rows, 12 bytes a pair, any device (the GPU's; on a CPU the yardstick of the tests)
    DenseMessages   whole rows, 12 bytes a pair, compiled for CPUs
    ListMessages    (`lists.py`) only the pairs that can matter

Shapes:  U users, R rows of this range.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from distributed_mi.exemplars import kernels
from distributed_mi.exemplars.similarity import row_blocks

Reduce = Callable[[np.ndarray], np.ndarray]
"""Adds up the column sums `[U]` float64 of all row ranges."""

STRIPS = 32
"""Parts into which the rows are cut for threads. Their number is fixed and their column sums are added in order, so the
number of threads changes no bit."""

_BLOCK_BYTES = 1 << 20
"""Size of one matrix's part of a block of `TorchMessages`. Four of them are in use at a time and should stay in the
cache."""

_ZERO_BELIEF = 3e-7
"""|r(k,k) + a(k,k)|, as a share of its two parts, that is float32 rounding of zero."""


def num_threads() -> int:
    """Threads for compiled kernels: torch's number, which users set and schedulers export, at most one a core."""
    return max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


class Messages(ABC):
    """Rows `first_row` to `first_row + R` of all messages.

    Args:
        users: U.
        first_row: where the range begins.
        preferences_R: self-similarities of the range, float64.
        damping: weight of the previous message.
        reduce: adds up column sums over all ranges; None: there is only this one.
    """

    _reach_rounding = 0.0
    """Rounding of a row's largest availability plus similarity, as a share of it, where that sum is made in float32: a
    belief far smaller than the similarities drowns in it."""

    def __init__(
        self,
        users: int,
        first_row: int,
        preferences_R: np.ndarray,
        damping: float,
        reduce: Reduce | None = None,
    ) -> None:
        self.users, self.first_row, self.damping = users, first_row, damping
        self.rows = len(preferences_R)
        self.preferences_R = np.asarray(preferences_R, dtype=np.float64).copy()
        self._reduce = reduce or (lambda sums: sums)
        # what waits for the end of a round: r(k,k) + the positive r(i,k) of the others, and both diagonals
        self.column_sums_U = np.zeros(users)
        self.self_responsibility_R = np.zeros(self.rows)
        self.self_availability_R = np.zeros(self.rows)
        self.strips = [
            (low, high)
            for s in range(STRIPS)
            if (low := self.rows * s // STRIPS) < (high := self.rows * (s + 1) // STRIPS)
        ]
        self.threads = ThreadPoolExecutor(num_threads())

    @property
    def own(self) -> slice:
        """The range among all users."""
        return slice(self.first_row, self.first_row + self.rows)

    def round(self) -> np.ndarray:
        """One round of both messages.

        Returns:
            belief_R float64: how much speaks for each user of the range being an exemplar; exactly 0 where it is
            rounding.
        """
        sums_U, reach_R = self._pass()
        take = 1.0 - self.damping
        self.self_responsibility_R *= self.damping
        self.self_responsibility_R += take * (self.preferences_R - reach_R)
        sums_U[self.own] += self.self_responsibility_R
        self.column_sums_U = self._reduce(sums_U)
        fresh_R = self.column_sums_U[self.own] - self.self_responsibility_R
        self.self_availability_R *= self.damping
        self.self_availability_R += take * fresh_R
        belief_R = self.self_availability_R + self.self_responsibility_R
        size_R = np.abs(self.self_availability_R) + np.abs(self.self_responsibility_R)
        belief_R[np.abs(belief_R) <= _ZERO_BELIEF * size_R + self._reach_rounding * np.abs(reach_R)] = 0.0
        return belief_R

    def set_preferences(self, preferences_U: np.ndarray) -> None:
        """Other self-similarities from the next round on; float64 `[U]`, of which the range takes its part."""
        self.preferences_R = np.array(preferences_U[self.own], dtype=np.float64)

    @abstractmethod
    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        """Both messages off the diagonal.

        Returns:
            sums_U float64, positive responsibilities by column, the diagonal left out; reach_R float64, each row's
            largest availability plus similarity off the diagonal.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Everything a later `restore` needs to go on with the same bits."""
        return {
            "preferences": self.preferences_R,
            "column_sums": self.column_sums_U,
            "self_responsibility": self.self_responsibility_R,
            "self_availability": self.self_availability_R,
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self.preferences_R = state["preferences"].copy()
        self.column_sums_U = state["column_sums"].copy()
        self.self_responsibility_R = state["self_responsibility"].copy()
        self.self_availability_R = state["self_availability"].copy()

    @property
    def _self_values(self) -> np.ndarray:
        return self.self_availability_R + self.preferences_R

    def _over_strips(self, work: Callable[[int, int], np.ndarray]) -> np.ndarray:
        """Run `work(low, high)` for every strip and add up what it returns, in order."""
        total = np.zeros(self.users)
        for part in self.threads.map(lambda strip: work(*strip), self.strips):
            total += part
        return total


class DenseMessages(Messages):
    """All pairs of the range: similarities and two messages, 12 bytes each.

    Args:
        similarities_RU: float32 rows. Their diagonal is overwritten with -inf; `first_row` and on as in `Messages`.
    """

    _reach_rounding = 1e-7

    def __init__(
        self,
        similarities_RU: np.ndarray,
        first_row: int,
        preferences_R: np.ndarray,
        damping: float,
        reduce: Reduce | None = None,
    ) -> None:
        rows, users = similarities_RU.shape
        super().__init__(users, first_row, preferences_R, damping, reduce)
        self.similarities_RU = similarities_RU
        similarities_RU[np.arange(rows), np.arange(first_row, first_row + rows)] = -np.inf
        self.responsibilities_RU = np.zeros_like(similarities_RU)
        self.availabilities_RU = np.zeros_like(similarities_RU)
        self._first_R, self._second_R = (np.empty(rows, dtype=np.float32) for _ in range(2))
        self._best_R = np.empty(rows, dtype=np.int64)

    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        totals_U = self.column_sums_U.astype(np.float32)
        self_value_R = self._self_values.astype(np.float32)

        def strip(low: int, high: int) -> np.ndarray:
            sums_U = np.zeros(self.users)
            kernels.dense_rows(
                self.similarities_RU,
                self.responsibilities_RU,
                self.availabilities_RU,
                low,
                high,
                totals_U,
                self_value_R,
                self.damping,
                sums_U,
                self._first_R,
                self._second_R,
                self._best_R,
            )
            return sums_U

        sums_U = self._over_strips(strip)
        reach_R = np.where(self._best_R == kernels.SELF, self._second_R, self._first_R)
        return sums_U, reach_R.astype(np.float64)

    def state(self) -> dict[str, np.ndarray]:
        """The messages too; the similarities are the caller's."""
        return super().state() | {
            "responsibilities": self.responsibilities_RU,
            "availabilities": self.availabilities_RU,
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        super().restore(state)
        self.responsibilities_RU[:] = state["responsibilities"]
        self.availabilities_RU[:] = state["availabilities"]


def _one_thread() -> None:
    """Run torch's operations of the calling thread on one core."""
    torch.set_num_threads(1)


class TorchMessages(Messages):
    """All pairs, in blocks of torch operations on the similarities' device.

    Args:
        similarities: `[U, U]` float32. The diagonal is overwritten with -inf.
        preferences_U: self-similarities, float64.
        damping: weight of the previous message.
        block_rows: rows handled at a time; None: as many as keep a block in the cache.
    """

    _reach_rounding = 1e-7

    def __init__(
        self,
        similarities: Tensor,
        preferences_U: np.ndarray,
        damping: float,
        block_rows: int | None = None,
    ) -> None:
        users = len(similarities)
        super().__init__(users, 0, preferences_U, damping)
        self.similarities = similarities
        similarities.diagonal().fill_(-torch.inf)
        self.responsibilities = torch.zeros_like(similarities)
        self.availabilities = torch.zeros_like(similarities)
        self.block_bytes = block_rows * 4 * users if block_rows else _BLOCK_BYTES
        if similarities.device.type != "cpu":
            self.strips, self.block_bytes = [(0, users)], 256 * _BLOCK_BYTES
        # Parallel operations on small blocks would meet at a barrier after each of them, and one busy core would then
        # stop all (seen beside another program: 27 s a round, with strips 0.6 s).
        self.threads = ThreadPoolExecutor(num_threads(), initializer=_one_thread)

    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        device = self.similarities.device
        totals = torch.from_numpy(self.column_sums_U).to(device, torch.float32)
        own = torch.from_numpy(self._self_values).to(device, torch.float32)
        reach = torch.empty_like(own)

        @torch.inference_mode()
        def strip(low: int, high: int) -> np.ndarray:
            sums = torch.zeros(self.users, dtype=torch.float64, device=device)
            for start, stop in row_blocks(high - low, 4 * self.users, self.block_bytes):
                self._block(slice(low + start, low + stop), totals, own, reach, sums)
            return sums.cpu().numpy()

        return self._over_strips(strip), reach.double().cpu().numpy()

    def _block(self, rows: slice, totals: Tensor, own: Tensor, reach: Tensor, sums: Tensor) -> None:
        similarities, take = self.similarities[rows], 1.0 - self.damping
        responsibilities, availabilities = self.responsibilities[rows], self.availabilities[rows]
        scratch = torch.clamp_min(responsibilities, 0.0)
        torch.sub(totals, scratch, out=scratch).clamp_(max=0.0)
        availabilities.lerp_(scratch, take)
        torch.add(availabilities, similarities, out=scratch)
        best = scratch.argmax(dim=1, keepdim=True)
        first = scratch.gather(1, best)
        scratch.scatter_(1, best, -torch.inf)
        second = scratch.amax(dim=1, keepdim=True)
        reach[rows] = first.flatten()
        self_value = own[rows, None]
        second, first = (
            torch.maximum(torch.minimum(first, self_value), second),
            torch.maximum(first, self_value),
        )
        # where the row's own diagonal is the largest, every pair is held against it
        pair_best = torch.where(self_value >= first, first, second)
        torch.sub(similarities, first, out=scratch)
        scratch.scatter_(1, best, similarities.gather(1, best) - pair_best)
        # lerp would make NaN of the infinite diagonal
        responsibilities.mul_(self.damping).add_(scratch, alpha=take)
        torch.clamp_min(responsibilities, 0.0, out=scratch)
        sums += scratch.sum(dim=0)

    def state(self) -> dict[str, np.ndarray]:
        """The messages too; the similarities are the caller's."""
        return super().state() | {
            "responsibilities": self.responsibilities.cpu().numpy(),
            "availabilities": self.availabilities.cpu().numpy(),
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        super().restore(state)
        self.responsibilities.copy_(torch.from_numpy(state["responsibilities"]))
        self.availabilities.copy_(torch.from_numpy(state["availabilities"]))
