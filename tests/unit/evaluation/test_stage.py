import json
import pickle

import numpy as np
import pytest

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import ConfigError, WorkspaceError
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.evaluation import stage
from distributed_mi.evaluation.config import EvaluateConfig
from distributed_mi.evaluation.validate import make_validator
from tests.unit.evaluation import tiny

CONFIG = EvaluateConfig(
    metrics=["recall@5", "hit_rate@5", "ndcg@5", "coverage@5", "category_diversity@5"], bootstrap_samples=50
)


def evaluate(workspace: Workspace, config: EvaluateConfig = CONFIG, run: str = "two", **kwargs):
    options = {"load": tiny.load, "run_on_workers": tiny.in_this_process, **kwargs}
    return stage.run(config, workspace, run_name=run, **options)


def report_of(workspace: Workspace, run: str = "two") -> dict:
    with workspace.fs.open_input_stream(f"{workspace.root}/evaluate/{run}/report.json") as stream:
        return json.loads(stream.read())


def test_report_has_the_promised_keys_and_agrees_with_the_users(workspace) -> None:
    manifest = evaluate(workspace)
    report = report_of(workspace)
    assert (report["model"], report["run"], report["split"]) == ("two_interests", "two", "test")
    assert (report["num_users"], report["skipped_users"]) == (25, 2)
    assert report["leakage"] == tiny.LEAKAGE
    assert report["checkpoint"]["step"] == 80
    assert report["protocol"].startswith("by-user 8:1:1")
    users = workspace.stage("evaluate/two").read("per_user", "per_user")
    assert users.num_rows == manifest.rows["per_user"] == 25
    assert all(len(x) == len(set(x)) == 5 for x in users["ranked_item_indices"].to_pylist())
    for name in ("recall@5", "hit_rate@5", "ndcg@5"):
        entry = report["metrics"][name]
        assert entry["value"] == pytest.approx(users[name].to_numpy().mean())
        assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    assert report["metrics"]["coverage@5"]["ci95"] is None


def test_recall_of_a_user_by_hand(workspace) -> None:
    evaluate(workspace)
    users = workspace.stage("evaluate/two").read("per_user", "per_user").to_pylist()
    sequences = {
        r["user_id"]: r for r in workspace.stage("prepare").read("sequences/test", "sequences").to_pylist()
    }
    for user in users:
        row = sequences[user["user_id"]]
        labels = row["item_indices"][row["num_history"] :]
        hits = len(set(labels) & set(user["ranked_item_indices"]))
        assert user["recall@5"] == pytest.approx(hits / len(labels))
        assert user["num_labels"] == len(labels)


def test_files_lie_where_people_look(workspace) -> None:
    evaluate(workspace)
    base = f"{workspace.root}/evaluate/two"
    names = {i.base_name for i in workspace.fs.get_file_info(__selector(base))}
    assert {"report.json", "report.md", "metrics.png", "training_curve.png", "manifest.json"} <= names
    with workspace.fs.open_input_stream(f"{base}/report.md") as stream:
        text = stream.read().decode()
    assert tiny.LEAKAGE["text"] in text
    assert "| recall@5 |" in text
    assert "![training curve](training_curve.png)" in text


def __selector(base: str):
    import pyarrow.fs as pafs

    return pafs.FileSelector(base)


def test_second_run_is_skipped_and_another_configuration_is_not(workspace) -> None:
    first = evaluate(workspace)

    def refuse(*args, **kwargs):
        raise AssertionError("nothing has to be computed")

    assert evaluate(workspace, run_on_workers=refuse) == first
    same = CONFIG.model_copy(update={"users_per_batch": 3})
    assert evaluate(workspace, same, run_on_workers=refuse) == first
    other = evaluate(workspace, CONFIG.model_copy(update={"exclude_seen": True}))
    assert other.generation != first.generation
    assert "history items excluded" in report_of(workspace)["protocol"]
    for user in workspace.stage("evaluate/two").read("per_user", "per_user").to_pylist():
        sequence = workspace.stage("prepare").read("sequences/test", "sequences").to_pylist()
        row = next(r for r in sequence if r["user_id"] == user["user_id"])
        assert not set(row["item_indices"][: row["num_history"]]) & set(user["ranked_item_indices"])


def test_batch_size_changes_nothing(workspace) -> None:
    evaluate(workspace, CONFIG.model_copy(update={"users_per_batch": 2}))
    small = report_of(workspace)["metrics"]
    workspace.fs.delete_dir(f"{workspace.root}/evaluate")
    evaluate(workspace, CONFIG.model_copy(update={"users_per_batch": 1000}))
    assert report_of(workspace)["metrics"] == small


def test_missing_training_names_the_command(workspace) -> None:
    with pytest.raises(WorkspaceError, match="distributed-mi train"):
        evaluate(workspace, run="other")


def test_a_model_of_other_data_is_refused(workspace) -> None:
    tiny.prepare(workspace, test_users=26)
    with pytest.raises(WorkspaceError, match="trained on other data"):
        evaluate(workspace)


def test_catalogue_without_categories_gives_no_diversity(workspace, monkeypatch) -> None:
    info = stage.load_catalogue(workspace)
    bare = type(info)(info.num_items, np.full_like(info.categories, -1))
    monkeypatch.setattr(stage, "load_catalogue", lambda workspace: bare)
    evaluate(workspace)
    assert report_of(workspace)["metrics"]["category_diversity@5"] == {"value": None, "ci95": None}


def test_worker_is_picklable() -> None:
    worker = pickle.loads(pickle.dumps(stage.EvaluateWorker(tiny.load)))
    assert worker.load is tiny.load


def test_validator_equals_the_stage_on_validation_users(workspace) -> None:
    evaluate(workspace, CONFIG.model_copy(update={"split": "validation"}))
    validate = make_validator(workspace.url, tiny.MAX_HISTORY, ["recall@5", "ndcg@5"], users_per_batch=4)
    validate = pickle.loads(pickle.dumps(validate))
    model = tiny.TwoInterests(items=tiny.make_table())
    values = validate(model, WorkerGroup.alone())
    expected = report_of(workspace)["metrics"]
    assert values == {name: expected[name]["value"] for name in ("recall@5", "ndcg@5")}


def test_validator_refuses_unknown_metrics(workspace) -> None:
    with pytest.raises(ConfigError, match=r'unknown metric "recal".*Known: .*recall'):
        make_validator(workspace.url, tiny.MAX_HISTORY, ["recal@5"])
