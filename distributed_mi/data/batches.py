"""Sequences in memory as flat arrays, and what training and evaluation take from them: padded histories and targets.

Everything is numpy and vectorised over users; no torch, so that this stage stays light.

Shapes:  U users of a split, S events of all users, B users of a batch, L history (left-padded, newest item last).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa

from distributed_mi.core import schema
from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import InputError, UnknownUserError
from distributed_mi.core.seeding import stream
from distributed_mi.data import mapped

_CHECKED_AT_ONCE = 1 << 22
"""Events whose ids are looked at together: 32 MiB of a mapped file."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of one split, ordered by `user_index`.

    `items[offsets[u] : offsets[u + 1]]` are the items of row `u`, oldest first; the first `num_history_U[u]` of them
    are history, the rest are labels. A row is a position in these arrays; `user_index_U` says whose it is.

    Args:
        user_index_U: int64.
        user_id_U: outside ids, an Arrow string array (Python strings are made only where asked for).
        items: int64 `[S]` item indices.
        offsets: int64 `[U + 1]`.
        num_history_U: int64.
    """

    user_index_U: np.ndarray
    user_id_U: pa.Array
    items: np.ndarray
    offsets: np.ndarray
    num_history_U: np.ndarray

    @classmethod
    def read(cls, workspace: Workspace, split: str) -> Self:
        """Read a split of the complete prepare stage.

        Args:
            workspace: where prepare was run.
            split: `train`, `validation` or `test`.

        Raises:
            WorkspaceError: prepare is not complete.
        """
        columns = ["user_index", "user_id", "item_indices", "num_history"]
        table = workspace.stage("prepare").read(f"sequences/{split}", "sequences", columns=columns)
        return cls.from_table(table)

    @classmethod
    def map(cls, workspace: Workspace, split: str, folder: str, *, convert: bool = True) -> Self:
        """A split of the complete prepare stage as files mapped into memory; see `mapped`.

        Args:
            workspace: where prepare was run.
            split: `train`, `validation` or `test`.
            folder: on the local file system, for the files.
            convert: write the files when they are not there. False: another worker has done it.

        Raises:
            WorkspaceError: prepare is not complete.
        """
        if convert and not mapped.exists(folder):
            stage = workspace.stage("prepare")
            mapped.write(stage.fs, stage.path(f"sequences/{split}"), folder)
        return cls(**vars(mapped.read(folder)))

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """From a `sequences` table (timestamps are not needed), in any order of users."""
        columns = ["user_index", "user_id", "item_indices", "num_history"]
        schema.check(table.select(columns), "sequences", columns=columns)
        table = table.select(columns).sort_by("user_index").combine_chunks()
        lists = _single(table["item_indices"], pa.large_list(pa.int64()))
        begin = lists.offsets.to_numpy().astype(np.int64)
        return cls(
            user_index_U=table["user_index"].to_numpy(),
            user_id_U=_single(table["user_id"], pa.large_string()),
            items=lists.values.to_numpy()[begin[0] : begin[-1]],
            offsets=begin - begin[0],
            num_history_U=table["num_history"].to_numpy(),
        )

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_index_U)

    @property
    def num_events(self) -> int:
        """S, labels included."""
        return len(self.items)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Events of each row, labels included."""
        return np.diff(self.offsets)

    @cached_property
    def rows_with_history(self) -> np.ndarray:
        """Rows that have at least one event to read."""
        return np.flatnonzero(self.num_history_U > 0)

    @property
    def num_without_history(self) -> int:
        """Users that evaluation has to skip, because a model has nothing to read."""
        return self.num_users - len(self.rows_with_history)

    @property
    def user_ids(self) -> list[str]:
        """Outside ids of all rows as Python strings."""
        return list(self.user_id_U.to_pylist())

    def check_items(self, num_rows: int, rank: int = 0, size: int = 1) -> None:
        """Refuse events whose item is not in the catalogue.

        Args:
            num_rows: V, padding included.
            rank: which part of the events to look at.
            size: into how many parts they are cut.

        Raises:
            InputError: names the first such event's user, position and item.
        """
        first, last = share_bounds(self.num_events, rank, size)
        for start in range(first, last, _CHECKED_AT_ONCE):
            part = self.items[start : min(last, start + _CHECKED_AT_ONCE)]
            if int(part.min()) >= 1 and int(part.max()) < num_rows:
                continue
            event = start + int(np.flatnonzero((part < 1) | (part >= num_rows))[0])
            row = int(np.searchsorted(self.offsets, event, side="right")) - 1
            raise InputError(
                f'user "{self.user_id_U[row].as_py()}" (user_index {self.user_index_U[row]}) has item '
                f"{self.items[event]} as event {event - self.offsets[row] + 1} of {self.lengths[row]}; the catalogue "
                f"has items 1 to {num_rows - 1}. Sequences and catalogue are not of one prepare: run it again"
            )

    def row_of(self, user_id: str) -> int:
        """Row of an outside id.

        Raises:
            UnknownUserError: the split does not have that user.
        """
        row = self.user_id_U.index(user_id).as_py()
        if row < 0:
            raise UnknownUserError(
                f'user "{user_id}" is not among the {self.num_users:,} users of this split'
            )
        return int(row)

    def history(self, row: int) -> np.ndarray:
        """Items of one row that may be read, oldest first."""
        return self.items[self.offsets[row] : self.offsets[row] + self.num_history_U[row]]

    def labels(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels of rows, one after the other, and int64 offsets `[len(rows) + 1]` into them; duplicates are kept."""
        starts = self.offsets[rows] + self.num_history_U[rows]
        counts = self.offsets[np.asarray(rows) + 1] - starts
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts)
        return self.items[np.repeat(starts, counts) + within], bounds

    def histories(self, rows: np.ndarray, max_history: int) -> tuple[np.ndarray, np.ndarray]:
        """Padded histories of rows; see `pad_left`."""
        starts = self.offsets[rows]
        return pad_left(self.items, starts, starts + self.num_history_U[rows], max_history)


def _single(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """A column as one array of a type; an empty one too."""
    combined = column.cast(kind).combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        combined = combined.chunk(0) if combined.num_chunks else pa.array([], kind)
    return combined


def pad_left(
    items: np.ndarray, starts: np.ndarray, stops: np.ndarray, max_history: int
) -> tuple[np.ndarray, np.ndarray]:
    """The last `max_history` items of each slice `items[start:stop]`, at the right end of a row of zeros.

    Args:
        items: int64 `[S]`.
        starts: int64 `[B]`.
        stops: int64 `[B]`, not before `starts`.
        max_history: L.

    Returns:
        ids_BL int64, 0 on padding, and mask_BL bool, True on real items.
    """
    place_BL = np.asarray(stops)[:, None] - np.arange(max_history, 0, -1)
    mask_BL = place_BL >= np.asarray(starts)[:, None]
    if not len(items):
        return np.zeros(place_BL.shape, np.int64), mask_BL
    # Places before the first event are clipped, and masked.
    ids_BL = items.take(place_BL, mode="clip").astype(np.int64, copy=False)
    ids_BL *= mask_BL
    return ids_BL, mask_BL


class _Step:
    """What the samples of both target rules have in common: arrays whose first axis is the users."""

    def share(self, rank: int, size: int) -> Self:
        """The contiguous part of one of `size` workers; parts differ by one user at most."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        start, stop = share_bounds(len(arrays["user_rows_B"]), rank, size)
        cut = {name: x[start:stop] if isinstance(x, np.ndarray) else x for name, x in arrays.items()}
        return type(self)(**cut)


@dataclass(frozen=True)
class SampledStep(_Step):
    """Users, histories and one target each, of one training step or of a worker's share of it.

    Args:
        user_rows_B: int64 rows of the `Sequences`.
        user_index_B: int64.
        history_ids_BL: int64, left-padded with 0.
        history_mask_BL: bool, True on real items.
        target_ids_B: int64, the item after the history.
    """

    user_rows_B: np.ndarray
    user_index_B: np.ndarray
    history_ids_BL: np.ndarray
    history_mask_BL: np.ndarray
    target_ids_B: np.ndarray


@dataclass(frozen=True)
class EveryPositionStep(_Step):
    """Users and windows of their events, each event with the one after it as its target, for causal encoders.

    Args:
        user_rows_B: int64 rows of the `Sequences`.
        user_index_B: int64.
        history_ids_BL: int64, left-padded with 0: what may be read.
        history_mask_BL: bool, True on real items.
        target_ids_BL: int64, the item after each position; 0 where there is no target.
        target_mask_BL: bool, True where there is one.
        target_ids_B: int64, newest target of each user.
        num_targets: of the whole step, over all workers.
    """

    user_rows_B: np.ndarray
    user_index_B: np.ndarray
    history_ids_BL: np.ndarray
    history_mask_BL: np.ndarray
    target_ids_BL: np.ndarray
    target_mask_BL: np.ndarray
    target_ids_B: np.ndarray
    num_targets: int


def share_bounds(total: int, rank: int, size: int) -> tuple[int, int]:
    """First and one past the last of `total` things that worker `rank` of `size` takes."""
    return total * rank // size, total * (rank + 1) // size


class Sampler(ABC):
    """Users of a step, drawn without replacement; a step is a pure function of (seed, step).

    So it is the same after a restart and on every worker, and the number of the step is the position in the data.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        num_users_per_step: int,
        max_history: int,
        min_position: int = 4,
        seed: int = 0,
    ) -> None:
        """Find the users who can be drawn.

        Args:
            sequences: the training split.
            num_users_per_step: users of a step over all workers; all eligible ones when there are fewer.
            max_history: L.
            min_position: first position (from 0) that may be a target; ComiRec never predicts a user's first four
                events.
            seed: of the draws.

        Raises:
            InputError: no user has more than `min_position` events.
        """
        self.sequences = sequences
        self.max_history, self.min_position, self.seed = max_history, min_position, seed
        self.eligible_rows = np.flatnonzero(sequences.lengths > min_position)
        """Rows with at least one possible target."""
        if not len(self.eligible_rows):
            raise InputError(
                f"none of the {sequences.num_users:,} training users has more than {min_position} events, so there is "
                "no target to train on; lower train.min_position or loosen data.k_core"
            )
        self.num_users = min(num_users_per_step, len(self.eligible_rows))
        """B over all workers."""

    @property
    def num_excluded_users(self) -> int:
        """Training users who are never drawn because they have too few events."""
        return self.sequences.num_users - len(self.eligible_rows)

    @abstractmethod
    def sample(self, step: int, rank: int = 0, size: int = 1) -> SampledStep | EveryPositionStep:
        """Draw a step, or one worker's share of it (which then costs its share of the gathering).

        Args:
            step: number of the step.
            rank: this worker.
            size: all workers.
        """

    def _draw_rows(self, step: int) -> tuple[np.random.Generator, np.ndarray]:
        """The step's generator, and the rows of all of its users."""
        rng = stream(self.seed, "train-samples", step)
        chosen = rng.choice(len(self.eligible_rows), self.num_users, replace=False)
        return rng, self.eligible_rows[chosen]

    def _mine(self, rank: int, size: int) -> slice:
        return slice(*share_bounds(self.num_users, rank, size))


class TrainSampler(Sampler):
    """One random target per user, as in ComiRec and REMI.

    The target is event k, uniform in `min_position .. length - 1`; the history is what comes before it.
    """

    def sample(self, step: int, rank: int = 0, size: int = 1) -> SampledStep:
        """See `Sampler.sample`."""
        rng, rows_B = self._draw_rows(step)
        target_B = rng.integers(self.min_position, self.sequences.lengths[rows_B])
        mine = self._mine(rank, size)
        rows_B, target_B = rows_B[mine], target_B[mine]
        starts = self.sequences.offsets[rows_B]
        stops = starts + target_B
        ids_BL, mask_BL = pad_left(self.sequences.items, starts, stops, self.max_history)
        return SampledStep(
            rows_B, self.sequences.user_index_U[rows_B], ids_BL, mask_BL, self.sequences.items[stops]
        )


class EveryPositionSampler(Sampler):
    """Every position of a user is a target at once, as causal encoders (SASRec, GRU4Rec) train.

    A user with up to L + 1 events gives all of them. Of a longer one a window of L + 1 consecutive events is drawn,
    uniform over the windows, so that no event is left out for good; SASRec's code takes the newest window always.
    """

    def sample(self, step: int, rank: int = 0, size: int = 1) -> EveryPositionStep:
        """See `Sampler.sample`."""
        rng, rows_B = self._draw_rows(step)
        lengths_B = self.sequences.lengths[rows_B]
        window_B = np.minimum(lengths_B, self.max_history + 1)
        # The last event of a window is a target, so it may not stand before the first position that is allowed.
        earliest_B = np.maximum(window_B, self.min_position + 1)
        end_B = rng.integers(earliest_B, lengths_B + 1)
        first_target_B = np.maximum(end_B - window_B + 1, self.min_position)
        num_targets = int((end_B - first_target_B).sum())
        mine = self._mine(rank, size)
        rows_B, window_B, end_B, first_target_B = (x[mine] for x in (rows_B, window_B, end_B, first_target_B))
        starts = self.sequences.offsets[rows_B]
        begin, stop = starts + end_B - window_B, starts + end_B
        ids_BL, mask_BL = pad_left(self.sequences.items, begin, stop - 1, self.max_history)
        targets_BL, target_mask_BL = pad_left(
            self.sequences.items, starts + first_target_B, stop, self.max_history
        )
        user_index_B = self.sequences.user_index_U[rows_B]
        return EveryPositionStep(
            rows_B,
            user_index_B,
            ids_BL,
            mask_BL,
            targets_BL,
            target_mask_BL,
            targets_BL[:, -1].copy(),
            num_targets,
        )
