"""Interests without a language model: categories of the history, each with the phrases that are typical for it.

The items of a history are grouped by category; a group's phrases are scored by class-based TF-IDF (Grootendorst,
"BERTopic", arXiv 2203.05794, equation 2, with document frequencies of the catalogue in place of those over classes):

    score(phrase, group) = titles of the group that hold it * log(1 + items / titles of the catalogue that hold it)

One group gives one interest, `Category: phrase, phrase, phrase`, with the group's items as support. The id of an item
without title gives no phrase: it would be the rarest of all, and names nothing. Deterministic; the baseline that a
language model has to beat, and the answer when one fails.
"""

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from pydantic import PositiveInt

from distributed_mi.core.config import ConfigModel
from distributed_mi.interests.backends.base import Backend, BackendContext, Request, Response
from distributed_mi.interests.history import UNNAMED, HistoryItem
from distributed_mi.interests.sanitize import printable

_WORD = re.compile(r"[^\W\d_][\w'-]*")
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and as at by for from in into is it its of on or the this that to with without w x s t vs via "
        "new set pack pcs pc piece pieces count ct size oz ounce ounces fl ml kg lb lbs inch inches cm mm item",
    )
)
"""Function words and units of measure of shop titles: frequent, and no interest."""
_CELLS = 1 << 22
"""Cells of the hashed document frequencies (16 MiB): memory does not grow with the catalogue. Among a million distinct
phrases about a fifth share a cell, which only blurs their weights."""


class DocumentFrequencies:
    """In how many catalogue titles a phrase stands, and under how many items a category; phrases in a hashed table."""

    def __init__(self, items: Iterable[HistoryItem]) -> None:
        self._titles = np.zeros(_CELLS, dtype=np.int32)
        self._categories: Counter[str] = Counter()
        self.num_items = 0
        for item in items:
            self.num_items += 1
            for phrase in title_phrases(item.title) if item.has_title else ():
                self._titles[zlib.crc32(phrase.encode()) % _CELLS] += 1
            self._categories.update(set(item.categories))

    def phrase_weight(self, phrase: str) -> float:
        """log(1 + items / titles that hold the phrase)."""
        held_by = int(self._titles[zlib.crc32(phrase.encode()) % _CELLS])
        return math.log1p(self.num_items / max(held_by, 1))

    def category_weight(self, category: str) -> float:
        """log(items / items in the category): 0 for a category that everything is in."""
        return math.log(max(self.num_items, 1) / max(self._categories[category], 1))


def title_phrases(title: str) -> set[str]:
    """Lower-case words of a title, and pairs of neighbouring words, without stop words and words of one letter."""
    words = [w.strip("'-") for w in _WORD.findall(printable(title, 1000).casefold().replace("\u2019", "'"))]
    kept = [w if len(w) > 1 and w not in _STOP_WORDS else "" for w in words]
    pairs = {f"{a} {b}" for a, b in pairwise(kept) if a and b and a != b}
    return {w for w in kept if w} | pairs


def _full_name(category: str, items: Sequence[HistoryItem]) -> str:
    """The category behind its parent ("Fragrance / Women's") when all items of the group agree on one."""
    if not category:
        return ""
    places = [i.categories.index(category) for i in items]
    parents = {i.categories[p - 1] if p else "" for i, p in zip(items, places, strict=True)}
    parent = parents.pop() if len(parents) == 1 else ""
    return f"{parent} / {category}" if parent else category


class KeyphraseBackend(Backend):
    """Class-based TF-IDF phrases of the titles, by category; see the module docstring."""

    in_process = True
    uses_catalogue = True
    cacheable = False

    class Config(ConfigModel):
        """How keyphrase interests are made."""

        phrases_per_interest: PositiveInt = 3
        """Phrases behind the category of an interest."""

    def __init__(self, config: Config, context: BackendContext) -> None:
        super().__init__(config, context)
        self._frequencies = DocumentFrequencies(context.catalogue)

    @classmethod
    def model_of(cls, config: Config) -> str:
        """The method and its version."""
        return "keyphrase-2"

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Answer every request; token counts are zero because there are none."""
        return [Response(r.user_index, self._answer(r.exemplar.history)) for r in requests]

    def _answer(self, history: Sequence[HistoryItem]) -> str:
        interests = [
            {"text": self._text(category, items), "item_ids": [i.item_index for i in items]}
            for category, items in self._groups(history)
        ]
        return json.dumps({"interests": interests}, ensure_ascii=False)

    def _groups(self, history: Sequence[HistoryItem]) -> list[tuple[str, list[HistoryItem]]]:
        """Cover the history with categories, greedily: the one with most uncovered items times its weight comes first.

        Ties go to the more special category (deeper in the path, then first by name). Items without a category make one
        group of their own, the last.
        """
        left = [i for i in history if i.categories]
        depth = {c: d for i in reversed(left) for d, c in enumerate(i.categories)}
        without = [i for i in history if not i.categories]
        room = max(self.context.max_interests - bool(without), 1)
        groups: list[tuple[str, list[HistoryItem]]] = []
        while left and len(groups) < room:
            counts = Counter(c for i in left for c in set(i.categories))
            best = min(
                counts, key=lambda c: (-counts[c] * self._frequencies.category_weight(c), -depth[c], c)
            )
            groups.append((best, [i for i in left if best in i.categories]))
            left = [i for i in left if best not in i.categories]
        if without and len(groups) < self.context.max_interests:
            groups.append(("", without))
        return groups

    def _text(self, category: str, items: Sequence[HistoryItem]) -> str:
        limit = self.context.max_interest_chars
        name = printable(_full_name(category, items), limit)
        items = [i for i in items if i.has_title]
        phrases = self._phrases(category, items) or list(dict.fromkeys(i.title for i in items))
        text, separator = name, ": " if name else ""
        for phrase in phrases[: self.config.phrases_per_interest]:
            longer = text + separator + phrase
            if len(longer) > limit:
                break
            text, separator = longer, ", "
        return text or printable(phrases[0] if phrases else UNNAMED, limit)

    def _phrases(self, category: str, items: Sequence[HistoryItem]) -> list[str]:
        """Phrases by falling score, ties by name; each brings a word that category and earlier phrases do not have."""
        counts = Counter(p for i in items for p in title_phrases(i.title))
        ranked = sorted(counts, key=lambda p: (-counts[p] * self._frequencies.phrase_weight(p), -len(p), p))
        seen = title_phrases(category)
        chosen: list[str] = []
        for phrase in ranked:
            if any(w not in seen for w in phrase.split()):
                chosen.append(phrase)
                seen |= set(phrase.split())
                if len(chosen) == self.config.phrases_per_interest:
                    break
        return chosen


BACKEND = KeyphraseBackend
