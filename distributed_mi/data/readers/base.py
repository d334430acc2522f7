"""What every log format provides: a plan of reading tasks, and for each task canonical rows plus the rows it refused.

A reader runs inside tasks on any machine of a cluster: it is picklable, keeps no open file and writes nothing. See
`tests/contracts/test_readers.py` for what is asked of each.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.fs as pafs

from distributed_mi.core import schema
from distributed_mi.core.config import ConfigModel

What = Literal["interactions", "items"]
"""Which of the two inputs a task reads."""

ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("source_order", pa.int64()),
    ]
)
"""Columns of item metadata as readers yield them."""

EXTRA_EVENT_COLUMNS = pa.schema([("position", pa.int64()), ("rating", pa.float64())])
"""Columns that a reader may add to the declared `events`: order among equal timestamps, and the rating."""

ROWS_PER_FILE = 1 << 40
"""`source_order` of a row is its file's number times this, plus its row number: the order over all files."""


@dataclass(frozen=True)
class ReadTask:
    """One file, or a part of one, or a part of a generated data set.

    Args:
        number: place of the file among the inputs, in name order.
        filesystem: where it lies.
        path: path on that file system.
        source: file name as written to rejected rows; never a path of one machine.
        start: first row group, user or other unit of the part.
        stop: one past the last.
        first_row: 1-based number of the part's first row in the file.
    """

    number: int
    filesystem: pafs.FileSystem | None = field(repr=False)
    path: str
    source: str
    start: int = 0
    stop: int = 0
    first_row: int = 1

    def order(self, row: int) -> int:
        """`source_order` of a row number of this file."""
        return self.number * ROWS_PER_FILE + row


@dataclass(frozen=True)
class Parsed:
    """What came of a chunk of rows.

    Args:
        rows: `events` (with or without `EXTRA_EVENT_COLUMNS`) or `ITEMS`.
        rejected: `rejected`, in row order.
    """

    rows: pa.Table
    rejected: pa.Table


class Reader(ABC):
    """Base of all log formats. A file exports its subclass as `READER`."""

    Config: ClassVar[type[ConfigModel]]
    needs_files: ClassVar[bool] = True
    """False for a reader that generates its data."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def plan(self, filesystem: pafs.FileSystem, paths: Sequence[str], what: What) -> list[ReadTask]:
        """Reading tasks for the input files; one per file unless the format can be split.

        Raises:
            InputError: a file cannot be of this format; names file and column.
        """
        return [
            ReadTask(number, filesystem, path, path.rsplit("/", 1)[-1])
            for number, path in enumerate(self.select(paths, what))
        ]

    def select(self, paths: Sequence[str], what: What) -> list[str]:
        """The paths that this format reads; hidden files and markers such as `_SUCCESS` are left out."""
        del what
        return [path for path in paths if not path.rsplit("/", 1)[-1].startswith((".", "_"))]

    @abstractmethod
    def read(self, task: ReadTask, what: What) -> Iterator[Parsed]:
        """Rows of one task in chunks; the same chunks every time.

        Raises:
            InputError: the file lacks a column; names file and column.
        """

    def estimate_bytes(self) -> int:
        """Rough size of a generated data set; 0 for formats that read files."""
        return 0


def no_rejects() -> pa.Table:
    """An empty table of rejected rows."""
    return schema.empty("rejected")
