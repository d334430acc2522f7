"""The `[data]` table: defaults, what is checked, what stays out of the result's identity."""

import datetime

import pytest
from pydantic import ValidationError

from distributed_mi.core.config import content_hash
from distributed_mi.core.errors import ConfigError
from distributed_mi.data.config import DataConfig, FilterConfig, SplitConfig


def test_defaults_are_the_comirec_protocol():
    config = DataConfig()
    assert (config.k_core.method, config.k_core.min_user_events, config.k_core.min_item_events) == (
        "one-pass",
        5,
        5,
    )
    assert (config.split.name, config.split.train_fraction, config.split.seed) == ("by-user", 0.8, 1230)


@pytest.mark.parametrize(
    "change",
    [{"interactions": "elsewhere"}, {"items": "x"}, {"num_partitions": 9}, {"max_rejected_fraction": 0.5}],
)
def test_paths_and_sizes_do_not_change_the_result(change):
    assert DataConfig(**change).result_fields() == DataConfig().result_fields()


@pytest.mark.parametrize(
    "change",
    [
        {"filters": {"min_rating": 4}},
        {"filters": {"start": "2014-01-01"}},
        {"k_core": {"method": "none"}},
        {"split": {"seed": 1}},
        {"reader": {"name": "synthetic", "seed": 1}},
        {"reader": {"name": "table", "user": "u"}},
    ],
)
def test_everything_else_does(change):
    changed = DataConfig.model_validate(change).result_fields()
    assert content_hash(changed) != content_hash(DataConfig().result_fields())


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("1970-01-02", 86_400_000),
        ("1970-01-01T01:00:00+01:00", 0),
        (datetime.date(1970, 1, 2), 86_400_000),
        (datetime.datetime(1970, 1, 1, 0, 0, 1), 1000),
    ],
)
def test_times_may_be_text_or_toml_dates(text, milliseconds):
    assert FilterConfig(start=text).start_ms == milliseconds


@pytest.mark.parametrize("text", ["yesterday", "2014-13-01"])
def test_a_wrong_time_is_refused(text):
    with pytest.raises(ValidationError, match="start"):
        FilterConfig(start=text)


def test_a_split_leaves_something_to_test():
    with pytest.raises(ValidationError, match="nothing is left to test on"):
        SplitConfig(train_fraction=0.9, validation_fraction=0.1)


def test_a_misspelt_reader_field_is_refused_with_the_nearest_name():
    config = DataConfig.model_validate({"reader": {"name": "table", "timestmp": "t"}})
    with pytest.raises(ConfigError, match="Did you mean timestamp"):
        config.reader.settings("data.reader")


@pytest.mark.parametrize(
    "bad",
    [
        {"topics_per_user": [4, 2]},
        {"topics_per_user": [2, 50]},
        {"num_items": 10},
        {"events_per_user": [9, 8]},
    ],
)
def test_an_impossible_generated_log_is_refused(bad):
    config = DataConfig.model_validate({"reader": {"name": "synthetic", **bad}})
    with pytest.raises(ConfigError, match=r"data\.reader"):
        config.reader.settings("data.reader")
