"""Who is compared in `bench_interests_quality`: MovieLens users with interests that a language model wrote for them.

A panel is a set of users, what they did later, and sides: interests by one method from one part of their histories.

Where the texts come from stands in the README of each data folder. All of them were written without regard to time,
so they may have seen the later items; how each is read:

    ml-100k         GPT-3.5, one text for each genre of a user, from the whole history
    likes, tastes   GPT-3.5, the sentences `interests`; likes cite films (their evidence), from up to 25 films
    profiles        GPT-4 wrote one text of likes, then dislikes: each sentence before the first that speaks of a
                    dislike is an interest

Shapes:  U users.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from distributed_mi.interests.backends.base import BackendContext, Request
from distributed_mi.interests.backends.keyphrase import KeyphraseBackend
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.parse import ParsedAnswer, ParsedInterest, parse_answer
from distributed_mi.interests.quality import later_items

EARLIER = 0.8
"""Share of a user's events, rounded down, that is earlier; the rest is later."""
MAX_INTERESTS = 20
LEAST_CITED = 20
"""Films that a model cites of a user in the panel of `same_films`; it was shown 25 at most."""
KEYPHRASE_CHARS = 120
"""As in the stage."""
MODEL_CHARS = 600
"""Longer than any text of a model: they are compared as they are."""

GPT4_SOURCES = (
    "tears-gpt4_10",
    "tears-gpt4_30_new",
    "tears-gpt4_sum_length_200_1",
    "tears-gpt4_sum_length_400",
)

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_DISLIKE = re.compile(
    r"\b(conversely|in contrast|contrarily|on the other hand|on the contrary|not(?! only| just)|\w+n['\u2019]t|less|"
    r"avoids?|dislikes?|unpreferred|lacks?|rarely|disinterest\w*|indifferen\w*|uninterested)\b",
    re.IGNORECASE,
)

Interests = dict[int, tuple[ParsedInterest, ...]]
"""User -> at least one interest."""
Histories = dict[int, list[int]]
"""User -> item indices, oldest first."""


@dataclass(frozen=True)
class Side:
    """Interests by one method for all users of a panel."""

    name: str
    saw: str
    """What they were made from, in words."""
    saw_later: bool
    """Whether the later items may have been part of it."""
    interests: Interests
    history: Histories
    """What coverage is a share of."""
    names_support: bool = True
    """Whether the interests name items; else they have no coverage."""


@dataclass(frozen=True)
class Panel:
    """Sides that are compared on the same users and the same later items."""

    name: str
    later: Histories
    """What each user did later: the targets."""
    sides: list[Side]
    model: str
    """Name of the side that a language model wrote."""
    references: dict[str, str]
    """Setting -> side that the model is compared with."""
    earlier: Histories
    """What the users are clustered by."""


class Log:
    """One MovieLens log: catalogue, and each user's items in time."""

    def __init__(self, folder: Path) -> None:
        items = pl.read_parquet(folder / "items.parquet").select("item", "title", "categories")
        self.catalogue = [
            HistoryItem(n, title, tuple(categories or ()))
            for n, (_, title, categories) in enumerate(items.iter_rows(), start=1)
        ]
        self.index_of: dict[str, int] = {item: n for n, item in enumerate(items["item"].to_list(), start=1)}
        self.index_of_title = {i.title: i.item_index for i in self.catalogue}
        events = pl.read_parquet(folder / "interactions.parquet").sort("user", "position")
        grouped = events.group_by("user", maintain_order=True).agg("item")
        self.events: Histories = {
            int(user): [self.index_of[i] for i in found] for user, found in grouped.iter_rows()
        }

    def earlier(self, user: int) -> list[int]:
        """The first part of a user's events."""
        events = self.events[user]
        return events[: max(int(len(events) * EARLIER), 1)]

    def later(self, user: int) -> list[int]:
        """Distinct items after it that do not stand in it."""
        return later_items(self.events[user], len(self.earlier(user)))

    def titles(self) -> list[str]:
        """Title of each item, item 1 first."""
        return [i.title for i in self.catalogue]


def read_answer(
    entries: Sequence[Mapping[str, Any]], history: Iterable[int], max_chars: int
) -> tuple[ParsedInterest, ...]:
    """Interests as the stage would keep them: equal texts merged, at most 20, support within the history."""
    parsed = parse_answer(
        json.dumps({"interests": list(entries)}),
        set(history),
        max_interests=MAX_INTERESTS,
        max_interest_chars=max_chars,
    )
    return parsed.interests if isinstance(parsed, ParsedAnswer) else ()


def keyphrase(log: Log, histories: Histories) -> Interests:
    """Interests by the backend that needs no model, with its defaults."""
    backend = KeyphraseBackend(
        KeyphraseBackend.Config(), BackendContext({}, MAX_INTERESTS, KEYPHRASE_CHARS, log.catalogue)
    )
    found: Interests = {}
    for user, items in histories.items():
        distinct = list(dict.fromkeys(reversed(items)))[::-1]
        exemplar = Exemplar(user, tuple(log.catalogue[i - 1] for i in distinct))
        response = backend.generate([Request(exemplar, "", 1)])[0]
        entries = json.loads(response.text)["interests"]
        found[user] = read_answer(entries, distinct, KEYPHRASE_CHARS)
    return found


def newest_titles(log: Log, histories: Histories) -> Interests:
    """The titles of the newest 20 items as interests: what words of titles alone are worth."""
    return {
        user: tuple(
            ParsedInterest(log.catalogue[i - 1].title, (i,))
            for i in list(dict.fromkeys(reversed(items)))[:MAX_INTERESTS]
        )
        for user, items in histories.items()
    }


def stated_likes(text: str) -> list[str]:
    """Sentences of a profile before the first that speaks of a dislike; the first sentence always."""
    sentences = [s.strip() for s in _SENTENCE.split(text.strip()) if s.strip()]
    stop = next((n for n, s in enumerate(sentences) if n and _DISLIKE.search(s)), len(sentences))
    return sentences[:stop]


def genre_texts(data: Path, log: Log) -> Interests:
    """GPT-3.5's texts for MovieLens-100K."""
    table = pl.read_parquet(data / "llm-text-ml-100k" / "user_interests.parquet")
    grouped = table.group_by("user", maintain_order=True).agg("text")
    return _non_empty(
        (int(user), read_answer([{"text": t, "item_ids": []} for t in texts], (), MODEL_CHARS))
        for user, texts in grouped.iter_rows()
        if int(user) in log.events
    )


def written_texts(data: Path, log: Log, source: str) -> Interests:
    """The texts of one source for MovieLens-1M."""
    table = pl.read_parquet(data / "llm-text-ml-1m" / "user_texts.parquet").filter(pl.col("source") == source)
    found = []
    for row in table.iter_rows(named=True):
        user = int(row["user"])
        texts = row["interests"] or stated_likes(row["text"])
        cited = row["evidence_titles"] or [[]] * len(texts)
        entries = [
            {"text": t, "item_ids": [log.index_of_title[c] for c in titles if c in log.index_of_title]}
            for t, titles in zip(texts, cited, strict=True)
        ]
        found.append((user, read_answer(entries, log.events[user], MODEL_CHARS)))
    return _non_empty(found)


def _non_empty(found: Iterable[tuple[int, tuple[ParsedInterest, ...]]]) -> Interests:
    return {user: interests for user, interests in found if interests}


def summaries(data: Path, log: Log) -> list[str | None]:
    """One sentence about each film, by a model without any user, item 1 first; None for a film not in MovieLens-1M."""
    table = pl.read_parquet(data / "llm-text-ml-1m" / "item_texts.parquet")
    text_of: dict[str, str] = dict(zip(table["title"].to_list(), table["text"].to_list(), strict=True))
    return [text_of.get(title) for title in log.titles()]


def panel(log: Log, name: str, model: str, saw: str, written: Interests, *, names_support: bool) -> Panel:
    """A model's interests beside those of keyphrase from the whole and from the earlier part of the history."""
    whole = {u: log.events[u] for u in written}
    earlier = {u: log.earlier(u) for u in written}
    return Panel(
        name,
        {u: log.later(u) for u in written},
        [
            Side("keyphrase, whole", "whole history", True, keyphrase(log, whole), whole),
            Side(model, saw, True, written, whole, names_support),
            Side("keyphrase, earlier", "first 80 %", False, keyphrase(log, earlier), earlier),
            Side("20 titles, earlier", "first 80 %", False, newest_titles(log, earlier), earlier),
        ],
        model,
        {"a": "keyphrase, whole", "b": "keyphrase, earlier"},
        earlier,
    )


def same_films(log: Log, name: str, model: str, written: Interests) -> Panel:
    """All sides from the films that the model cites; targets are all other films of the user, which no side saw.

    The model was shown 25 films at most. Users of whom it cites at least 20 are kept, so that at most 5 of their
    targets were shown to it and to no other side.
    """
    cited = {u: list(dict.fromkeys(i for x in found for i in x.item_indices)) for u, found in written.items()}
    cited = {u: items for u, items in cited.items() if len(items) >= LEAST_CITED}
    written = {u: written[u] for u in cited}
    return Panel(
        name,
        {u: later_items([*items, *log.events[u]], len(items)) for u, items in cited.items()},
        [
            Side(model, "cited films", False, written, cited),
            Side("keyphrase, same films", "cited films", False, keyphrase(log, cited), cited),
            Side("20 titles, same films", "cited films", False, newest_titles(log, cited), cited),
        ],
        model,
        {"c": "keyphrase, same films"},
        cited,
    )
