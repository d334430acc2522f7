"""Configuration: pydantic models read from TOML, dotted overrides, and a hash of what changes the result.

The string under a field is its documentation; `--help` prints it. A field that does not change the result (a number
of workers, a path that is hashed elsewhere) is declared with `runtime(...)` and stays out of `result_hash`.
"""

import copy
import difflib
import hashlib
import json
import tomllib
import types
from collections.abc import Iterator, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distributed_mi.core.errors import ConfigError
from distributed_mi.core.registry import choices, resolve

M = TypeVar("M", bound=BaseModel)


class ConfigModel(BaseModel):
    """Base of every configuration table: frozen, unknown keys refused, docstrings kept as documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def result_fields(self) -> dict[str, Any]:
        """The fields that change the result, as JSON-ready values; `runtime` fields are left out at any depth."""
        out: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("runtime"):
                continue
            value = getattr(self, name)
            out[name] = value.result_fields() if isinstance(value, ConfigModel) else _jsonable(value)
        return out


class Component(ConfigModel):
    """A choice by name with the fields of what was chosen beside it, such as `[train.model] name = "remi"`.

    The other keys of the table are checked against the `Config` of the chosen class when `settings` is called, so
    that reading a configuration file does not import torch.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    kind: ClassVar[str]
    """Registry kind of the choice."""

    name: str
    """File name of the choice, or `package.module:Class` for one of your own."""

    def resolve(self) -> Any:
        """The class behind `name`."""
        return resolve(self.kind, self.name)

    def settings(self, where: str = "", source: str = "") -> Any:
        """The chosen class's `Config`, filled from this table and checked.

        Args:
            where: dotted place of the table in the file, for error messages.
            source: path of the file, printed with the line of a wrong field.

        Raises:
            ConfigError: an unknown key or a bad value, here or in a component below; the message names the field.
        """
        owner = self.resolve()
        found = validate(
            owner.Config,
            dict(self.model_extra or {}),
            where=where,
            owner=f"{owner.__name__}.Config",
            source=source,
        )
        check_components(found, where, source)
        return found

    def result_fields(self) -> dict[str, Any]:
        """Name and every field of the chosen class with its default filled in."""
        return {"name": self.name, **self.settings().result_fields()}


def check_components(table: BaseModel, where: str = "", source: str = "") -> None:
    """Check the fields of every named choice in a table, at any depth, against the class that it names.

    Args:
        table: a checked table; reading it left the fields of its components as they stood in the file.
        where: dotted place of the table in the file.
        source: path of the file.

    Raises:
        ConfigError: a name that is not known, or a wrong field of what is named; see `Component.settings`.
    """
    for name in type(table).model_fields:
        value = getattr(table, name)
        place = f"{where}.{name}" if where else name
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Component):
                part.settings(place, source)
            elif isinstance(part, BaseModel):
                check_components(part, place, source)


def runtime(default: Any = PydanticUndefined, **kwargs: Any) -> Any:
    """A field that does not change the result, so that changing it redoes nothing."""
    return Field(default, json_schema_extra={"runtime": True}, **kwargs)


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_jsonable(v) for v in value), key=repr)  # a set's own order changes between processes
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, date | time):
        return value.isoformat()
    return value


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON-ready value in canonical form: sorted keys, no white space."""
    text = json.dumps(_jsonable(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML; names the file and the line.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"configuration file not found: {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"configuration file cannot be read: {error}") from error


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `a.b=c` into the path and a value; the value is read as TOML, or else is a string.

    Raises:
        ConfigError: there is no `=` or an empty key.
    """
    key, sign, raw = text.partition("=")
    parts = [p.strip() for p in key.split(".")]
    if not sign or not all(parts):
        raise ConfigError(f'override "{text}" must look like table.field=value')
    try:
        parsed = tomllib.loads(f"v = {raw}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return parts, parsed["v"] if list(parsed) == ["v"] else raw


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `tree` with each `a.b=c` set, later ones winning.

    Raises:
        ConfigError: an override walks through a value that is not a table.
    """
    tree = copy.deepcopy(tree)
    for text in overrides:
        parts, value = parse_override(text)
        node = tree
        for depth, part in enumerate(parts[:-1]):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f'override "{text}": {".".join(parts[: depth + 1])} is a value, not a table'
                )
        node[parts[-1]] = value
    return tree


def validate(
    model: type[M], tree: dict[str, Any], *, where: str = "", owner: str = "", source: str = ""
) -> M:
    """Check a tree against a model, turning pydantic's report into one readable message.

    Args:
        model: the configuration model.
        tree: values as read from TOML.
        where: dotted prefix of the tree in the file.
        owner: name printed as the owner of an unknown field; by default the model's name.
        source: path of the file, printed with the line where the field stands.

    Raises:
        ConfigError: every wrong field on a line of its own, with the nearest known name for an unknown one.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, item, where, owner or model.__name__, source) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def _explain(model: type[BaseModel], item: Any, where: str, owner: str, source: str) -> str:
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(([where] if where else []) + location)
    place = place_in(source, dotted)
    if item["type"] == "extra_forbidden":
        parent = _model_at(model, location[:-1])
        known = list(parent.model_fields) if parent else []
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known)}."
        return f"{dotted} is not a field of {parent.__name__ if parent and len(location) > 1 else owner}{place}.{hint}"
    return f"{dotted}: {item['msg']}, got {item.get('input')!r}{place}"


def place_in(source: str, dotted: str) -> str:
    """` (file, line N)` of a field for the end of a message, or nothing when there is no file."""
    return f" ({source}{_line_of(source, dotted.split('.'))})" if source else ""


def _line_of(source: str, location: list[str]) -> str:
    """`, line N` of the key or table at `location` in a TOML file, or nothing when it came from an override."""
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    table: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if text.startswith("[") and text.endswith("]"):
            table = text.strip("[]").split(".")
            found = table[: len(location)] == location
        else:
            key, sign, _ = text.partition("=")
            found = bool(sign) and [*table, *key.strip().split(".")] == location
        if found:
            return f", line {number}"
    return ""


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    for part in location:
        field = model.model_fields.get(part)
        inner = _inner_model(field.annotation) if field else None
        if inner is None:
            return None
        model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in get_args(annotation):
        found = _inner_model(arg)
        if found is not None:
            return found
    return None


class FieldDoc(BaseModel):
    """One documented field, as `--help` prints it."""

    name: str
    type: str
    default: str
    doc: str
    kind: str = ""
    """Registry kind when the field is the name of a choice."""


def describe(model: type[BaseModel], prefix: str = "") -> Iterator[FieldDoc]:
    """Every field of a configuration model and of the tables below it, in order, with type, default and docstring."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        inner = _inner_model(field.annotation)
        if inner is not None and issubclass(inner, Component):
            known = ", ".join(choices(inner.kind))
            yield FieldDoc(
                name=f"{dotted}.name",
                type=f"one of {known}",
                default=_default_text(field),
                doc=" ".join((field.description or "").split()),
                kind=inner.kind,
            )
        elif inner is not None:
            yield from describe(inner, f"{dotted}.")
        else:
            yield FieldDoc(
                name=dotted,
                type=_type_text(field.annotation),
                default=_default_text(field),
                doc=" ".join((field.description or "").split()),
            )


def describe_component(kind: str, name: str, prefix: str = "") -> Iterator[FieldDoc]:
    """The fields of one registered choice, for example of `train.model` when its name is `remi`."""
    yield from describe(resolve(kind, name).Config, prefix)


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Component):
        return value.name
    return json.dumps(_jsonable(value))


def _type_text(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(repr(v) for v in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(a) for a in get_args(annotation))
    if annotation is type(None):
        return "none"
    if origin is not None:
        if hasattr(annotation, "__metadata__"):
            return _type_text(get_args(annotation)[0])
        inner = ", ".join(_type_text(a) for a in get_args(annotation) if a is not Ellipsis)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


class ExperimentFile:
    """A TOML file plus overrides, checked as a whole."""

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.tree = apply_overrides(load_toml(self.path), overrides)

    def parse(self, model: type[M]) -> M:
        """The checked configuration; see `validate` for the errors."""
        return validate(model, self.tree, source=str(self.path))

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Same as the constructor; reads better at call sites."""
        return cls(path, overrides)
