"""Text of items and language models on its way to a terminal. It is never trusted.

Titles come from raw logs and answers from a language model: either may hold terminal escape sequences, bidirectional
overrides that reorder a line, or console markup.
"""

import io
import shutil
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_PLAIN_WIDTH = 120
"""Columns when the output is not a terminal."""


def clean(text: str | None, limit: int = 90) -> str:
    """One printable line: control, format and private characters removed, white space collapsed, cut at `limit`."""
    kept = (c if not unicodedata.category(c).startswith("C") else " " for c in text or "")
    line = " ".join("".join(kept).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def table(*headers: str, numbers: tuple[str, ...] = ()) -> "Table":
    """A table without lines; the columns named in `numbers` are right aligned."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, show_header=any(headers))
    for header in headers:
        made.add_column(header, justify="right" if header in numbers else "left", no_wrap=header in numbers)
    return made


def add_row(made: "Table", *cells: str) -> None:
    """Add cells as literal text: square brackets mean nothing."""
    from rich.markup import escape

    made.add_row(*(escape(cell) for cell in cells))


def to_text(*parts: "RenderableType") -> str:
    """Lay out strings (literal, unless they are renderables) and tables for the current terminal, without colours."""
    from rich.console import Console
    from rich.text import Text

    width = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns if sys.stdout.isatty() else _PLAIN_WIDTH
    stream = io.StringIO()
    console = Console(file=stream, width=max(width, 60), highlight=False, emoji=False, color_system=None)
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
