"""The main job on a small generated data set, through the command line, twice; then everything a user does with it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distributed_mi.cli import main
from distributed_mi.core.artifacts import Workspace

pytestmark = pytest.mark.ray

SMALL = [
    "data.reader.num_users=600",
    "data.reader.num_items=400",
    "data.reader.num_topics=20",
    "train.max_steps=300",
    "train.validate_every=100",
    "train.checkpoint_every=100",
    "evaluate.bootstrap_samples=200",
]


@pytest.fixture(scope="module")
def workspace(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace on which the whole pipeline has run."""
    folder = tmp_path_factory.mktemp("e2e") / "workspace"
    assert main(["run", "quickstart", f"workspace={folder}", *SMALL]) == 0
    return folder


def report(workspace: Path, run: str) -> dict:
    return json.loads((workspace / "evaluate" / run / "report.json").read_text())


def test_every_run_has_a_report_with_intervals_and_a_leakage_check(workspace: Path) -> None:
    for run in ("most_popular", "remi", "eimf"):
        found = report(workspace, run)
        assert found["model"] == run
        assert found["num_users"] == 60  # a tenth of 600 users
        assert found["leakage"]["passed"] is True
        assert found["leakage"]["label_events_in_train"] == 0
        low, high = found["metrics"]["recall@20"]["ci95"]
        assert 0 <= low <= found["metrics"]["recall@20"]["value"] <= high <= 1
        assert (workspace / "evaluate" / run / "report.md").stat().st_size > 200
        assert list((workspace / "evaluate" / run).glob("*.png"))


def test_learned_models_beat_popularity_by_far(workspace: Path) -> None:
    floor = report(workspace, "most_popular")["metrics"]["recall@20"]["value"]
    for run in ("remi", "eimf"):
        assert report(workspace, run)["metrics"]["recall@20"]["value"] > 2 * floor


def test_second_run_skips_every_stage(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in workspace.rglob("manifest.json")}
    assert main(["run", "quickstart", f"workspace={workspace}", *SMALL]) == 0
    out = capsys.readouterr().out
    assert (
        out.count("skipped") == 4 + 2 * 3
    )  # four stages before training; training and evaluation of three runs
    assert " done " not in out
    assert {p: p.stat().st_mtime_ns for p in workspace.rglob("manifest.json")} == before


def test_recommend_and_explain_for_a_user_of_each_split(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = Workspace(str(workspace)).stage("prepare")
    config = ["quickstart", f"workspace={workspace}", *SMALL]
    for split in ("train", "test"):
        user = prepare.read(f"sequences/{split}", "sequences", columns=["user_id"])["user_id"][0].as_py()
        assert main(["recommend", *config, "--user", user, "--top", "5", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert len(answer["items"]) == 5
        assert main(["explain", *config, "--user", user, "--json"]) == 0
        explained = json.loads(capsys.readouterr().out)
        check_explanation(explained, workspace)
        assert main(["explain", *config, "--user", user]) == 0
        out = capsys.readouterr().out
        for interest in explained["interests"]:
            assert f"Interest {interest['number'] + 1}: {interest['names'][0]['text']}" in out
        assert f"exemplar user {explained['chain']['exemplar_user_id']}" in out
        assert f"prompt {explained['chain']['prompt_hash'][:16]}" in out


def check_explanation(explained: dict, workspace: Path) -> None:
    """Interests with names and items of their own, and a chain that leads to what the stages have written."""
    assert len(explained["interests"]) == 4  # of the backbone
    given = [i["item_id"] for interest in explained["interests"] for i in interest["recommended"]]
    assert sorted(given) == sorted(i["item_id"] for i in explained["answer"]["items"])
    for interest in explained["interests"]:
        assert interest["history"]
        assert interest["names"]
        assert all(name["text"] and -1 <= name["similarity"] <= 1.001 for name in interest["names"])
    stages = Workspace(str(workspace))
    users = stages.stage("prepare").read(
        "sequences/train", "sequences", columns=["user_index", "user_id", "item_indices"]
    )
    chain = explained["chain"]
    exemplar = next(u for u in users.to_pylist() if u["user_id"] == chain["exemplar_user_id"])
    answers = stages.stage("interests").read("answers", "answers").to_pylist()
    answer = next(a for a in answers if a["user_index"] == exemplar["user_index"])
    assert (chain["prompt_hash"], chain["answer"]) == (answer["prompt_hash"], answer["answer"])
    assert len(chain["prompt_hash"]) == 64
    assert chain["evidence"]
    for evidence in chain["evidence"]:
        assert evidence["text"]
        found = {item["item_index"] for item in evidence["items"]}
        assert found
        assert found <= set(exemplar["item_indices"])


def test_recommend_for_items_and_the_errors_of_unknown_ones(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = Workspace(str(workspace)).stage("prepare")
    item = prepare.read("catalogue", "catalogue", columns=["item_id"])["item_id"][0].as_py()
    config = ["quickstart", f"workspace={workspace}", *SMALL]
    assert main(["recommend", *config, "--items", f"{item},no-such-item", "--top", "3"]) == 0
    assert "no-such-item" in capsys.readouterr().out
    assert main(["recommend", *config, "--user", "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err


def test_compare_tests_the_two_runs_user_by_user(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(workspace / "evaluate" / run / "report.json") for run in ("eimf", "most_popular")]
    assert main(["compare", *paths]) == 0
    out = capsys.readouterr().out
    # metric, A, B, B - A, relative, interval, p
    number = r"([-+]?\d+\.\d+)"
    row = rf"recall@20 +{number} +{number} +{number} +{number}% +\[{number}, {number}\] +{number}"
    found = re.search(row, out)
    assert found, out
    a, b, difference, _, low, high, p = map(float, found.groups())
    values = [report(workspace, run)["metrics"]["recall@20"]["value"] for run in ("eimf", "most_popular")]
    assert [a, b] == pytest.approx(values, abs=1e-4)
    assert low <= difference <= high < 0
    assert difference == pytest.approx(b - a, abs=2e-4)
    assert 0 < p < 0.01


def test_a_misspelt_field_is_refused_before_anything_runs(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "quickstart", f"workspace={workspace}", "train.max_step=3"]) == 2
    assert "max_steps" in capsys.readouterr().err


@pytest.mark.slow  # tests/ray/test_train.py holds the same on less data
def test_one_worker_gives_the_losses_and_metrics_of_two(workspace: Path) -> None:
    """The same run on one worker: losses of 50 steps to 1e-4, metrics to 1e-3."""
    same = ["quickstart", f"workspace={workspace}", *SMALL, "train.max_steps=50", "train.log_every=1"]
    for workers in (1, 2):
        name = f"eimf-{workers}"
        assert (
            main(
                [
                    "train",
                    *same,
                    f"train.run={name}",
                    f"scaling.num_workers={workers}",
                    f"evaluate.num_workers={workers}",
                ]
            )
            == 0
        )
        assert (
            main(
                [
                    "evaluate",
                    *same,
                    f"train.run={name}",
                    f"scaling.num_workers={workers}",
                    f"evaluate.num_workers={workers}",
                ]
            )
            == 0
        )
    losses = [_losses(workspace, f"eimf-{workers}") for workers in (1, 2)]
    assert len(losses[0]) == 50
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    metrics = [report(workspace, f"eimf-{workers}")["metrics"] for workers in (1, 2)]
    for name, found in metrics[0].items():
        assert found["value"] == pytest.approx(metrics[1][name]["value"], abs=1e-3)


def _losses(workspace: Path, run: str) -> list[float]:
    stage = Workspace(str(workspace)).stage(f"train/{run}")
    lines = Path(stage.path("metrics.jsonl")).read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.slow
def test_killing_the_driver_again_and_again_changes_nothing(
    workspace: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """`kill -9` of the command at random moments; the same command continues and ends where an undisturbed run ends."""
    disturbed = tmp_path / "disturbed"
    command = [
        sys.executable,
        "-m",
        "distributed_mi.cli",
        "run",
        "quickstart",
        f"workspace={disturbed}",
        *SMALL,
    ]
    environment = os.environ | {"RAY_ADDRESS": ray_address()}
    kills = 0
    for seconds in rng.uniform(5, 30, size=6):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(seconds)
            break  # it finished before its time
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 2
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    for run in ("remi", "eimf"):
        found = report(disturbed, run)["metrics"]["recall@50"]["value"]
        assert found == pytest.approx(report(workspace, run)["metrics"]["recall@50"]["value"], abs=1e-3)
    stages = Workspace(str(disturbed))
    exemplars = stages.stage("exemplars").read("exemplars", "exemplars")["user_index"].to_pylist()
    answered = stages.stage("interests").read("answers", "answers")["user_index"].to_pylist()
    assert sorted(answered) == sorted(exemplars)


def ray_address() -> str:
    """Address of the shared local Ray."""
    import ray

    return ray.get_runtime_context().gcs_address
