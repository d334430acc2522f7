"""Progress of long work: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

logger = logging.getLogger(__name__)

PLAIN_INTERVAL_S = 10.0
"""Seconds between two plain lines."""


class Bar(Protocol):
    """What a stage sees of a progress bar."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished units; `note` is shown behind the numbers (a loss, a number of exemplars)."""


@contextmanager
def track(what: str, total: int | None, unit: str) -> Iterator[Bar]:
    """Show the progress of `total` units (None: unknown) of work named `what`."""
    if sys.stderr.isatty():
        with _rich_bar(what, total, unit) as bar:
            yield bar
    else:
        plain = _PlainBar(what, total, unit)
        yield plain
        plain.finish()


@contextmanager
def _rich_bar(what: str, total: int | None, unit: str) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(what, total=total, rate="", note="")
        started = time.monotonic()

        class _Rich:
            done = 0

            def advance(self, count: int = 1, note: str = "") -> None:
                self.done += count
                rate = self.done / max(time.monotonic() - started, 1e-9)
                fields: dict[str, Any] = {"rate": f"{rate:,.0f} {unit}/s"}
                if note:
                    fields["note"] = note
                progress.update(task, advance=count, **fields)

        yield _Rich()


class _PlainBar:
    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done, self.note = 0, ""
        self.started = self.last = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if time.monotonic() - self.last >= PLAIN_INTERVAL_S:
            self.last = time.monotonic()
            self._line()

    def finish(self) -> None:
        self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        share = f"/{self.total:,} ({self.done / self.total:.0%})" if self.total else ""
        left = (
            f", {(self.total - self.done) / rate:,.0f} s left"
            if self.total and 0 < self.done < self.total
            else ""
        )
        note = f" {self.note}" if self.note else ""
        logger.info(
            "%s: %s%s %s, %.0f s, %s/s%s%s",
            self.what,
            f"{self.done:,}",
            share,
            self.unit,
            seconds,
            f"{rate:,.1f}",
            left,
            note,
        )
