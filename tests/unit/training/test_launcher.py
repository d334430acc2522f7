"""The train stage on one worker: what it leaves, when it runs again, what it refuses. No Ray."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.config import validate
from distributed_mi.core.errors import CheckpointError, ConfigError, InputError, WorkspaceError
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.training import launcher
from distributed_mi.training.checkpoint import load_model
from distributed_mi.training.config import ScalingConfig, TrainConfig
from tests.unit.training.workspaces import HitsOfLastItem, add_semantics, make_prepared, tiny_config

ALONE = ScalingConfig(num_workers=1, threads_per_worker=1)


def no_ray() -> None:
    raise AssertionError("one worker must not need Ray")


def train(workspace: Workspace, config: TrainConfig, **values: Any) -> Any:
    return launcher.run(
        config,
        values.get("scaling", ALONE),
        workspace,
        validate=values.get("validate") or HitsOfLastItem(workspace, config.max_history),
        start_ray=no_ray,
    )


def test_a_run_learns_and_leaves_model_metrics_and_configuration(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path)
    config = tiny_config(max_steps=100)
    manifest = train(workspace, config)
    assert manifest.rows == {"items": 60}
    stats = manifest.stats
    assert stats["steps"] == 100
    assert stats["best_value"] > 0.35  # guessing finds one of 60 items among 10 in a sixth of the cases
    assert stats["loss"]["last"] < stats["loss"]["first"]
    assert stats["users_per_s"] > 0
    root = Path(workspace.stage("train/remi").path())
    assert sorted(p.name for p in root.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl", "model"]
    assert json.loads((root / "config.json").read_text())["model"]["num_interests"] == 2

    model = load_model(workspace.fs, str(root / "model"))
    with torch.no_grad():
        again = HitsOfLastItem(workspace, config.max_history)(model, WorkerGroup.alone())
    assert again["recall@50"] == stats["best_value"]


def test_an_item_outside_the_catalogue_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path)
    shard = Path(workspace.stage("prepare").path("sequences/train/part-0.parquet"))
    table = pq.read_table(shard)
    items = table.column("item_indices").to_pylist()
    items[7][2] = 61
    column = pa.array(items, table.schema.field("item_indices").type)
    pq.write_table(
        table.set_column(table.schema.get_field_index("item_indices"), "item_indices", column), shard
    )
    with pytest.raises(InputError, match=r'user "u7" .* item 61 as event 3 of .* items 1 to 60'):
        train(workspace, tiny_config())


def test_the_same_configuration_is_skipped_and_another_is_trained(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path)
    config = tiny_config(max_steps=4, validate_every=2)
    first = train(workspace, config)
    assert train(workspace, config, validate=no_ray).created == first.created
    runtime = config.model_copy(update={"log_every": 3, "keep_checkpoints": 1})
    assert train(workspace, runtime, validate=no_ray).generation == first.generation
    other = train(workspace, config.model_copy(update={"seed": 1}))
    assert other.generation != first.generation
    assert other.stats["content"] != first.stats["content"]


def test_two_runs_with_one_seed_are_equal(tmp_path: Path) -> None:
    config = tiny_config(max_steps=10)
    one = train(make_prepared(tmp_path / "a"), config)
    two = train(make_prepared(tmp_path / "b"), config)
    assert one.stats["content"] == two.stats["content"]


def test_a_killed_run_continues_in_its_generation(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path / "a")
    config = tiny_config(max_steps=40)
    validate = HitsOfLastItem(workspace, config.max_history)
    calls = []

    def killing(model: Any, group: WorkerGroup) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(model, group)

    with pytest.raises(KeyboardInterrupt):
        train(workspace, config, validate=killing)
    assert workspace.stage("train/remi").manifest() is None
    manifest = train(workspace, config)
    undisturbed = train(make_prepared(tmp_path / "b"), config)
    assert manifest.stats["content"] == undisturbed.stats["content"]
    assert manifest.stats["validation"] == undisturbed.stats["validation"]


def remove_what_the_message_names(error: CheckpointError) -> Path:
    """Do what a user does who follows the message."""
    found = re.search(r"Remove (\S+) and run `distributed-mi train CONFIG` again", str(error))
    assert found is not None, error
    shutil.rmtree(found[1])
    return Path(found[1])


@pytest.mark.parametrize(
    "file", ["dense.safetensors", "table-00000-of-00001-0000.safetensors", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_model_is_exported_again_without_training(tmp_path: Path, file: str, damage: str) -> None:
    workspace = make_prepared(tmp_path)
    config = tiny_config(max_steps=4, validate_every=2)
    first = train(workspace, config)
    folder = Path(workspace.stage("train/remi").path("model"))
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(b"x" + (folder / file).read_bytes())
    with pytest.raises(CheckpointError) as caught:
        load_model(workspace.fs, str(folder))
    if (folder / "manifest.json").exists():
        assert remove_what_the_message_names(caught.value) == folder
    else:
        assert "Run `distributed-mi train CONFIG` to write it" in str(caught.value)
    again = train(workspace, config, validate=no_ray)  # no validation, so no step was taken
    assert again.identity == first.identity
    load_model(workspace.fs, str(folder))


def test_a_stage_without_its_model_does_not_read_as_complete_while_it_is_exported(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path)
    config = tiny_config(max_steps=4, validate_every=2)
    train(workspace, config)
    stage = workspace.stage("train/remi")
    shutil.rmtree(stage.path("model"))
    for dense in Path(stage.path("checkpoints")).glob("*/dense.safetensors"):
        dense.write_bytes(b"damaged too")
    with pytest.raises(CheckpointError):
        train(workspace, config)
    assert stage.manifest() is None


def test_a_damaged_best_checkpoint_can_be_trained_again(tmp_path: Path) -> None:
    """The newest checkpoint is whole, but the best one, of another step, is not: following the messages ends well."""
    workspace = make_prepared(tmp_path)
    config = tiny_config(max_steps=60, validate_every=10)
    validate = HitsOfLastItem(workspace, config.max_history)
    calls = []

    def best_at_the_second(model: Any, group: WorkerGroup) -> dict[str, float]:
        calls.append(1)
        return {"recall@50": 1.0 if len(calls) % 6 == 2 else validate(model, group)["recall@50"]}

    first = train(workspace, config, validate=best_at_the_second)
    assert first.stats["best_step"] == 20
    root = Path(workspace.stage("train/remi").path())
    shutil.rmtree(root / "model")
    (root / "checkpoints/step-000000020/dense.safetensors").write_bytes(b"damaged")
    for removed in (root / "checkpoints/step-000000020", root / "checkpoints"):
        with pytest.raises(CheckpointError) as caught:
            train(workspace, config, validate=best_at_the_second)
        assert remove_what_the_message_names(caught.value) == removed
    assert train(workspace, config, validate=best_at_the_second).identity == first.identity


def test_counts_are_exported_again_when_the_model_is_gone(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path)
    config = tiny_config(model={"name": "most_popular"})
    first = train(workspace, config)
    shutil.rmtree(workspace.stage("train/most_popular").path("model"))
    assert train(workspace, config).identity == first.identity
    load_model(workspace.fs, workspace.stage("train/most_popular").path("model"))


def test_most_popular_is_counted_without_steps(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path)
    manifest = train(
        workspace, tiny_config(model={"name": "most_popular"}), scaling=ScalingConfig(num_workers=2)
    )
    assert manifest.stats["stopped"] == "counted"
    model = load_model(workspace.fs, workspace.stage("train/most_popular").path("model"))
    catalogue = workspace.stage("prepare").read("catalogue", "catalogue")
    counts = catalogue.column("num_train_events").to_pylist()
    scores, ids, _ = model.items.topk(torch.eye(1, 16), 3)
    best = sorted(range(60), key=lambda i: (-counts[i], i))[:3]
    assert ids.tolist() == [[i + 1 for i in best]]
    assert scores.tolist() == [[float(counts[i]) for i in best]]


@pytest.mark.parametrize("name", ["youtube_dnn", "comirec_sa"])
def test_other_models_train(tmp_path: Path, name: str) -> None:
    manifest = train(
        make_prepared(tmp_path), tiny_config(model={"name": name}, max_steps=6, validate_every=3)
    )
    assert manifest.stats["steps"] == 6
    assert manifest.stage == f"train/{name}"


def test_negatives_with_log_q_correction_train(tmp_path: Path) -> None:
    negatives = {"name": "popularity", "num_negatives": 24, "log_q": True}
    manifest = train(make_prepared(tmp_path), tiny_config(negatives=negatives, max_steps=30))
    assert manifest.stats["loss"]["last"] < manifest.stats["loss"]["first"]


def test_a_model_with_semantics_needs_the_stages_and_depends_on_them(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path)
    config = tiny_config(model={"name": "eimf"}, max_steps=6, validate_every=3)
    with pytest.raises(WorkspaceError, match="no complete stage embed"):
        train(workspace, config)
    add_semantics(workspace)
    manifest = train(workspace, config)
    assert sorted(manifest.inputs) == ["embed", "exemplars", "interests", "prepare"]
    model = load_model(workspace.fs, workspace.stage("train/eimf").path("model"))
    assert model.text_dim == 6


def test_gamma_zero_is_the_backbone_bit_for_bit_through_the_stage(tmp_path: Path) -> None:
    """With what users run: the default engine, validation, checkpoints, and the exported model at the end."""
    workspace = make_prepared(tmp_path)
    add_semantics(workspace)
    backbone = {"name": "remi", "num_interests": 2}
    models = {"remi": backbone, "eimf": {"name": "eimf", "gamma": 0.0, "backbone": backbone}}
    lines, dense, tables, stats = {}, {}, {}, {}
    for name, model in models.items():
        stats[name] = train(workspace, tiny_config(model=model, max_steps=12, validate_every=4)).stats
        stage = workspace.stage(f"train/{name}")
        found = [json.loads(x) for x in Path(stage.path("metrics.jsonl")).read_text().splitlines()]
        timings = {"users_per_s", "seconds", "train_seconds", "costs"}
        lines[name] = [{k: v for k, v in line.items() if k not in timings} for line in found]
        dense[name] = load_file(stage.path("model", "dense.safetensors"))
        tables[name] = Path(stage.path("model", "table-00000-of-00001-0000.safetensors")).read_bytes()
    assert stats["eimf"]["engine"] == stats["remi"]["engine"] == "PlainEngine"
    assert lines["eimf"] == lines["remi"]
    assert tables["eimf"] == tables["remi"]
    for parameter, value in dense["remi"].items():
        assert torch.equal(dense["eimf"][f"backbone.{parameter}"], value), parameter


def test_the_leakage_check_is_said_before_the_first_metric(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Progress lines show recall, and a metric without this sentence is worth nothing."""
    caplog.set_level("INFO")
    workspace = make_prepared(tmp_path)
    config = tiny_config(max_steps=4, validate_every=2)
    train(workspace, config)
    said = [i for i, r in enumerate(caplog.records) if "Leakage check passed for by-user" in r.getMessage()]
    metrics = [i for i, r in enumerate(caplog.records) if "recall@50" in r.getMessage()]
    assert len(said) == 1
    assert metrics
    assert said[0] < min(metrics)
    caplog.clear()
    train(workspace, config)
    assert "Leakage" not in caplog.text  # nothing is trained, no metric is shown
    train(workspace, tiny_config(model={"name": "most_popular"}))
    assert "Leakage check passed" in caplog.text


def test_a_leakage_check_that_is_not_recorded_is_said_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = make_prepared(tmp_path, leakage=None)
    train(workspace, tiny_config(max_steps=2))
    assert "no leakage check" in caplog.text


def test_a_softmax_over_all_item_texts_trains(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path)
    add_semantics(workspace)
    model = {"name": "eimf", "prediction_candidates": "all", "gamma": 1.0, "alignment": False}
    stats = train(workspace, tiny_config(model=model, max_steps=30, validate_every=30)).stats
    assert stats["loss"]["last"] < stats["loss"]["first"]


def test_a_step_too_small_for_its_parts_is_refused(tmp_path: Path) -> None:
    config = tiny_config(num_users_per_step=2, engine={"name": "ddp", "accumulation": 3})
    with pytest.raises(ConfigError, match="a step needs at least 3"):
        train(make_prepared(tmp_path), config)


def test_users_without_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="min_position"):
        train(make_prepared(tmp_path), tiny_config(min_position=50))


def test_a_misspelt_field_of_the_model_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean num_interests"):
        train(make_prepared(tmp_path), tiny_config(model={"name": "remi", "num_interest": 3}))


def test_prepare_must_be_complete(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no complete stage prepare"):
        launcher.run(tiny_config(), ALONE, Workspace(str(tmp_path)), validate=no_ray, start_ray=no_ray)


def test_scaling_stays_out_of_the_hash_and_the_engine_in_it() -> None:
    assert ScalingConfig(num_workers=7).result_fields() == {}
    engines = [
        TrainConfig.model_validate({"engine": {"name": n}}).result_fields() for n in ("ddp", "deepspeed")
    ]
    assert engines[0] != engines[1]


def test_a_cpu_worker_takes_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_mi.training.config.available_cores", lambda: 16)
    assert [ScalingConfig(num_workers=n).threads(n) for n in (1, 2)] == [1, 1]
    assert ScalingConfig(num_workers=1, threads_per_worker=5).threads(1) == 5
    # The CPU only feeds the GPU there, and has little else to do.
    assert ScalingConfig(gpus_per_worker=1).threads(4) == 4
    assert ScalingConfig(gpus_per_worker=1).threads(99) == 1


def test_a_range_of_workers_has_a_least_and_a_most() -> None:
    fixed, either = ScalingConfig(num_workers=3), ScalingConfig.model_validate({"num_workers": [1, 4]})
    assert (fixed.least_workers, fixed.most_workers) == (3, 3)
    assert (either.least_workers, either.most_workers) == (1, 4)
    assert either.result_fields() == {}


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "at least 1 worker"),
        (-2, "at least 1 worker"),
        ([0, 2], "at least 1 worker"),
        ([3, 2], r"\[least, most\] must ascend: \[2, 3\]"),
    ],
)
def test_a_wrong_number_of_workers_names_the_field(count: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"scaling.num_workers: .*{message}"):
        validate(ScalingConfig, {"num_workers": count}, where="scaling")


def test_one_worker_runs_here_with_its_threads() -> None:
    def work(payload: dict[str, Any], group: WorkerGroup) -> dict[str, Any]:
        return {"size": group.size, "threads": torch.get_num_threads(), **payload}

    before = torch.get_num_threads()
    scaling = ScalingConfig(num_workers=1, threads_per_worker=1)
    assert launcher.run_on_workers(work, scaling, no_ray, {"x": 1}) == {"size": 1, "threads": 1, "x": 1}
    assert torch.get_num_threads() == before
