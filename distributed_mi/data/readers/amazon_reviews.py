"""Amazon reviews and product metadata, releases of 2014 and 2018: one JSON object per line, plain, gzip or Zstandard.

Reviews: `reviewerID`, `asin`, `unixReviewTime` (seconds), `overall`. Metadata: `asin`, `title`, `brand`, and `category`
(2018) or `categories` (2014, where the lines are Python literals rather than JSON).

The release of 2023 names its columns differently; read it with the `table` reader.
"""

import html
from collections.abc import Iterator
from typing import Any

from distributed_mi.core.config import ConfigModel
from distributed_mi.data.readers.base import Parsed, Reader, ReadTask, What
from distributed_mi.data.records import (
    EventColumns,
    Record,
    decode_json,
    decode_json_or_literal,
    events_of,
    items_of,
    read_records,
)

_COLUMNS = EventColumns("reviewerID", "asin", "unixReviewTime", rating="overall")


class AmazonReviewsReader(Reader):
    """Reads reviews as events and product metadata as items."""

    class Config(ConfigModel):
        """There is nothing to configure: the releases fix the names."""

    def read(self, task: ReadTask, what: What) -> Iterator[Parsed]:
        """Rows of one file."""
        if what == "interactions":
            for chunk in read_records(task, decode_json):
                yield events_of(chunk, task, _COLUMNS, "s")
        else:
            for chunk in read_records(task, decode_json_or_literal):
                yield items_of(chunk, task, _item, required=["asin"])


def _item(record: Record) -> dict[str, Any]:
    categories = record["category"] if "category" in record else record.get("categories")
    return {
        "item": record.get("asin"),
        "title": _unescaped(record.get("title")),
        "brand": _unescaped(record.get("brand")),
        "categories": list(dict.fromkeys(_flat(categories))) if isinstance(categories, list) else None,
    }


def _flat(value: Any) -> Iterator[str]:
    """Names in a list, or in the list of paths of 2014, top level first."""
    if isinstance(value, list):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, str) and value.strip():
        yield html.unescape(value).strip()


def _unescaped(value: Any) -> Any:
    """Titles carry HTML entities (`&amp;`) in both releases."""
    return html.unescape(value) if isinstance(value, str) else value


READER = AmazonReviewsReader
