"""What is known of an exemplar: the items it interacted with, as the prompt and the backends see them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

UNNAMED = "items without title or category"
"""The interest in items of which nothing is known but an id."""


@dataclass(frozen=True)
class HistoryItem:
    """One item of a history.

    Args:
        item_index: the id that a prompt shows and an answer may cite.
        title: as in the catalogue; `item <outside id>` when it has none.
        categories: from general to special, possibly empty.
        has_title: False when `title` is made of the outside id, which a prompt may show but which names no interest.
        item_id: the outside id, by which answers made elsewhere name the item; empty where nobody asks for it.
    """

    item_index: int
    title: str
    categories: tuple[str, ...] = ()
    has_title: bool = True
    item_id: str = ""


@dataclass(frozen=True)
class Exemplar:
    """An exemplar user with its distinct items, newest last; there is at least one.

    Args:
        user_index: number of the user in this workspace.
        history: its items.
        user_id: the outside id, by which answers made elsewhere name the user; empty where nobody asks for it.
    """

    user_index: int
    history: tuple[HistoryItem, ...]
    user_id: str = ""

    def latest(self, count: int) -> "Exemplar":
        """The same user with only the newest `count` items."""
        return replace(self, history=self.history[-count:])


def build_exemplar(
    user_index: int,
    item_indices: Iterable[int],
    items: Mapping[int, HistoryItem],
    max_history: int,
    user_id: str = "",
) -> Exemplar:
    """Keep the newest `max_history` distinct items of a sequence; a repeated item stands at its latest place."""
    newest_first = list(dict.fromkeys(reversed(list(item_indices))))[:max_history]
    return Exemplar(user_index, tuple(items[i] for i in reversed(newest_first)), user_id)
