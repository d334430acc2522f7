"""Item metadata -> the one string that is encoded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SEPARATOR = ". "
"""Stands between the fields of an item and between the items of a user."""

FALLBACKS = ("title", "brand", "categories")
"""Where the text of an item comes from, in order, when none of the configured fields is there."""


@dataclass(frozen=True)
class ItemText:
    """The text of an item."""

    text: str
    """One line, never empty."""
    source: str
    """`fields`, or the fallback that was needed: `title`, `brand`, `categories`, `id`."""

    @property
    def says_something(self) -> bool:
        """False when there was nothing but the id."""
        return self.source != "id"


def item_text(
    item_id: str,
    title: str | None,
    brand: str | None,
    categories: Iterable[str | None] | None,
    fields: Sequence[str] = ("title",),
) -> ItemText:
    """Join the configured fields of an item; fall back when it has none of them.

    Args:
        item_id: the item's own id.
        title: None or blank when unknown, like the other fields.
        brand: maker.
        categories: from the widest to the narrowest, joined by commas.
        fields: which of `title`, `brand`, `categories`, and in which order.
    """
    names = [clean(c) for c in categories or ()]
    known = {
        "title": clean(title),
        "brand": clean(brand),
        "categories": ", ".join(n for n in names if n),
    }
    text = SEPARATOR.join(known[f] for f in fields if known[f])
    if text:
        return ItemText(text, "fields")
    for name in FALLBACKS:
        if known[name]:
            return ItemText(known[name], name)
    return ItemText(f"item {clean(item_id)}", "id")


def user_text(item_texts: Sequence[str]) -> str:
    """The texts of a user's items, oldest first, as one text."""
    return SEPARATOR.join(item_texts)


def clean(value: str | None) -> str:
    """One line without control characters or runs of white space."""
    if not value:
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())
