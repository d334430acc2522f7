"""MovieLens ratings and movies as GroupLens ships them, told apart by file name (each also `.gz`, `.zst`).

    ratings.dat  user::item::rating::seconds            movies.dat  item::title::genre|genre       (1M, 10M)
    ratings.csv  userId,movieId,rating,timestamp        movies.csv  movieId,title,genres           (20M, 25M, latest)
    u.data       user <tab> item <tab> rating <tab> s   u.item      item|title|...|19 genre flags  (100K, Latin-1)

Given a folder, the files of these names are read and the others (`users.dat`, `README`) left alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distributed_mi.core.config import ConfigModel
from distributed_mi.core.errors import InputError
from distributed_mi.data.readers.base import Parsed, Reader, ReadTask, What
from distributed_mi.data.records import EventColumns, Record, decode_fields, events_of, items_of, read_records

_COLUMNS = EventColumns("user", "item", "timestamp", rating="rating")
_RATING = ("user", "item", "rating", "timestamp")
_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
"""Order of the flags in `u.item`, as in `u.genre`."""


@dataclass(frozen=True)
class _Layout:
    names: Sequence[str]
    delimiter: str
    encoding: str = "utf-8"
    header: bool = False


_LAYOUTS: dict[What, dict[str, _Layout]] = {
    "interactions": {
        "ratings.dat": _Layout(_RATING, "::"),
        "ratings.csv": _Layout(_RATING, ",", header=True),
        "u.data": _Layout(_RATING, "\t"),
    },
    "items": {
        "movies.dat": _Layout(("item", "title", "genres"), "::", "latin-1"),
        "movies.csv": _Layout(("item", "title", "genres"), ",", header=True),
        "u.item": _Layout(("item", "title", "released", "video", "url", *_GENRES), "|", "latin-1"),
    },
}


class MovieLensReader(Reader):
    """Reads ratings as events and movies as items."""

    class Config(ConfigModel):
        """There is nothing to configure: the file name fixes the layout."""

    def select(self, paths: Sequence[str], what: What) -> list[str]:
        """The files that MovieLens names so.

        Raises:
            InputError: there are none.
        """
        chosen = [path for path in paths if _known_name(path, what)]
        if not chosen:
            found = ", ".join(sorted(path.rsplit("/", 1)[-1] for path in paths)[:5])
            raise InputError(f"movielens: no {' or '.join(_LAYOUTS[what])} for data.{what}; found {found}")
        return chosen

    def read(self, task: ReadTask, what: What) -> Iterator[Parsed]:
        """Rows of one file."""
        layout = _LAYOUTS[what][_known_name(task.path, what)]
        decode = decode_fields(layout.names, layout.delimiter)
        for chunk in read_records(task, decode, encoding=layout.encoding, skip_rows=int(layout.header)):
            if what == "interactions":
                yield events_of(chunk, task, _COLUMNS, "s")
            else:
                yield items_of(chunk, task, _item)


def _known_name(path: str, what: What) -> str:
    """Name of the layout of a file, or an empty text."""
    name = path.rsplit("/", 1)[-1].lower().removesuffix(".gz").removesuffix(".zst")
    return name if name in _LAYOUTS[what] else ""


def _item(record: Record) -> dict[str, Any]:
    if "genres" in record:
        genres = [g for g in record["genres"].split("|") if g and g != "(no genres listed)"]
    else:
        genres = [g for g in _GENRES if record[g] == "1"]
    return {"item": record["item"], "title": record["title"], "brand": None, "categories": genres}


READER = MovieLensReader
