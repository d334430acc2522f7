"""Which users are evaluated, what the model may read of them, and what it has to find.

One rule serves all splits, because prepare has written it down for each user: the first `num_history` events are the
history, the later ones are the labels. Every item of the catalogue is a candidate.

Shapes:  U users, L history (left-padded, newest item last).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from distributed_mi.core.artifacts import Manifest, Workspace
from distributed_mi.core.errors import StageError
from distributed_mi.data.batches import Sequences
from distributed_mi.evaluation.metrics.base import CatalogueInfo, Ints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cases:
    """Users to evaluate. A position in `rows` is a user's number here.

    Args:
        sequences: all users of the split.
        rows: int64 `[U]`, ascending: the rows of `sequences` that have both a history and a label.
    """

    sequences: Sequences
    rows: Ints

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.rows)

    @property
    def skipped_users(self) -> int:
        """Users of the split left out because they have no history or no label."""
        return self.sequences.num_users - len(self.rows)

    @property
    def num_history(self) -> Ints:
        """Events that the model may read, before the cut to its longest history, int64 `[U]`."""
        return self.sequences.num_history_U[self.rows]

    @cached_property
    def labels(self) -> tuple[Ints, Ints]:
        """Labels of all users in user order, and offsets `[U + 1]` into them."""
        return self.sequences.labels(self.rows)

    def histories(self, users: Ints, max_history: int) -> tuple[Ints, np.ndarray]:
        """The newest `max_history` items of each history: int64 `[len(users), L]`, left-padded, and its mask."""
        return self.sequences.histories(self.rows[users], max_history)

    def seen(self, users: Ints) -> tuple[Ints, Ints]:
        """Everything in the histories of `users`, as (place in `users`, item index) pairs; not cut at any length."""
        found = [self.sequences.history(row) for row in self.rows[users]]
        return np.repeat(np.arange(len(users)), [len(x) for x in found]), np.concatenate(found)


def load_cases(workspace: Workspace, split: str) -> Cases:
    """Read the users of a split.

    Args:
        workspace: with a complete prepare stage.
        split: "validation" or "test".

    Raises:
        StageError: no user of the split has both a history and a label.
    """
    sequences = Sequences.read(workspace, split)
    usable = (sequences.num_history_U > 0) & (sequences.num_history_U < sequences.lengths)
    if not usable.any():
        raise StageError(
            f"no user of the {split} split has both a history and a label ({sequences.num_users} users). "
            "Change data.split or the filters, then run `distributed-mi prepare CONFIG` again."
        )
    if not usable.all():
        logger.info("%s: %d users without history or label are left out", split, int((~usable).sum()))
    return Cases(sequences, np.flatnonzero(usable))


def load_catalogue(workspace: Workspace) -> CatalogueInfo:
    """Number of items and a code for each item's set of category names."""
    table = workspace.stage("prepare").read("catalogue", "catalogue", columns=["item_index", "categories"])
    codes = np.full(table.num_rows + 1, -1, dtype=np.int64)
    known: dict[frozenset[str], int] = {}
    for index, names in zip(table["item_index"].to_pylist(), table["categories"].to_pylist(), strict=True):
        if names:
            codes[index] = known.setdefault(frozenset(names), len(known))
    return CatalogueInfo(num_items=table.num_rows, categories=codes)


def describe(prepare: Manifest, *, exclude_seen: bool) -> str:
    """The protocol in words, for reports; two runs are comparable when these are equal.

    Args:
        prepare: manifest of the prepare stage; its `config.split` is the table `data.split`.
        exclude_seen: whether history items are left out of the lists.
    """
    table = prepare.config.get("split")
    split = table if isinstance(table, Mapping) else {"name": prepare.stats.get("split", "unknown split")}
    seen = "history items excluded" if exclude_seen else "history items kept"
    return f"{_split_text(split)}; full catalogue, {seen}"


def _split_text(split: Mapping[str, Any]) -> str:
    name = str(split.get("name"))
    train, validation = split.get("train_fraction", 0.8), split.get("validation_fraction", 0.1)
    shares = ":".join(f"{10 * x:.4g}" for x in (train, validation, 1 - train - validation))
    if name == "by-user":
        return (
            f"by-user {shares}, first {split.get('history_fraction', 0.8):.0%} of a user's events as history"
        )
    if name == "leave-one-out":
        return "leave-one-out, the earlier events of a user as history, one event as label"
    if name == "global-temporal":
        return f"global-temporal {shares} of the events by time, a user's events before the cut as history"
    return name
