"""Text of an answer -> interests that were checked against the history, or a typed failure that is counted.

A model held to the schema gives JSON, but may run out of tokens; other models add code fences, number their interests
in a dictionary (the form printed in EIMF), or write a list. All of these are read. Ids that are not in the history are
refused.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from distributed_mi.interests.sanitize import printable

_MAX_ANSWER_CHARS = 200_000
_TEXT_KEYS = ("text", "interest", "name", "content", "description", "title", "interest_content")
_ID_KEYS = ("item_ids", "items", "ids", "evidence", "item_indices", "supporting_items")
_LIST_KEYS = ("interests", "interest", "answer", "result", "preferences", "interest_preferences")
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_LISTED = re.compile(r"^\s*(?:\d{1,3}[.):]|[-*•])\s+(\S.*)$")
_CUT_STACKS = ("[", "{[", "{", "{{")
"""Open brackets at which a truncated answer may be cut: between two interests, never inside one of a list."""


_EAST_ASIAN = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO"})


class FailureReason(StrEnum):
    """Why an answer was not used."""

    BLANK = "blank"
    """No text at all."""
    NOT_JSON = "not_json"
    """Neither JSON, nor truncated JSON with a complete interest, nor a list of lines."""
    NO_LIST = "no_list"
    """JSON, but nothing in it reads as interests."""
    NO_USABLE_INTEREST = "no_usable_interest"
    """Interests, but every text was empty or invisible."""
    BACKEND_ERROR = "backend_error"
    """The backend refused this prompt or failed on it."""
    ACTOR_DIED = "actor_died"
    """The actor died more than once while it answered this prompt."""


@dataclass(frozen=True)
class ParseFailure:
    """An answer that cannot be used."""

    reason: FailureReason
    detail: str = ""


@dataclass(frozen=True)
class ParsedInterest:
    """One checked interest: text, and the cited items that are in the history."""

    text: str
    item_indices: tuple[int, ...]


@dataclass(frozen=True)
class ParsedAnswer:
    """A checked answer. Empty `interests` means that the model said, in proper form, that there are none.

    Args:
        interests: at most the limit, in the order given.
        truncated: the text ended early and only its complete interests were kept.
        refused_ids: cited ids outside the history.
        merged: interests whose text repeated an earlier one.
        dropped: interests without a visible text.
        foreign: interests in a script that nobody asked for.
        over_limit: interests beyond the limit.
    """

    interests: tuple[ParsedInterest, ...]
    truncated: bool = False
    refused_ids: int = 0
    merged: int = 0
    dropped: int = 0
    over_limit: int = 0
    foreign: int = 0


def parse_answer(
    text: str,
    history: Collection[int],
    *,
    max_interests: int,
    max_interest_chars: int,
    scripts: frozenset[str] | None = None,
) -> ParsedAnswer | ParseFailure:
    """Read an answer.

    Args:
        text: what the backend returned.
        history: ids that were in the prompt.
        max_interests: kept at most.
        max_interest_chars: longest text kept, in characters.
        scripts: that an interest may be written in, as `script` names them; None: any.
    """
    body = _THINKING.sub("", text[:_MAX_ANSWER_CHARS]).strip()
    if not body:
        return ParseFailure(FailureReason.BLANK)
    value, truncated = _load(body)
    entries: list[tuple[str, list[int]]] | None
    if value is None:
        entries = [(line, []) for line in _lines(body)]
        if not entries:
            return ParseFailure(FailureReason.NOT_JSON, body[:200])
    else:
        entries = _entries(value)
        if entries is None:
            return ParseFailure(FailureReason.NO_LIST, body[:200])
    return _check(entries, frozenset(history), truncated, max_interests, max_interest_chars, scripts)


def script(text: str) -> str:
    """The script of most letters of a text: LATIN, CYRILLIC, ARABIC, ...; "" for a text without letters.

    Chinese, Japanese and Korean share theirs: EAST ASIAN.
    """
    if text.isascii():
        return "LATIN" if any(c.isalpha() for c in text) else ""
    names = Counter(unicodedata.name(c, "?").split(" ")[0].split("-")[0] for c in text if c.isalpha())
    if not names:
        return ""
    merged: Counter[str] = Counter()
    for name, count in names.items():
        merged["EAST ASIAN" if name in _EAST_ASIAN else name] += count
    return merged.most_common(1)[0][0]


def _check(
    entries: list[tuple[str, list[int]]],
    history: frozenset[int],
    truncated: bool,
    max_interests: int,
    max_chars: int,
    scripts: frozenset[str] | None,
) -> ParsedAnswer | ParseFailure:
    texts: dict[str, str] = {}
    support: dict[str, dict[int, None]] = {}
    refused = merged = dropped = foreign = 0
    for raw, ids in entries:
        text = printable(raw, max_chars)
        key = "".join(c for c in text.casefold() if c.isalnum())
        if not key:
            dropped += 1
            continue
        if scripts is not None and script(text) not in scripts:
            foreign += 1
            continue
        merged += key in texts
        texts.setdefault(key, text)
        known = [i for i in ids if i in history]
        refused += len(ids) - len(known)
        support.setdefault(key, {}).update(dict.fromkeys(known))
    if entries and not texts:
        return ParseFailure(
            FailureReason.NO_USABLE_INTEREST,
            f"{dropped} interests without a visible text, {foreign} in another script than the titles",
        )
    kept = list(texts)[:max_interests]
    return ParsedAnswer(
        interests=tuple(ParsedInterest(texts[k], tuple(support[k])) for k in kept),
        truncated=truncated,
        refused_ids=refused,
        merged=merged,
        dropped=dropped,
        foreign=foreign,
        over_limit=len(texts) - len(kept),
    )


def _load(body: str) -> tuple[Any, bool]:
    """The JSON value in a text and whether it had to be cut; (None, False) when there is none."""
    starts = _starts(body)
    for start in starts:
        try:
            return json.JSONDecoder().raw_decode(body[start:])[0], False
        except (ValueError, RecursionError):
            continue
    for start in starts:
        for cut in _cuts(body[start:]):
            try:
                value = json.loads(cut)
            except (ValueError, RecursionError):
                continue
            if _entries(value):
                return value, True
    return None, False


def _starts(body: str) -> list[int]:
    """Where a JSON value may begin: behind a code fence, at the start of a line, at the first bracket."""
    fenced = [m.start(1) for m in re.finditer(r"```\w*\s*([{\[])", body)][:1]
    at_line_start = [m.start() for m in re.finditer(r"^[{\[]", body, re.MULTILINE)][:1]
    first = [m.start() for m in re.finditer(r"[{\[]", body)][:1]
    return list(dict.fromkeys(fenced + at_line_start + first))


def _cuts(body: str) -> Iterator[str]:
    """A truncated JSON text, ended after each place where an interest may be complete; the longest first."""
    stack: list[str] = []
    in_string = escaped = False
    places: list[tuple[int, str]] = []
    for position, c in enumerate(body):
        if in_string:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == '"':
                in_string = False
            continue
        if c == '"':
            in_string = True
        elif c in "{[":
            stack.append(c)
        elif c in "}]":
            if not stack:
                break
            stack.pop()
            places.append((position + 1, "".join(stack)))
        elif c == ",":
            places.append((position, "".join(stack)))
    for position, open_brackets in reversed(places[-100:]):
        if open_brackets in _CUT_STACKS:
            closing = "".join("]" if b == "[" else "}" for b in reversed(open_brackets))
            yield body[:position] + closing


def _entries(value: Any, depth: int = 0) -> list[tuple[str, list[int]]] | None:
    """(text, ids) of each interest in any of the accepted forms; None when it is none of them."""
    if depth > 3:
        return None
    if isinstance(value, list):
        found = [_entry(v) for v in value]
        return None if value and not any(found) else [f for f in found if f is not None]
    if not isinstance(value, dict):
        return None
    for key in _LIST_KEYS:
        if isinstance(value.get(key), list | dict):
            return _entries(value[key], depth + 1)
    single = _entry(value) if any(isinstance(value.get(k), str) for k in _TEXT_KEYS) else None
    if single is not None:
        return [single]
    if len(value) == 1 and isinstance(next(iter(value.values())), dict):
        return _entries(next(iter(value.values())), depth + 1)
    found = [_named_entry(k, v) for k, v in value.items()]
    return None if value and not any(found) else [f for f in found if f is not None]


def _named_entry(key: str, value: Any) -> tuple[str, list[int]] | None:
    """`"1": "text"`, `"1": {...}` or `"text": [ids]`."""
    if isinstance(value, list) and not key.strip().isdigit():
        return key, _ids(value)
    return _entry(value)


def _entry(value: Any) -> tuple[str, list[int]] | None:
    if isinstance(value, str):
        return value, []
    if not isinstance(value, dict):
        return None
    text = next((value[k] for k in _TEXT_KEYS if isinstance(value.get(k), str)), None)
    if text is None and len(value) == 1:
        text = next((v for v in value.values() if isinstance(v, str)), None)
    if text is None:
        return None
    category = value.get("category")
    if isinstance(category, str) and category.strip() and text.strip():
        text = f"{category.strip()}: {text}"
    ids: Any = next((value[k] for k in _ID_KEYS if k in value), [])
    return text, _ids(ids if isinstance(ids, list) else [ids])


def _ids(values: list[Any]) -> list[int]:
    """Whole numbers among numbers and strings such as "12" or "ID 12"; anything else counts as a wrong id (-1)."""
    out = []
    for v in values:
        if isinstance(v, int) and not isinstance(v, bool):
            out.append(v)
        elif isinstance(v, str) and (match := re.search(r"\d{1,18}", v)):
            out.append(int(match.group()))
        elif isinstance(v, float) and v.is_integer():
            out.append(int(v))
        else:
            out.append(-1)
    return out


def _lines(body: str) -> list[str]:
    """The items of a numbered or bulleted list; a single such line is taken for prose."""
    found = [m.group(1).strip() for m in map(_LISTED.match, body.splitlines()) if m]
    return found if len(found) > 1 else []
