"""The Arrow schema of every table that crosses a stage, and its check.

Ids: `item_index` counts from 1, most popular item first; 0 is padding and never stands in a table. `user_index` counts
from 0 in split order. Times are integer milliseconds UTC. Vectors are float32 and not normalised.
"""

from collections.abc import Sequence

import pyarrow as pa

from distributed_mi.core.errors import SchemaMismatchError

FORMAT_VERSION = 2
"""Version of the workspace layout and of all schemas; raised when a table changes meaning or columns."""

_INDICES = pa.list_(pa.int64())
_VECTOR = pa.list_(pa.float32())

TABLES: dict[str, pa.Schema] = {
    "events": pa.schema(
        [
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("timestamp", pa.int64()),
            ("source_order", pa.int64()),
        ]
    ),
    "rejected": pa.schema(
        [("source", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("content", pa.string())]
    ),
    "catalogue": pa.schema(
        [
            ("item_index", pa.int64()),
            ("item_id", pa.string()),
            ("title", pa.string()),
            ("brand", pa.string()),
            ("categories", pa.list_(pa.string())),
            ("num_events", pa.int64()),
            ("num_train_events", pa.int64()),
        ]
    ),
    "sequences": pa.schema(
        [
            ("user_index", pa.int64()),
            ("user_id", pa.string()),
            ("item_indices", _INDICES),
            ("timestamps", _INDICES),
            ("num_history", pa.int64()),
        ]
    ),
    "item_vectors": pa.schema([("item_index", pa.int64()), ("vector", _VECTOR), ("has_text", pa.bool_())]),
    "user_vectors": pa.schema([("user_index", pa.int64()), ("vector", _VECTOR)]),
    "exemplars": pa.schema(
        [
            ("cluster", pa.int64()),
            ("user_index", pa.int64()),
            ("user_id", pa.string()),
            ("num_users", pa.int64()),
        ]
    ),
    "assignment": pa.schema(
        [
            ("user_index", pa.int64()),
            ("cluster", pa.int64()),
            ("exemplar_user_index", pa.int64()),
            ("similarity", pa.float32()),
        ]
    ),
    "messages": pa.schema(
        [
            ("user_id", pa.string()),
            ("exemplar_user_id", pa.string()),
            ("column_sum", pa.float64()),
            ("background", pa.float64()),
            ("self_responsibility", pa.float64()),
            ("self_availability", pa.float64()),
            ("reach_mean", pa.float64()),
            ("weight", pa.float64()),
        ]
    ),
    "answers": pa.schema(
        [
            ("user_index", pa.int64()),
            ("prompt_hash", pa.string()),
            ("prompt", pa.string()),
            ("answer", pa.string()),
            ("backend", pa.string()),
            ("model", pa.string()),
            ("step", pa.string()),
            ("num_prompt_tokens", pa.int64()),
            ("num_answer_tokens", pa.int64()),
            ("seconds", pa.float64()),
        ]
    ),
    "cached_answers": pa.schema(
        [
            ("key", pa.string()),
            ("text", pa.string()),
            ("finish_reason", pa.string()),
            ("num_prompt_tokens", pa.int64()),
            ("num_answer_tokens", pa.int64()),
            ("backend", pa.string()),
            ("model", pa.string()),
            ("created", pa.int64()),
            ("digest", pa.string()),
        ]
    ),
    "interests": pa.schema(
        [
            ("user_index", pa.int64()),
            ("interest_index", pa.int64()),
            ("text", pa.string()),
            ("item_indices", _INDICES),
        ]
    ),
    "interest_vectors": pa.schema(
        [("user_index", pa.int64()), ("interest_index", pa.int64()), ("vector", _VECTOR)]
    ),
    "per_user": pa.schema(
        [
            ("user_index", pa.int64()),
            ("user_id", pa.string()),
            ("num_history", pa.int64()),
            ("num_labels", pa.int64()),
            ("ranked_item_indices", _INDICES),
        ]
    ),
}
"""Table name -> schema. `sequences`: `item_indices[:num_history]` is what a model may read, the rest are labels; in
the training split there are no labels and `num_history` is the length. `item_vectors`: without `has_text` the vector
is that of the item's id, which says nothing about it. `per_user` may carry one more column per
metric."""

_OPEN_TABLES = frozenset({"per_user"})


def check(table_or_schema: pa.Table | pa.Schema, name: str, *, columns: Sequence[str] | None = None) -> None:
    """Compare a table with the declared schema.

    Args:
        table_or_schema: what was read or is about to be written.
        name: key of `TABLES`.
        columns: only these columns are expected (a projection); by default all.

    Raises:
        SchemaMismatchError: a column is missing, has another type, or is not declared; names table and column.
    """
    schema = table_or_schema.schema if isinstance(table_or_schema, pa.Table) else table_or_schema
    declared = TABLES[name]
    expected = list(declared.names) if columns is None else list(columns)
    for column in expected:
        position = schema.get_field_index(column)
        if position < 0:
            raise SchemaMismatchError(
                f"table {name}: column {column} is missing; has {', '.join(schema.names)}"
            )
        found, wanted = schema.field(position).type, declared.field(column).type
        if not _same_type(found, wanted):
            raise SchemaMismatchError(f"table {name}: column {column} is {found}, must be {wanted}")
    extra = [c for c in schema.names if c not in expected]
    if extra and name not in _OPEN_TABLES:
        raise SchemaMismatchError(f"table {name}: columns {', '.join(extra)} are not declared")


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(wanted):
        return (pa.types.is_list(found) or pa.types.is_large_list(found)) and _same_type(
            found.value_type, wanted.value_type
        )
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    return found.equals(wanted)


def conform(table: pa.Table, name: str) -> pa.Table:
    """Cast a table to the declared columns, order and types (large strings and lists become plain ones).

    Raises:
        SchemaMismatchError: a declared column is missing or cannot be cast.
    """
    declared = TABLES[name]
    missing = [c for c in declared.names if c not in table.column_names]
    if missing:
        raise SchemaMismatchError(f"table {name}: columns {', '.join(missing)} are missing")
    extra = [c for c in table.column_names if c not in declared.names] if name in _OPEN_TABLES else []
    schema = pa.schema([*declared, *(table.schema.field(c) for c in extra)])
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SchemaMismatchError(f"table {name}: {error}") from error


def empty(name: str) -> pa.Table:
    """A table of the declared schema without rows."""
    return TABLES[name].empty_table()
