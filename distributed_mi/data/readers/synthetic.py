"""A generated log with a known answer: users with a few planted topics, items with titles, brands and categories.

Every item belongs to one topic; its title is made of that topic's words and its category is the topic. The items of a
topic lie on a ring. A user has two to four topics; every event picks one of them at random and moves on along its
ring by one to three places (sometimes it jumps). So what comes next depends on the last item *of each topic*: a
model with one vector per interest can tell, popularity (nearly even over the catalogue) cannot.

Made in blocks of users, each from its own random stream, so any number of tasks gives the same log.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import PositiveInt, model_validator

from distributed_mi.core import schema
from distributed_mi.core.config import ConfigModel
from distributed_mi.core.seeding import stream
from distributed_mi.data.readers.base import ITEMS, Parsed, Reader, ReadTask, What, no_rejects
from distributed_mi.data.topics import BRANDS, STYLES, TOPICS

_USERS_PER_TASK = 50_000
_MEAN_EVENT_BYTES = 40
_EPOCH_MS = 1_577_836_800_000  # 2020-01-01 UTC
_DAY_MS = 86_400_000
_STEPS = (1, 2, 3)
_STEP_SHARES = (0.7, 0.2, 0.1)
_JUMP_SHARE = 0.1


class SyntheticReader(Reader):
    """Generates the log described in the module docstring; needs no files."""

    class Config(ConfigModel):
        """Size of the generated log."""

        num_users: PositiveInt = 3000
        """Users."""
        num_items: PositiveInt = 2000
        """Items, dealt to the topics in turn."""
        num_topics: PositiveInt = 40
        """Planted topics; above 40 the words repeat with a number behind them."""
        topics_per_user: tuple[PositiveInt, PositiveInt] = (2, 4)
        """Fewest and most topics of a user."""
        events_per_user: tuple[PositiveInt, PositiveInt] = (8, 30)
        """Fewest and most events of a user."""
        seed: int = 0
        """Seed of the generated log."""

        @model_validator(mode="after")
        def _possible(self) -> Self:
            for name in ("topics_per_user", "events_per_user"):
                fewest, most = getattr(self, name)
                if fewest > most:
                    raise ValueError(
                        f"{name}: the first number must not exceed the second, got {fewest}, {most}"
                    )
            if self.topics_per_user[1] > self.num_topics:
                raise ValueError(f"topics_per_user: at most num_topics ({self.num_topics})")
            if self.num_topics > self.num_items:
                raise ValueError(f"num_topics: at most num_items ({self.num_items})")
            return self

    needs_files = False

    def plan(self, filesystem: pafs.FileSystem, paths: Sequence[str], what: What) -> list[ReadTask]:
        """Blocks of users, or one task for all items."""
        del filesystem, paths
        total = self.config.num_users if what == "interactions" else self.config.num_items
        size = _USERS_PER_TASK if what == "interactions" else total
        return [
            ReadTask(0, None, "", "synthetic", start, min(start + size, total))
            for start in range(0, total, size)
        ]

    def read(self, task: ReadTask, what: What) -> Iterator[Parsed]:
        """Events of a block of users, or the items."""
        if what == "interactions":
            yield Parsed(_events(self.config, task), no_rejects())
        else:
            yield Parsed(_items(self.config), no_rejects())

    def estimate_bytes(self) -> int:
        """Users times mean events times a rough size of an event."""
        fewest, most = self.config.events_per_user
        return int(self.config.num_users * (fewest + most) / 2 * _MEAN_EVENT_BYTES)


@dataclass(frozen=True)
class Planted:
    """The known answer.

    Args:
        topic_names: topic -> name, which is the category of its items.
        topic_of_item: item id -> topic.
        topics_of_user: user id -> topics in ascending order.
    """

    topic_names: tuple[str, ...]
    topic_of_item: dict[str, int]
    topics_of_user: dict[str, tuple[int, ...]]


def planted(config: SyntheticReader.Config) -> Planted:
    """What was planted in the log of a configuration; for tests and for looking at results."""
    topics_of_user: dict[str, tuple[int, ...]] = {}
    for start in range(0, config.num_users, _USERS_PER_TASK):
        stop = min(start + _USERS_PER_TASK, config.num_users)
        topics_US, num_topics_U, _ = _users(config, start, stop)
        for offset, (row, count) in enumerate(zip(topics_US.tolist(), num_topics_U.tolist(), strict=True)):
            topics_of_user[_user_id(start + offset)] = tuple(sorted(row[:count]))
    return Planted(
        topic_names=tuple(_topic_name(t) for t in range(config.num_topics)),
        topic_of_item={_item_id(i): i % config.num_topics for i in range(config.num_items)},
        topics_of_user=topics_of_user,
    )


def _user_id(user: int) -> str:
    return f"user-{user:06d}"


def _item_id(item: int) -> str:
    return f"item-{item:06d}"


def _topic_name(topic: int) -> str:
    names = list(TOPICS)
    series = topic // len(names)
    return names[topic % len(names)] + (f" {series + 1}" if series else "")


def _users(
    config: SyntheticReader.Config, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Topics `[U, S]` of which the first `num_topics_U` count, and numbers of events `[U]`, of a block of users."""
    rng = stream(config.seed, "synthetic-users", start)
    fewest, most = config.topics_per_user
    keys_UC = rng.random((stop - start, config.num_topics))
    topics_US = np.argpartition(keys_UC, most - 1, axis=1)[:, :most]
    num_topics_U = rng.integers(fewest, most + 1, stop - start)
    num_events_U = rng.integers(config.events_per_user[0], config.events_per_user[1] + 1, stop - start)
    return topics_US, num_topics_U, num_events_U


def _events(config: SyntheticReader.Config, task: ReadTask) -> pa.Table:
    """Events of a block of users in order of user and time, all users at once."""
    topics_US, num_topics_U, num_events_U = _users(config, task.start, task.stop)
    rng = stream(config.seed, "synthetic-events", task.start)
    user_E = np.repeat(np.arange(task.stop - task.start), num_events_U)
    slot_E = rng.integers(0, num_topics_U[user_E])
    topic_E = topics_US[user_E, slot_E]
    ring_E = _ring_sizes(config)[topic_E]
    place_E = _walk(rng, user_E * topics_US.shape[1] + slot_E, ring_E)
    item_E = place_E * config.num_topics + topic_E
    gap_E = rng.exponential(2 * _DAY_MS, len(user_E)).astype(np.int64) + 1
    begin_U = _EPOCH_MS + rng.integers(0, 365, len(num_events_U)) * _DAY_MS
    time_E = begin_U[user_E] + _running_sum(gap_E, user_E)
    return pa.table(
        {
            "user_id": [_user_id(task.start + u) for u in user_E.tolist()],
            "item_id": [_item_id(i) for i in item_E.tolist()],
            "timestamp": time_E,
            "source_order": 1 + task.start * config.events_per_user[1] + np.arange(len(user_E)),
        },
        schema=schema.TABLES["events"],
    )


def _ring_sizes(config: SyntheticReader.Config) -> np.ndarray:
    """Items of each topic."""
    return np.bincount(np.arange(config.num_items) % config.num_topics, minlength=config.num_topics)


def _walk(rng: np.random.Generator, walk_E: np.ndarray, ring_E: np.ndarray) -> np.ndarray:
    """Place on the ring at each event of many walks, interleaved; a walk starts and jumps to low places more often."""
    jump_E = (rng.random(len(walk_E)) ** 1.3 * ring_E).astype(np.int64)
    step_E = rng.choice(_STEPS, len(walk_E), p=_STEP_SHARES)
    step_E = np.where(rng.random(len(walk_E)) < _JUMP_SHARE, jump_E, step_E)
    order = np.argsort(walk_E, kind="stable")
    first = np.diff(walk_E[order], prepend=-1) != 0
    steps = np.where(first, jump_E[order], step_E[order])
    places = np.empty_like(steps)
    places[order] = _running_sum(steps, walk_E[order])
    return places % ring_E


def _running_sum(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cumulative sum that starts again at every change of `groups`."""
    if not len(values):
        return values
    total = np.cumsum(values)
    starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    before = total[starts] - values[starts]
    return total - np.repeat(before, np.diff(starts, append=len(values)))


def _items(config: SyntheticReader.Config) -> pa.Table:
    """Titles such as `Kestrel Deluxe Espresso Grinder 12`: brand, style, two things of the topic, place on the ring."""
    titles, brands, categories = [], [], []
    nouns = [[w.replace("-", " ").title() for w in words.split()] for words in TOPICS.values()]
    for item in range(config.num_items):
        topic, place = item % config.num_topics, item // config.num_topics
        things = nouns[topic % len(nouns)]
        noun, style = place % len(things), STYLES[place // len(things) % len(STYLES)]
        brand = BRANDS[(item * 7 + place) % len(BRANDS)]
        second = things[(noun + 1) % len(things)]
        series = place // (len(things) * len(STYLES))
        titles.append(f"{brand} {style} {things[noun]} {second}" + (f" {series + 1}" if series else ""))
        brands.append(brand)
        categories.append([_topic_name(topic)])
    return pa.table(
        {
            "item_id": [_item_id(i) for i in range(config.num_items)],
            "title": titles,
            "brand": brands,
            "categories": categories,
            "source_order": np.arange(1, config.num_items + 1),
        },
        schema=ITEMS,
    )


READER = SyntheticReader
