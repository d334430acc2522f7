"""What a table's lookups cost, counted between two calls of `ItemTable.take_counters`."""

from dataclasses import dataclass


@dataclass
class TableCounters:
    """Of one worker, since the last call."""

    ids: int = 0
    """Ids that lookups were asked for, repeats included."""
    unique_ids: int = 0
    """Distinct ids of each lookup, summed: rows that were fetched and gradients that were sent."""
    exchanged_bytes: int = 0
    """Bytes that left this process for another one: ids, rows and gradients."""
    exchange_seconds: float = 0.0
    """Spent in the collectives of lookups and their backward passes, waiting for the others included."""
    update_seconds: float = 0.0
    """Spent in `ItemTable.step`."""

    def __add__(self, other: "TableCounters") -> "TableCounters":
        """Counters of two stretches together."""
        return TableCounters(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))
