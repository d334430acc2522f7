"""Answers by the hash of everything that decides them, shared between runs, workspaces and machines.

A cache is a folder of Parquet segments. A segment is written whole under a name of its own and never changed, so any
number of writers and readers may use a folder at the same time, on a disk or in an object store; two writers that paid
for the same answer leave two rows of which either will do. A row carries a digest of its contents: one that does not
agree with it, and a segment that cannot be read, are passed over, counted, and left where they are.
"""

import hashlib
import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distributed_mi.core import schema
from distributed_mi.core.artifacts import list_files, resolve_url, write_table
from distributed_mi.core.errors import SchemaMismatchError
from distributed_mi.interests.backends.base import Response
from distributed_mi.interests.ladder import Reply

logger = logging.getLogger(__name__)

TABLE = "cached_answers"


class AnswerCache:
    """A folder of answers.

    Args:
        url: local directory or URL; need not be there yet.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self._path = resolve_url(url)
        self._segments: set[str] = set()
        """Whose keys are known."""
        self._where: dict[str, str] = {}
        """Hash -> segment."""
        self.unreadable = 0
        """Segments and rows that were passed over."""
        self.unwritten = 0
        """Answers that could not be stored."""

    def lookup(self, keys: Sequence[str]) -> dict[str, Response]:
        """The responses that are there, by hash; their `user_index` is -1."""
        self._refresh()
        wanted: dict[str, list[str]] = {}
        for key in dict.fromkeys(keys):
            if key in self._where:
                wanted.setdefault(self._where[key], []).append(key)
        found: dict[str, Response] = {}
        for path, some in wanted.items():
            table = self._read(path, None)
            if table is None:
                continue
            rows = table.filter(pc.is_in(table["key"], pa.array(some, pa.string()))).to_pylist()
            for row in rows:
                if row["digest"] != _digest(row):
                    self.unreadable += 1
                    logger.warning("%s: the row of %s is damaged and passed over", path, row["key"])
                    self._where.pop(row["key"], None)
                    continue
                found[row["key"]] = Response(
                    -1,
                    row["text"],
                    num_prompt_tokens=row["num_prompt_tokens"],
                    num_answer_tokens=row["num_answer_tokens"],
                    finish_reason="length" if row["finish_reason"] == "length" else "stop",
                )
        return found

    def store(self, replies: Iterable[Reply], backend: str, model: str) -> int:
        """Add what was answered, errors left out; returns the rows written.

        A cache that cannot be written loses nobody's answer: it is said once and counted.
        """
        rows = []
        for reply in replies:
            response = reply.response
            if response.error is not None or reply.key in self._where:
                continue
            row: dict[str, Any] = {
                "key": reply.key,
                "text": response.text,
                "finish_reason": response.finish_reason,
                "num_prompt_tokens": response.num_prompt_tokens,
                "num_answer_tokens": response.num_answer_tokens,
                "backend": backend,
                "model": model,
                "created": int(time.time() * 1000),
            }
            rows.append(row | {"digest": _digest(row)})
        if not rows:
            return 0
        path = f"{self._path}/{time.time_ns():020d}-{uuid.uuid4().hex}.parquet"
        try:
            write_table(self.fs, path, pa.Table.from_pylist(rows, schema.TABLES[TABLE]), TABLE)
        except OSError as error:
            if not self.unwritten:
                logger.warning("interests: the answer cache %s cannot be written: %s", self.url, error)
            self.unwritten += len(rows)
            return 0
        self._segments.add(path)
        self._where.update((row["key"], path) for row in rows)
        return len(rows)

    def _refresh(self) -> None:
        try:
            paths = list_files(self.fs, self._path, ".parquet")
        except OSError as error:
            logger.warning("interests: the answer cache %s cannot be read: %s", self.url, error)
            return
        for path in paths:
            if path in self._segments:
                continue
            self._segments.add(path)
            table = self._read(path, ["key"])
            if table is not None:
                self._where.update((key, path) for key in table["key"].to_pylist())

    def _read(self, path: str, columns: list[str] | None) -> pa.Table | None:
        try:
            table = pq.read_table(path, filesystem=self.fs, columns=columns)
            if columns is None:
                schema.check(table.schema, TABLE)
            elif table.column_names != columns:
                raise SchemaMismatchError(f"columns {table.column_names}")
        except (pa.ArrowException, SchemaMismatchError, OSError) as error:
            self.unreadable += 1
            logger.warning("interests: %s of the answer cache is passed over: %s", path, error)
            return None
        return table


def _digest(row: dict[str, Any]) -> str:
    parts = (
        row["key"],
        row["text"],
        row["finish_reason"],
        row["num_prompt_tokens"],
        row["num_answer_tokens"],
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
