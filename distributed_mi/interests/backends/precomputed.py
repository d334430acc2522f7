"""Answers from a file: texts that were made elsewhere, or by an earlier run, in place of a language model.

Parquet, JSON lines, or JSON (a list of rows, or one object `{user: answer, ...}`), by the end of the name; what has
`.gz`, `.zst` or `.bz2` behind that is unpacked. A row holds a user's outside id and an answer, which is one of

    ["text", ...]                                  interests without support
    [{"text": "...", "item_ids": [...]}, ...]      interests with the items that support them
    {"interests": <one of the two above>}
    "..."                                          what a model wrote, read like any model's answer (`parse.py`)

The ids of the last form are those of a prompt (`item_index`); the others' are what `item_key` says. An id that the
user's history does not show becomes 0, which no item has, so that it is refused and counted like a model's wrong id.

Examples of settings, for public texts about MovieLens users:

    one row for each interest       user_field = "user", rows = "interest"
    one paragraph for each user     user_field = "user", answer_field = "text", rows = "interest"
    a list for each user, several   user_field = "user", where = {source = "..."}, items_field = "evidence_titles",
    sources, items by their titles  item_key = "title"

All answers are held in memory. A user that is not in the file gets an error of its own.
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field

from distributed_mi.core.artifacts import expand_inputs, fingerprint_files, resolve_url
from distributed_mi.core.config import ConfigModel, runtime
from distributed_mi.core.errors import InputError
from distributed_mi.interests.backends.base import Backend, BackendContext, Request, Response
from distributed_mi.interests.history import Exemplar

logger = logging.getLogger(__name__)

_DEFAULT_FIELDS = ("interests", "text")
_PACKED = frozenset({".gz", ".zst", ".bz2"})
_ROWS_LOGGED = 10
"""Bad rows that get a line of their own in the log."""
_UNKNOWN_ITEM = 0

Interests = tuple[tuple[str, tuple[str, ...]], ...]
"""(text, ids of the items that support it) of each interest."""


class PrecomputedBackend(Backend):
    """Looks answers up; see the module docstring."""

    in_process = True
    cacheable = False
    """Two users with the same history, so the same prompt, have answers of their own."""

    class Config(ConfigModel):
        """Where the answers stand, and how their rows are read."""

        path: str = runtime()
        """File with the answers: a path, a folder or glob of such files, or a URL. Files of the same names, sizes and
        times are the same to a later run, wherever they lie."""
        user_field: str = "user_id"
        """Column or field of the user's outside id; `a.b` is field b inside of a."""
        answer_field: str = ""
        """Column or field of the answer; `a.b` is field b inside of a. Empty: `interests`, and `text` where a row has
        none."""
        items_field: str = ""
        """Column or field with the items that support the interests: one list for each interest of the row, in the same
        order (for `rows = "interest"` one list). Empty: only what stands inside the answer."""
        item_key: Literal["item_id", "item_index", "title"] = "item_id"
        """How items are named: by their outside id, their number in this workspace, or their title."""
        rows: Literal["user", "interest"] = "user"
        """Whether a row holds all interests of a user, or one of them (its text is the answer field)."""
        where: dict[str, str | int | bool] = Field({})
        """Only rows whose fields have these values are read, such as `{source = "gpt-4"}`."""
        model: str = ""
        """Name stored beside the answers; empty: the name of the file."""

    def __init__(self, config: Config, context: BackendContext) -> None:
        super().__init__(config, context)
        self._answers = _Reader(config).read()
        first = next(iter(self._answers))
        self._holds = f"{config.path}, which holds {len(self._answers):,} users such as {first!r}"
        logger.info("answers of %d users read from %s", len(self._answers), config.path)

    @classmethod
    def model_of(cls, config: Config) -> str:
        """The given name, or the file's."""
        return config.model or PurePosixPath(config.path).name or config.path

    @classmethod
    def fingerprint(cls, config: Any) -> Any:
        """Names, sizes and times of the files.

        Raises:
            InputError: there are none.
        """
        with _naming_the_setting():
            return fingerprint_files(config.path)

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Look every user up; token counts are zero because none were paid for now."""
        return [self._response(r) for r in requests]

    def _response(self, request: Request) -> Response:
        exemplar = request.exemplar
        answer = self._answers.get(exemplar.user_id)
        if answer is None:
            error = f"user {exemplar.user_id!r} is not in {self._holds}"
            return Response(exemplar.user_index, finish_reason="error", error=error)
        text = answer if isinstance(answer, str) else self._as_json(answer, exemplar)
        return Response(exemplar.user_index, text)

    def _as_json(self, interests: Interests, exemplar: Exemplar) -> str:
        number_of = {str(getattr(i, self.config.item_key)): i.item_index for i in exemplar.history}
        found = [
            {"text": text, "item_ids": [number_of.get(i, _UNKNOWN_ITEM) for i in ids]}
            for text, ids in interests
        ]
        return json.dumps({"interests": found}, ensure_ascii=False)


@contextmanager
def _naming_the_setting() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"interests.backend.path: {error}") from error


class _BadRowError(Exception):
    """A row that is set aside, and why."""


@dataclass(frozen=True)
class _Row:
    """One row, its number counted from 1 in its file, or the reason why it cannot be read."""

    file: str
    number: int
    fields: Mapping[str, Any] | _BadRowError


class _Reader:
    """Files -> answers by user."""

    def __init__(self, config: PrecomputedBackend.Config) -> None:
        self._config = config
        self._answer_fields = (config.answer_field,) if config.answer_field else _DEFAULT_FIELDS
        self._num_rows = self._num_bad = 0
        self._first_bad = ""

    def read(self) -> dict[str, str | Interests]:
        """Outside user id -> answer.

        Raises:
            InputError: a file is missing, empty or of another form, no row can be used, or a user has two answers.
        """
        answers: dict[str, str | Interests] = {}
        places: dict[str, tuple[str, int]] = {}
        for row in self._all_rows():
            try:
                found = self._user_and_answer(row)
            except _BadRowError as error:
                self._set_aside(row, error)
                continue
            if found is not None:
                self._add(answers, places, row, *found)
        self._check(answers)
        return answers

    def _add(
        self,
        answers: dict[str, str | Interests],
        places: dict[str, tuple[str, int]],
        row: _Row,
        user: str,
        answer: str | Interests,
    ) -> None:
        known = answers.get(user)
        if known is None:
            answers[user], places[user] = answer, (row.file, row.number)
        elif isinstance(known, tuple) and isinstance(answer, tuple) and self._config.rows == "interest":
            answers[user] = known + answer
        elif known != answer:
            file, number = places[user]
            raise InputError(
                f"{row.file}, row {row.number}: {self._config.user_field} {user!r} has another answer than in row "
                f"{number}{'' if file == row.file else ' of ' + file}. Choose rows with "
                'interests.backend.where, or set interests.backend.rows="interest" if each row is one interest.'
            )

    def _check(self, answers: Mapping[str, Any]) -> None:
        path = self._config.path
        if self._num_bad:
            logger.warning("%s: %d of %d rows set aside", path, self._num_bad, self._num_rows)
        if answers:
            return
        if not self._num_rows:
            raise InputError(f"{path} holds no rows")
        if self._num_bad:
            raise InputError(
                f"{path}: none of {self._num_rows:,} rows can be used. The first that cannot: {self._first_bad}. Check "
                "interests.backend.user_field and .answer_field."
            )
        raise InputError(
            f"{path}: none of {self._num_rows:,} rows has the values of interests.backend.where = {self._config.where}"
        )

    def _set_aside(self, row: _Row, error: _BadRowError) -> None:
        self._num_bad += 1
        where = f"{row.file}, row {row.number}: {error}"
        self._first_bad = self._first_bad or where
        if self._num_bad <= _ROWS_LOGGED:
            logger.warning("set aside: %s", where)

    # Rows of a file.

    def _all_rows(self) -> Iterator[_Row]:
        path = self._config.path
        filesystem = resolve_url(path)[0] if "://" in path else pafs.LocalFileSystem()
        with _naming_the_setting():
            files = expand_inputs(path)
        for file in files:
            rows = _FORMATS.get(_suffix(file))
            if rows is None:
                raise InputError(f"{file}: the name of a file of answers must end in {', '.join(_FORMATS)}")
            try:
                for row in rows(self, filesystem, file):
                    self._num_rows += 1
                    yield row
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(f"{file} cannot be read: {error}") from error

    def _parquet(self, filesystem: pafs.FileSystem, file: str) -> Iterator[_Row]:
        with pq.ParquetFile(file, filesystem=filesystem) as opened:
            columns = self._columns(file, opened.schema_arrow.names)
            number = 0
            for batch in opened.iter_batches(1024, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield _Row(file, number, fields)

    def _columns(self, file: str, names: Sequence[str]) -> list[str]:
        config = self._config

        def column(field: str, setting: str) -> str:
            name = field if field in names else field.split(".", 1)[0]
            if name not in names:
                raise InputError(
                    f"{file} has no column {name!r} (interests.backend.{setting}). It has: {', '.join(names)}"
                )
            return name

        wanted = [column(config.user_field, "user_field")]
        if config.answer_field:
            wanted.append(column(config.answer_field, "answer_field"))
        elif not (default := [f for f in _DEFAULT_FIELDS if f in names]):
            raise InputError(
                f"{file} has no column {' or '.join(map(repr, _DEFAULT_FIELDS))}; name the one with the answers in "
                f"interests.backend.answer_field. It has: {', '.join(names)}"
            )
        else:
            wanted += default
        if config.items_field:
            wanted.append(column(config.items_field, "items_field"))
        wanted += [column(f, "where") for f in config.where]
        return list(dict.fromkeys(wanted))

    def _json_lines(self, filesystem: pafs.FileSystem, file: str) -> Iterator[_Row]:
        with _opened(filesystem, file) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _Row(file, number, _as_fields(_loads(line)))

    def _json(self, filesystem: pafs.FileSystem, file: str) -> Iterator[_Row]:
        with _opened(filesystem, file) as stream:
            value = _loads(stream.read())
        if isinstance(value, _BadRowError):
            raise InputError(f"{file} cannot be read as JSON: {value}")
        if isinstance(value, dict) and _field(value, self._config.user_field) is None:
            name = self._config.answer_field or _DEFAULT_FIELDS[0]
            value = [
                {self._config.user_field: user, **(v if isinstance(v, dict) else {name: v})}
                for user, v in value.items()
            ]
        for number, fields in enumerate(value if isinstance(value, list) else [value], 1):
            yield _Row(file, number, _as_fields(fields))

    # One row.

    def _user_and_answer(self, row: _Row) -> tuple[str, str | Interests] | None:
        """None for a row that `where` leaves out."""
        config, fields = self._config, row.fields
        if isinstance(fields, _BadRowError):
            raise fields
        if any(str(_field(fields, name)) != str(value) for name, value in config.where.items()):
            return None
        user = _id(_field(fields, config.user_field))
        if not user:
            raise _BadRowError(
                f"no user id in {config.user_field!r} (the row has: {', '.join(fields)[:200]})"
            )
        items = _field(fields, config.items_field) if config.items_field else None
        return user, self._answer(fields, items)

    def _answer(self, fields: Mapping[str, Any], items: Any) -> str | Interests:
        values = [v for name in self._answer_fields if (v := _field(fields, name)) is not None]
        if not values:
            raise _BadRowError(f"no answer in {' or '.join(map(repr, self._answer_fields))}")
        value = next((v for v in values if v), values[0])
        if self._config.rows == "interest":
            return ((_text(value), _ids(items)),)
        if isinstance(value, dict):
            value = value.get("interests")
        if isinstance(value, str):
            return _text(value)
        if not isinstance(value, list):
            raise _BadRowError(f"an answer is a text or a list of interests, not {_shown(value)}")
        interests = tuple(_interest(v) for v in value)
        if not items:
            return interests
        if not isinstance(items, list) or len(items) != len(interests):
            raise _BadRowError(
                f"{self._config.items_field!r} is not one list for each of {len(interests)} interests"
            )
        return tuple((text, ids + _ids(more)) for (text, ids), more in zip(interests, items, strict=True))


_FORMATS = {
    ".parquet": _Reader._parquet,
    ".jsonl": _Reader._json_lines,
    ".ndjson": _Reader._json_lines,
    ".json": _Reader._json,
}
"""End of a file's name -> how its rows are read."""


def _suffix(file: str) -> str:
    name = PurePosixPath(file.lower())
    return PurePosixPath(name.stem).suffix if name.suffix in _PACKED else name.suffix


def _opened(filesystem: pafs.FileSystem, file: str) -> io.BufferedReader:
    """The unpacked bytes of a file."""
    return io.BufferedReader(filesystem.open_input_stream(file))


def _loads(data: bytes) -> Any:
    """The JSON value; a `_BadRowError` in its place when there is none."""
    try:
        return json.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        return _BadRowError(f"no JSON ({error})")


def _as_fields(value: Any) -> Mapping[str, Any] | _BadRowError:
    return (
        value
        if isinstance(value, dict | _BadRowError)
        else _BadRowError(f"no JSON object but {_shown(value)}")
    )


def _field(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a field, also of `a.b`; None when it is missing."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _id(value: Any) -> str:
    """An id as text: 12, 12.0 (an integer column that had gaps) and "12" are the same; "" for what is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return ""
    return str(value)


def _text(value: Any, *, blank: bool = False) -> str:
    """A text, with something in it unless `blank`; half surrogate pairs, which cannot be stored, become `?`."""
    if not isinstance(value, str) or not (blank or value.strip()):
        raise _BadRowError(f"a text is expected, not {_shown(value)}")
    return value.encode("utf-8", "replace").decode()


def _interest(value: Any) -> tuple[str, tuple[str, ...]]:
    """One of a list; an interest without text is dropped and counted where answers are checked (`parse.py`)."""
    if isinstance(value, dict):
        return _text(value.get("text"), blank=True), _ids(value.get("item_ids"))
    return _text(value, blank=True), ()


def _ids(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(ids := [_id(v) for v in value]):
        raise _BadRowError(f"a list of item ids is expected, not {_shown(value)}")
    return tuple(ids)


def _shown(value: Any) -> str:
    return repr(value)[:80]


BACKEND = PrecomputedBackend
