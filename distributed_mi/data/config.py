"""Configuration of the `prepare` stage: which logs, what is kept of them, how users are split."""

from datetime import UTC, date, datetime
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from distributed_mi.core.config import Component, ConfigModel, runtime

SPLITS = ("train", "validation", "test")
"""Names of the split tables, in the order of `user_index`."""


class ReaderChoice(Component):
    """The log format: a file of `distributed_mi/data/readers` and its own fields beside the name."""

    kind: ClassVar[str] = "reader"
    name: str = "table"
    """File name of the reader, or `package.module:Class` for one of your own."""


class FilterConfig(ConfigModel):
    """Which events are kept before anything is counted."""

    min_rating: float | None = None
    """Keep events rated at least this, in the unit of the log. None: keep all; no rating is needed."""
    start: str | None = None
    """Keep events at or after this ISO 8601 time, UTC unless it names a zone. None: no lower limit."""
    end: str | None = None
    """Keep events before this ISO 8601 time, UTC unless it names a zone. None: no upper limit."""
    duplicates: Literal["keep", "first", "last"] = "keep"
    """What happens to several events of one user with one item: keep all, or only the first or last in time."""

    @field_validator("start", "end", mode="before")
    @classmethod
    def _iso_time(cls, value: Any) -> Any:
        if value is None:
            return None
        text = value.isoformat() if isinstance(value, date | datetime) else str(value)
        parse_time_ms(text)
        return text

    @property
    def start_ms(self) -> int | None:
        """`start` in milliseconds since 1970, UTC."""
        return None if self.start is None else parse_time_ms(self.start)

    @property
    def end_ms(self) -> int | None:
        """`end` in milliseconds since 1970, UTC."""
        return None if self.end is None else parse_time_ms(self.end)


class KCoreConfig(ConfigModel):
    """Removal of rare items and of users with few events."""

    method: Literal["one-pass", "iterative", "none"] = "one-pass"
    """`one-pass`: rare items are dropped, then short users, once, as ComiRec and REMI do. `iterative`: until nothing
    changes, so that both minima hold in the result. `none`: keep everything."""
    min_user_events: PositiveInt = 5
    """Fewest kept events of a user."""
    min_item_events: PositiveInt = 5
    """Fewest events of an item; `one-pass` counts over all users, also those dropped afterwards."""


class SplitConfig(ConfigModel):
    """How events become training, validation and test sequences."""

    name: Literal["by-user", "leave-one-out", "global-temporal"] = "by-user"
    """`by-user`: other users are evaluated than trained on (ComiRec, REMI, EIMF). `leave-one-out`: the last two events
    of each user are labels. `global-temporal`: labels are the events after a point in time, and nothing after it is
    trained on."""
    train_fraction: float = Field(0.8, gt=0, lt=1)
    """Share of users (by-user) or of events in time order (global-temporal) that is trained on."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share that follows for validation; the rest is the test split."""
    history_fraction: float = Field(0.8, gt=0, lt=1)
    """by-user: share of an evaluation user's events that a model may read, rounded down; the rest are labels."""
    seed: int = 1230
    """by-user: seed of the shuffle of users (Python's `random.Random`); 1230 is the one of ComiRec."""

    @model_validator(mode="after")
    def _leave_something_to_test(self) -> Self:
        if self.train_fraction + self.validation_fraction >= 1:
            raise ValueError(
                "train_fraction + validation_fraction must be below 1, or nothing is left to test on"
            )
        return self


class DataConfig(ConfigModel):
    """The `prepare` stage: raw logs to catalogue and sequences."""

    interactions: str | None = runtime(None)
    """Interaction log: a file, a folder, a glob or a URL (`s3://`, `gs://`). None: the reader generates its own."""
    items: str | None = runtime(None)
    """Item metadata (titles, brands, categories) in the same forms. None: items have ids only."""
    reader: ReaderChoice = ReaderChoice()
    """Log format."""
    filters: FilterConfig = FilterConfig()
    """Row filters and duplicates."""
    k_core: KCoreConfig = KCoreConfig()
    """Rare items and short users."""
    split: SplitConfig = SplitConfig()
    """Training, validation and test."""
    max_rejected_fraction: NonNegativeFloat = runtime(0.01)
    """Largest share of unusable rows, from 0 to 1, of the interactions or of the items, before the stage stops."""
    num_partitions: PositiveInt | None = runtime(None)
    """Partitions of users, which is also the number of shards per table. None: one for each 128 MiB of input."""


def parse_time_ms(text: str) -> int:
    """Milliseconds since 1970 of an ISO 8601 date or time; UTC when it names no zone.

    Raises:
        ValueError: the text is not ISO 8601.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1000)
