"""Whose interests are scored, and on which later items; `evaluate.py` says why these.

Shapes:  V items, T text width, E exemplars.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distributed_mi.core import schema
from distributed_mi.core.artifacts import Workspace, list_files
from distributed_mi.core.seeding import stream
from distributed_mi.interests.quality import Vectors, later_items
from distributed_mi.interests.resampling import Ints

POPULATIONS = ("exemplars", "members", "newcomers")

_HELD = ("validation", "test")
_USERS_AT_ONCE = 256


@dataclass
class Population:
    """Users to score, each with the exemplar whose interests are theirs."""

    name: str
    saw_whole_history: bool
    """Whether their later items had a part in their interests, or in the choice of their exemplar."""
    available: int = 0
    """Users of the population in the workspace; more than are scored when `max_users` are drawn."""
    users: list[int] = field(default_factory=list)
    user_ids: list[str] = field(default_factory=list)
    exemplars: list[int] = field(default_factory=list)
    history: list[list[int]] = field(default_factory=list)
    """Item indices of each user's events before the later items, oldest first."""
    later: list[list[int]] = field(default_factory=list)
    """Item indices, distinct, none of the history."""
    reason: str = ""
    """Why nobody can be scored."""

    def add(self, row: Mapping[str, Any], exemplar: int, events: Sequence[int], num_history: int) -> None:
        """One more user: a row of `sequences`, and all its events with how many of them are history."""
        self.users.append(row["user_index"])
        self.user_ids.append(row["user_id"])
        self.exemplars.append(exemplar)
        self.history.append(list(events[:num_history]))
        self.later.append(later_items(events, num_history))


class Users:
    """Reads the populations of a workspace, each in the order of `user_index`.

    Args:
        workspace: with complete stages prepare, embed and exemplars.
        history_fraction: see `evaluate.evaluate`.
        max_users: see there.
        seed: of the draw of `max_users`.
    """

    def __init__(self, workspace: Workspace, *, history_fraction: float, max_users: int, seed: int) -> None:
        self.history_fraction, self.max_users, self.seed = history_fraction, max_users, seed
        self.prepare, self.embed = workspace.stage("prepare"), workspace.stage("embed")
        columns = ["user_index", "exemplar_user_index"]
        assignment = workspace.stage("exemplars").read("assignment", "assignment", columns=columns)
        self.train_users = assignment["user_index"].to_numpy()
        self.train_exemplars = assignment["exemplar_user_index"].to_numpy()
        held = [self._read(s, ["user_index"])["user_index"].to_numpy() for s in _HELD]
        self.held_out = bool(np.isin(np.concatenate(held), self.train_users).any())
        """Whether prepare holds later events of training users out, as under leave-one-out and global-temporal."""

    def read(self) -> list[Population]:
        """The populations of `POPULATIONS`."""
        is_exemplar = self.train_users == self.train_exemplars
        return [
            self._training_users("exemplars", is_exemplar),
            self._training_users("members", ~is_exemplar),
            self._newcomers(),
        ]

    def rows(self, split: str, users: Collection[int]) -> list[dict[str, Any]]:
        """Sequences of some users."""
        columns = ["user_index", "user_id", "item_indices", "num_history"]
        table = self._read(split, columns, pc.field("user_index").isin(list(users)))
        found: list[dict[str, Any]] = table.sort_by("user_index").to_pylist()
        return found

    def _read(self, split: str, columns: list[str], condition: Any = None) -> pa.Table:
        """Rows of a split; none where prepare wrote no such table."""
        folder = f"sequences/{split}"
        if not list_files(self.prepare.fs, self.prepare.path(folder), ".parquet"):
            return schema.empty("sequences").select(columns)
        return self.prepare.read(folder, "sequences", columns=columns, filter=condition)

    def _training_users(self, name: str, wanted: np.ndarray) -> Population:
        population = Population(name, saw_whole_history=not self.held_out, available=int(wanted.sum()))
        users, exemplars = self.train_users[wanted], self.train_exemplars[wanted]
        chosen = self._draw(name, len(users))
        exemplar_of = dict(zip(users[chosen].tolist(), exemplars[chosen].tolist(), strict=True))
        labels: dict[int, list[int]] = {}
        for split in _HELD if self.held_out else ():
            for row in self.rows(split, exemplar_of):
                labels.setdefault(row["user_index"], []).extend(row["item_indices"][row["num_history"] :])
        for row in self.rows("train", exemplar_of):
            events, user = row["item_indices"], row["user_index"]
            if self.held_out:
                num_history, events = len(events), events + labels.get(user, [])
            else:
                num_history = max(int(len(events) * self.history_fraction), 1)
            population.add(row, exemplar_of[user], events, num_history)
        if not population.users:
            population.reason = f"there are no {name}"
        return population

    def _newcomers(self) -> Population:
        """Users who were not clustered, by the rule with which serving names an interest: the nearest exemplar."""
        population = Population("newcomers", saw_whole_history=False)
        if self.embed.require().config.get("user_vectors", "mean") != "mean":
            population.reason = "a history has no vector without the encoder (embed.user_vectors is not mean)"
            return population
        found = [self._read(s, ["user_index"], pc.field("num_history") > 0)["user_index"] for s in _HELD]
        users = np.setdiff1d(np.concatenate([f.to_numpy() for f in found]), self.train_users)
        population.available = len(users)
        chosen = set(users[self._draw("newcomers", len(users))].tolist())
        rows = [r for s in _HELD for r in self.rows(s, chosen) if r["num_history"] > 0]
        first = {r["user_index"]: r for r in reversed(rows)}  # of a user in both splits, the earlier row
        ordered = [first[u] for u in sorted(first)]
        nearest = self._nearest_exemplars([r["item_indices"][: r["num_history"]] for r in ordered])
        for row, exemplar in zip(ordered, nearest, strict=True):
            population.add(row, exemplar, row["item_indices"], row["num_history"])
        if not ordered:
            population.reason = "all users of validation and test are training users"
        return population

    def _draw(self, name: str, count: int) -> Ints:
        """Places of the users to score, ascending."""
        if count <= self.max_users:
            return np.arange(count)
        generator = stream(self.seed, f"interests/quality/{name}")
        return np.sort(generator.choice(count, self.max_users, replace=False))

    def _nearest_exemplars(self, histories: Sequence[Sequence[int]]) -> list[int]:
        """The exemplar whose text vector is nearest to the mean vector of each history."""
        if not histories:
            return []
        items_VT, row_of = item_vectors(self.embed, {i for h in histories for i in h}, with_text_only=False)
        means = np.stack([items_VT[[row_of[i] for i in h]].mean(axis=0, dtype=np.float64) for h in histories])
        wanted = pc.field("user_index").isin(np.unique(self.train_exemplars).tolist())
        table = self.embed.read("user_vectors", "user_vectors", filter=wanted).sort_by("user_index")
        exemplars_ET = matrix(table["vector"]).astype(np.float64)
        half_squares = (exemplars_ET**2).sum(axis=1) / 2
        nearest = [
            np.argmin(half_squares - means[low : low + _USERS_AT_ONCE] @ exemplars_ET.T, axis=1)
            for low in range(0, len(means), _USERS_AT_ONCE)
        ]
        found: list[int] = table["user_index"].to_numpy()[np.concatenate(nearest)].tolist()
        return found


def item_vectors(
    embed: Any, items: Collection[int], *, with_text_only: bool
) -> tuple[Vectors, dict[int, int]]:
    """Text vectors of items, `[n, T]`, and the row of each item index.

    Args:
        embed: directory of the stage.
        items: item indices.
        with_text_only: leave items out of which nothing is known but their id.
    """
    condition = pc.field("item_index").isin(list(items))
    if with_text_only:
        condition = condition & pc.field("has_text")
    table = embed.read("item_vectors", "item_vectors", columns=["item_index", "vector"], filter=condition)
    return matrix(table["vector"]), {item: row for row, item in enumerate(table["item_index"].to_pylist())}


def matrix(column: pa.ChunkedArray) -> Vectors:
    """Rows of a list column of equal lengths as float32 `[n, T]`; `[0, 0]` without rows."""
    if not len(column):
        return np.zeros((0, 0), dtype=np.float32)
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values, dtype=np.float32).reshape(len(lists), -1)
