"""What the interests stage reads: the exemplars, their histories and the catalogue."""

from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import StageError
from distributed_mi.interests.history import Exemplar, HistoryItem, build_exemplar


class Source:
    """Exemplars in the order of the table `exemplars`, as prompts and backends see them.

    Args:
        workspace: with complete stages prepare and exemplars.
        max_history: items kept per exemplar.

    Raises:
        StageError: there are no exemplars, or one has no training sequence.
    """

    def __init__(self, workspace: Workspace, max_history: int) -> None:
        table = workspace.stage("exemplars").read("exemplars", "exemplars", columns=["user_index"])
        self.users: list[int] = table["user_index"].to_pylist()
        if not self.users:
            raise StageError("the stage exemplars named no exemplar; run it again with another preference")
        prepare = workspace.stage("prepare")
        columns = ["item_index", "item_id", "title", "categories"]
        rows = prepare.read("catalogue", "catalogue", columns=columns).to_pylist()
        self.catalogue: list[HistoryItem] = [_history_item(row) for row in rows]
        sequences = prepare.read(
            "sequences/train",
            "sequences",
            columns=["user_index", "user_id", "item_indices"],
            filter=pc.field("user_index").isin(self.users),
        )
        items = {i.item_index: i for i in self.catalogue}
        self.exemplars: dict[int, Exemplar] = {}
        for row in sequences.to_pylist():
            user = row["user_index"]
            self.exemplars[user] = build_exemplar(
                user, row["item_indices"], items, max_history, row["user_id"]
            )
        self._check()

    def _check(self) -> None:
        missing = [u for u in self.users if u not in self.exemplars or not self.exemplars[u].history]
        if missing:
            raise StageError(
                f"{len(missing)} of {len(self.users)} exemplars have no training sequence (first: user_index "
                f"{missing[0]}). The stages prepare and exemplars do not belong together: run exemplars again."
            )

    @property
    def max_item_index(self) -> int:
        """Largest id of the catalogue."""
        return max(i.item_index for i in self.catalogue)


def _history_item(row: Mapping[str, Any]) -> HistoryItem:
    """An item without a title is called by its outside id."""
    title = (row["title"] or "").strip()
    categories = tuple(c for c in row["categories"] or () if c)
    return HistoryItem(
        row["item_index"],
        title or f"item {row['item_id']}",
        categories,
        has_title=bool(title),
        item_id=row["item_id"],
    )
