"""Configuration: TOML, dotted overrides, readable errors, what is hashed, what `--help` gets."""

import datetime as dt
import random
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distributed_mi.core.config import (
    Component,
    ConfigModel,
    ExperimentFile,
    apply_overrides,
    content_hash,
    describe,
    describe_component,
    load_toml,
    parse_override,
    runtime,
    validate,
)
from distributed_mi.core.errors import ConfigError, UnknownNameError


class Choice(Component):
    """A component of kind `model`."""

    kind: ClassVar[str] = "model"


class Table(ConfigModel):
    """One table of the file."""

    learning_rate: float = 1e-3
    """Step size of Adam."""
    max_steps: int | None = None
    """Steps; None: no
    limit."""
    mode: Literal["sum", "mean"] = "sum"
    """How terms are joined."""
    path: str = ""
    """Where something lies."""
    num_workers: int = runtime(2)
    """Processes."""
    model: Choice = Choice(name="plain")
    """The model."""


class File(ConfigModel):
    """The whole file."""

    workspace: str = runtime("artifacts/x")
    """Directory."""
    train: Table = Table()
    """Training."""


class _Outside:
    class Config(ConfigModel):
        num_interests: int = 4
        """K."""
        threads: int = runtime(1)
        """Threads."""


OUTSIDE = f"{__name__}:_Outside"


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "parts", "value"),
    [
        ("a=1", ["a"], 1),
        ("a.b=1e-3", ["a", "b"], 1e-3),
        ("a.b=true", ["a", "b"], True),
        ("a.b=[1, 2]", ["a", "b"], [1, 2]),
        ('a.b="1"', ["a", "b"], "1"),
        ("a.b=remi", ["a", "b"], "remi"),
        ("a.b=", ["a", "b"], ""),
        ("a.b=/data/raw/x=1/part-0.parquet", ["a", "b"], "/data/raw/x=1/part-0.parquet"),
        ("a.b=s3://bucket/key?versionId=3", ["a", "b"], "s3://bucket/key?versionId=3"),
        ("a.b=C:\\logs", ["a", "b"], "C:\\logs"),
        ("a.b=1\nc = 2", ["a", "b"], "1\nc = 2"),
        ("a.b=2014-07-01", ["a", "b"], dt.date(2014, 7, 1)),
    ],
)
def test_override_value_is_toml_or_else_the_string(text: str, parts: list[str], value: Any) -> None:
    assert parse_override(text) == (parts, value)


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ".a=1", ""])
def test_override_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"table\.field=value"):
        parse_override(text)


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r")))
def test_any_quoted_text_survives_an_override(text: str) -> None:
    quoted = "".join(f"\\U{ord(c):08x}" for c in text)
    assert apply_overrides({}, [f'a.b="{quoted}"']) == {"a": {"b": text}}


def test_overrides_apply_in_order_on_a_copy_and_open_new_tables() -> None:
    tree = {"train": {"seed": 0, "since": dt.date(2014, 1, 1)}}
    changed = apply_overrides(tree, ["train.seed=1", "train.model.name=remi", "train.seed=2"])
    assert changed == {"train": {"seed": 2, "since": dt.date(2014, 1, 1), "model": {"name": "remi"}}}
    assert tree == {"train": {"seed": 0, "since": dt.date(2014, 1, 1)}}


def test_override_through_a_value_names_the_value() -> None:
    with pytest.raises(ConfigError, match=r"train\.seed is a value, not a table"):
        apply_overrides({"train": {"seed": 0}}, ["train.seed.x=1"])


def test_unknown_key_gives_the_nearest_name_the_file_and_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "workspace = 'w'\n\n[train]  # comment\n# learning_rte = 3\nlearning_rte = 0.1\n")
    with pytest.raises(ConfigError) as caught:
        ExperimentFile.read(path).parse(File)
    message = str(caught.value)
    assert "train.learning_rte is not a field of Table" in message
    assert f"{path}, line 5" in message
    assert "Did you mean learning_rate?" in message


def test_unknown_table_is_found_at_its_header(tmp_path: Path) -> None:
    path = write(tmp_path, "workspace = 'w'\n[trian]\nmode = 'sum'\n")
    with pytest.raises(
        ConfigError, match=r"trian is not a field of File \(.*, line 2\)\. Did you mean train\?"
    ):
        ExperimentFile(path).parse(File)


def test_key_like_no_other_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Known: workspace, train\."):
        ExperimentFile(write(tmp_path, "zzz = 1")).parse(File)


def test_unknown_key_from_an_override_has_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, "[train]\nmode = 'sum'\n")
    with pytest.raises(
        ConfigError, match=r"train\.mod is not a field of Table \([^,]*\)\. Did you mean mode"
    ):
        ExperimentFile(path, ["train.mod=mean"]).parse(File)


def test_every_wrong_value_is_reported_with_what_was_given(tmp_path: Path) -> None:
    path = write(tmp_path, "[train]\nmode = 'max'\nlearning_rate = 'fast'\n")
    with pytest.raises(ConfigError) as caught:
        ExperimentFile(path).parse(File)
    first, second = sorted(str(caught.value).splitlines())
    assert "train.learning_rate" in first
    assert "got 'fast'" in first
    assert "line 3" in first
    assert "train.mode" in second
    assert "got 'max'" in second


def test_missing_broken_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not found.*nowhere\.toml"):
        load_toml(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"experiment\.toml is not valid TOML.*line 1"):
        load_toml(write(tmp_path, "a = = 1"))
    (tmp_path / "latin.toml").write_bytes(b'a = "\xff"')
    with pytest.raises(ConfigError, match=r"latin\.toml"):
        load_toml(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_toml(tmp_path)


def test_tables_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Table().mode = "mean"  # type: ignore[misc]


def test_component_is_read_without_resolving_and_checked_when_asked() -> None:
    table = validate(Table, {"model": {"name": "no_such_model", "num_interest": 3}})
    assert table.model.name == "no_such_model"
    with pytest.raises(UnknownNameError, match="no_such_model"):
        table.model.settings()


def test_component_settings_come_from_the_chosen_class() -> None:
    choice = Choice.model_validate({"name": OUTSIDE, "num_interests": 8})
    assert choice.settings().num_interests == 8
    assert choice.result_fields() == {"name": OUTSIDE, "num_interests": 8}


def test_wrong_component_key_names_place_owner_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, f"[train.model]\nname = '{OUTSIDE}'\nnum_interest = 3\n")
    parsed = ExperimentFile(path).parse(File)
    with pytest.raises(ConfigError) as caught:
        parsed.train.model.settings("train.model", str(path))
    message = str(caught.value)
    assert "train.model.num_interest is not a field of _Outside.Config" in message
    assert "line 3" in message
    assert "Did you mean num_interests?" in message


def test_runtime_fields_stay_out_of_the_hash_at_any_depth() -> None:
    def fields(**train: Any) -> dict[str, Any]:
        return validate(File, {"train": {"model": {"name": OUTSIDE}, **train}}).result_fields()

    base = fields()
    assert "workspace" not in base
    assert "num_workers" not in base["train"]
    assert base["train"]["model"] == {"name": OUTSIDE, "num_interests": 4}
    assert fields(num_workers=7) == base
    assert fields(model={"name": OUTSIDE, "threads": 9}) == base
    assert fields(learning_rate=0.5) != base
    assert fields(model={"name": OUTSIDE, "num_interests": 5}) != base


def test_a_default_written_out_hashes_like_the_default() -> None:
    written = Choice.model_validate({"name": OUTSIDE, "num_interests": 4})
    assert content_hash(written.result_fields()) == content_hash(Choice(name=OUTSIDE).result_fields())


def test_content_hash_ignores_key_order_and_knows_every_toml_value() -> None:
    items = [
        ("a", 1),
        ("b", dt.datetime(2014, 7, 1, 12)),
        ("c", [0.5, "x"]),
        ("d", Path("p")),
        ("e", {"z", "y"}),
    ]
    expected = content_hash(dict(items))
    random.Random(0).shuffle(items)
    assert content_hash(dict(items)) == expected
    # printf '{"a":1}' | sha256sum
    assert content_hash({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_nan_has_no_hash() -> None:
    with pytest.raises(ValueError, match="JSON"):
        content_hash({"a": float("nan")})


def test_describe_lists_every_field_with_type_default_and_doc() -> None:
    rows = {row.name: row for row in describe(File)}
    assert list(rows) == [
        "workspace",
        "train.learning_rate",
        "train.max_steps",
        "train.mode",
        "train.path",
        "train.num_workers",
        "train.model.name",
    ]
    assert rows["train.learning_rate"].default == "0.001"
    assert rows["train.learning_rate"].doc == "Step size of Adam."
    assert rows["train.max_steps"].doc == "Steps; None: no limit."
    assert rows["train.max_steps"].type == "int | none"
    assert rows["train.mode"].type == "'sum' | 'mean'"
    assert rows["train.model.name"].default == "plain"


def test_describe_component_lists_the_chosen_class() -> None:
    rows = list(describe_component("model", OUTSIDE, "train.model."))
    assert [(r.name, r.default, r.doc) for r in rows] == [
        ("train.model.num_interests", "4", "K."),
        ("train.model.threads", "1", "Threads."),
    ]


def test_required_field_is_described_as_such() -> None:
    class Needed(ConfigModel):
        user: str
        """Column of the user."""

    assert [row.default for row in describe(Needed)] == ["required"]
