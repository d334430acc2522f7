"""Makes text of unknown origin harmless: item titles on their way into a prompt, answers on their way out.

A title is data. It must not be able to end the quotation it stands in, the list, the line or the chat message, and must
not carry invisible characters that a reader of the prompt cannot see.
"""

import html
import re
import unicodedata
from functools import lru_cache

_CHAT_TOKEN = re.compile(
    r"<[|/\w][^<>\s]{0,40}>|\[/?(?:INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+)\]", re.IGNORECASE
)
_NEUTRAL = str.maketrans(
    {
        "[": "(",
        "]": ")",
        "{": "(",
        "}": ")",
        "<": "(",
        ">": ")",
        "|": "/",
        "\\": "/",
        '"': "'",
        "`": "'",
        "“": "'",
        "”": "'",
        "„": "'",
        "«": "'",
        "»": "'",
        "▁": "_",  # the space mark of sentencepiece, part of some models' special tokens
    }
)
_DECODE_ROUNDS = 3
"""Layers of HTML escaping undone (`&amp;lt;` has two); what is left is no bracket to a tokenizer."""


def printable(text: str, max_chars: int) -> str:
    """One line of visible text: control, format (bidi, zero-width), private and unassigned characters are removed.

    Args:
        text: anything.
        max_chars: longest result, in characters; cut at a word where there is one in the last third.
    """
    if text.isascii() and text.isprintable():  # most titles
        return _shorten(" ".join(text.split()), max_chars)
    kept = []
    for c in unicodedata.normalize("NFKC", text):
        if c.isspace():
            kept.append(" ")
        elif unicodedata.category(c)[0] != "C" and c != "\ufffd":
            kept.append(c)
    return _shorten(" ".join("".join(kept).split()), max_chars)


def _shorten(line: str, max_chars: int) -> str:
    if len(line) <= max_chars:
        return line
    space = line.rfind(" ", 0, max_chars + 1)
    return line[:space] if space > max_chars * 2 // 3 else line[:max_chars]


@lru_cache(maxsize=1 << 16)
def safe_title(title: str, max_chars: int) -> str:
    """A title that can stand between double quotes inside square brackets in a prompt.

    Chat-template tokens are dropped; brackets, quotes, bars and backslashes become harmless look-alikes; runs of `#`,
    `=` and `-` that read as a heading or a separator are shortened to one.
    """
    for _ in range(_DECODE_ROUNDS):
        title = html.unescape(title)
    title = printable(title, 4 * max_chars)
    before = None
    while before != title:  # removing one token can join the halves of another
        before, title = title, _CHAT_TOKEN.sub("", title)
    title = re.sub(r"([#=\-*_~])\1{2,}", r"\1", title.translate(_NEUTRAL))
    return printable(title, max_chars)
