"""Declared tables: what `check` refuses and what `conform` repairs."""

import pyarrow as pa
import pytest

from distributed_mi.core import schema
from distributed_mi.core.errors import SchemaMismatchError

EVENTS = pa.table(
    {"user_id": ["u"], "item_id": ["i"], "timestamp": [1], "source_order": [0]},
    schema=schema.TABLES["events"],
)


@pytest.mark.parametrize("name", sorted(schema.TABLES))
def test_empty_table_conforms_to_its_own_schema(name: str) -> None:
    table = schema.empty(name)
    schema.check(table, name)
    assert schema.conform(table, name).equals(table)


def test_missing_column_is_named_with_what_is_there() -> None:
    with pytest.raises(SchemaMismatchError, match="column item_id is missing; has user_id"):
        schema.check(EVENTS.drop_columns(["item_id"]), "events")
    with pytest.raises(SchemaMismatchError, match="columns item_id are missing"):
        schema.conform(EVENTS.drop_columns(["item_id"]), "events")


def test_other_type_is_named() -> None:
    other = EVENTS.set_column(2, "timestamp", pa.array([1.5]))
    with pytest.raises(SchemaMismatchError, match="timestamp is double, must be int64"):
        schema.check(other, "events")


def test_undeclared_column_is_refused_by_check_and_left_out_by_conform() -> None:
    wider = EVENTS.append_column("extra", pa.array([1]))
    with pytest.raises(SchemaMismatchError, match="columns extra are not declared"):
        schema.check(wider, "events")
    assert schema.conform(wider, "events").equals(EVENTS)


def test_open_table_keeps_metric_columns() -> None:
    wider = schema.empty("per_user").append_column("recall@20", pa.array([], pa.float64()))
    schema.check(wider, "per_user")
    assert schema.conform(wider, "per_user").column_names[-1] == "recall@20"


def test_conform_turns_large_strings_and_lists_into_plain_ones_in_declared_order() -> None:
    declared = schema.TABLES["catalogue"]
    table = pa.table(
        {
            "categories": pa.array([["a", "b"]], pa.large_list(pa.large_string())),
            **{n: pa.array([1], pa.int32()) for n in ("item_index", "num_events", "num_train_events")},
            **{n: pa.array(["x"], pa.large_string()) for n in ("item_id", "title", "brand")},
        }
    )
    assert schema.conform(table, "catalogue").schema.equals(declared)


def test_check_accepts_large_types_but_not_other_element_types() -> None:
    large = pa.schema([("user_index", pa.int64()), ("vector", pa.large_list(pa.float32()))])
    schema.check(large, "user_vectors")
    wide = pa.schema([("user_index", pa.int64()), ("vector", pa.list_(pa.float64()))])
    with pytest.raises(SchemaMismatchError, match="vector"):
        schema.check(wide, "user_vectors")


def test_value_that_cannot_be_cast_is_refused() -> None:
    other = EVENTS.set_column(2, "timestamp", pa.array([1.5]))
    with pytest.raises(SchemaMismatchError, match="table events"):
        schema.conform(other, "events")


def test_projection_expects_only_its_columns() -> None:
    schema.check(EVENTS.select(["user_id"]), "events", columns=["user_id"])
    with pytest.raises(SchemaMismatchError, match="timestamp"):
        schema.check(EVENTS.select(["user_id"]), "events", columns=["user_id", "timestamp"])
