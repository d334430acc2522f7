"""An experiment file is checked as a whole before anything runs: nested choices, metric, encoder."""

from pathlib import Path

import pytest

from distributed_mi.cli import main
from distributed_mi.core.errors import ConfigError
from distributed_mi.experiment import load


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.model.backbone.rr_wieght=2",
            r"train\.model\.backbone\.rr_wieght is not a field of REMI\.Config \(.*\)\. Did you mean rr_weight\?",
        ),
        ("train.model.backbone.rr_weight=much", r"train\.model\.backbone\.rr_weight: .*got 'much'"),
        ("train.model.backbone.name=rmi", r'unknown model "rmi"\. Did you mean "remi"\?'),
        (
            "train.validation_metric=recal@50",
            r'train\.validation_metric: unknown metric "recal"\. Did you mean "recall"\? Known: .*recall.* \(.*\)',
        ),
        ("train.validation_metric=recall", r"train\.validation_metric: .*must look like name@k"),
        ("embed.model=./no-such-encoder", r"embed\.model: there is no directory \./no-such-encoder \(.*\)"),
        ("embed.model=models/mini/v1", r"embed\.model: there is no directory models/mini/v1"),
        ("embed.model=~/no-such-encoder", r"embed\.model: there is no directory ~/no-such-encoder"),
    ],
)
def test_a_wrong_value_below_the_top_is_refused_before_prepare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load("quickstart", [override])
    workspace = tmp_path / "ws"
    assert main(["run", "quickstart", f"workspace={workspace}", override]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not workspace.exists()


def test_the_line_of_a_nested_field_and_of_a_checked_value_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    nested = "[data.reader]\nname = 'synthetic'\n[train.model]\nname = 'eimf'\n[train.model.backbone]\nihn_bta = 1\n"
    path.write_text(nested)
    with pytest.raises(ConfigError, match=r"ihn_bta is not a field .*mine\.toml, line 6\)"):
        load(path)
    path.write_text("[train]\nvalidation_metric = 'recall@0'\n")
    with pytest.raises(ConfigError, match=r"mine\.toml, line 2\)"):
        load(path)


@pytest.mark.parametrize("model", ["owner/encoder", "encoder-of-mine", "here"])
def test_a_hub_id_or_a_directory_that_is_there_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert load("quickstart", [f"embed.model={model}"]).embed.model == model


def test_baselines_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[[baselines]]\nname = 'eimf'\nbackbone = {name = 'remi', rr_wieght = 1}\n")
    with pytest.raises(ConfigError, match=r"baselines\.backbone\.rr_wieght .*Did you mean rr_weight"):
        load(path)


def with_baselines(path: Path, *names: str, run: str = "mine") -> Path:
    """An experiment that trains REMI as `run` beside baselines of these names."""
    tables = "".join(f'[[baselines]]\nname = "{name}"\n' for name in names)
    path.write_text(f'[train]\nrun = "{run}"\n[train.model]\nname = "remi"\n{tables}')
    return path


def test_runs_are_named_after_their_models_and_the_own_one_is_last(tmp_path: Path) -> None:
    path = with_baselines(tmp_path / "mine.toml", "distributed_mi.models.remi:REMI", "most_popular", "remi")
    runs = load(path).run_configs()
    assert [c.run_name for c in runs] == ["REMI", "most_popular", "remi", "mine"]
    assert [c.model.name.rsplit(":")[-1] for c in runs] == ["REMI", "most_popular", "remi", "remi"]


@pytest.mark.parametrize(
    ("names", "run"), [(("remi", "most_popular", "remi"), "mine"), (("most_popular", "remi"), "remi")]
)
def test_two_runs_of_one_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...], run: str
) -> None:
    path = with_baselines(tmp_path / "mine.toml", *names, run=run)
    with pytest.raises(
        ConfigError, match=r'baselines: two runs would be named "remi".*train\.run.*mine\.toml'
    ):
        load(path)
    assert main(["run", str(path), f"workspace={tmp_path / 'ws'}"]) == 2
    assert "remi" in capsys.readouterr().err
    assert not (tmp_path / "ws").exists()
