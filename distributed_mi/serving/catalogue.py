"""Names of items and histories of users, as prepare wrote them."""

import difflib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import UnknownUserError

_SPLITS = ("train", "validation", "test")
_HINT_LIMIT = 50_000
"""User ids that are compared for a near match; more would take seconds."""


@dataclass(frozen=True)
class NamedItem:
    """An item as people see it."""

    item_index: int
    item_id: str
    title: str
    """Empty when the metadata have none."""

    @property
    def name(self) -> str:
        """The title, or else the id."""
        return self.title or self.item_id


@dataclass(frozen=True)
class KnownUser:
    """A user of the prepared data."""

    user_id: str
    split: str
    """Where the user's longest sequence stands."""
    items: list[int]
    """Item indices of that whole sequence, newest last."""
    train_user_index: int | None
    """`user_index` in the training split, or None for a user who was not trained on."""


class Catalogue:
    """Items of a workspace by index and by raw id."""

    def __init__(self, table: pa.Table) -> None:
        table = table.sort_by("item_index").combine_chunks()
        self.num_items = table.num_rows
        self._ids = _one_array(table["item_id"])
        self._titles = _one_array(table["title"])
        self._train_events: NDArray[np.int64] = table["num_train_events"].to_numpy()

    @classmethod
    def read(cls, workspace: Workspace) -> "Catalogue":
        """The catalogue of the complete prepare stage."""
        columns = ["item_index", "item_id", "title", "num_train_events"]
        return cls(workspace.stage("prepare").read("catalogue", "catalogue", columns=columns))

    def item(self, item_index: int) -> NamedItem:
        """An item by its index, from 1."""
        title = self._titles[item_index - 1].as_py()
        return NamedItem(item_index, self._ids[item_index - 1].as_py(), title or "")

    def find(self, item_ids: list[str]) -> tuple[list[int], list[str]]:
        """Item indices of raw ids in their order, and the ids that the catalogue does not hold."""
        places = pc.index_in(pa.array(item_ids, pa.string()), value_set=self._ids).to_pylist()
        known = [place + 1 for place in places if place is not None]
        return known, [text for text, place in zip(item_ids, places, strict=True) if place is None]

    def most_popular(self, count: int, without: set[int]) -> list[tuple[int, int]]:
        """(item index, events in training) of the most frequent items; ties go to the smaller index."""
        order = np.lexsort((np.arange(self.num_items), -self._train_events))
        best = (int(place) + 1 for place in order)
        chosen = [i for i, _ in zip((i for i in best if i not in without), range(count), strict=False)]
        return [(i, int(self._train_events[i - 1])) for i in chosen]


def find_user(workspace: Workspace, user_id: str) -> KnownUser:
    """Look a user up in all splits.

    Raises:
        UnknownUserError: nobody has this id; names near matches.
    """
    stage = workspace.stage("prepare")
    longest: list[int] = []
    where, train_user_index = "", None
    for split in _SPLITS:
        columns = ["user_index", "item_indices"]
        condition = pc.field("user_id") == user_id
        table = stage.read(f"sequences/{split}", "sequences", columns=columns, filter=condition)
        for row in table.to_pylist():
            if split == "train":
                train_user_index = row["user_index"]
            if not where or len(row["item_indices"]) > len(longest):
                longest, where = row["item_indices"], split
    if not where:
        raise UnknownUserError(_unknown(workspace, user_id))
    return KnownUser(user_id, where, longest, train_user_index)


def _unknown(workspace: Workspace, user_id: str) -> str:
    stage = workspace.stage("prepare")
    known: list[str] = []
    for split in _SPLITS:
        table = stage.read(f"sequences/{split}", "sequences", columns=["user_id"])
        known += table["user_id"][:_HINT_LIMIT].to_pylist()
    near = difflib.get_close_matches(user_id, list(dict.fromkeys(known))[:_HINT_LIMIT], n=3, cutoff=0.6)
    hint = f" Near: {', '.join(near)}." if near else ""
    return (
        f'unknown user "{user_id}": not among the users of {workspace.url} (prepare leaves out users with few events).'
        f"{hint} Give a history instead: --items a,b,c"
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
