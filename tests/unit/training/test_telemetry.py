"""What a run says about itself: shares, time to go, trackers, a profiler's trace."""

import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from pydantic import ValidationError

from distributed_mi.core.errors import ConfigError, MissingDependencyError
from distributed_mi.embeddings.counters import TableCounters
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.table import LocalItemTable
from distributed_mi.training import telemetry
from distributed_mi.training.telemetry import NoTracker, StretchMeter, TimeToGo, open_tracker
from tests.unit.training.toys import build, config

LOCAL = pafs.LocalFileSystem()


def test_shares_are_those_of_the_counters_by_hand() -> None:
    table = LocalItemTable(11, 4)
    meter = StretchMeter(table, WorkerGroup.alone())
    table.counters = TableCounters(200, 50, 8_000_000, exchange_seconds=1.0, update_seconds=0.5)
    meter.wait_seconds = 0.2
    facts = meter.take(seconds=4.0, steps=16).values()
    assert facts == {
        "exchange_share": 0.25,
        "update_share": 0.125,
        "wait_share": 0.05,
        "unique_share": 0.25,
        "exchanged_mb_per_step": 0.5,
        "table_gb": pytest.approx(11 * (3 * 4 * 4 + 4) / 1e9, rel=1e-3),
    }
    again = meter.take(seconds=1.0, steps=1)  # everything counts from zero again
    assert (again.exchange_share, again.wait_share, again.unique_share) == (0.0, 0.0, 1.0)


def test_time_to_go_is_said_once_from_the_steps_after_the_warm_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    to_go = TimeToGo(config(max_steps=1_000, validate_every=100), first_step=240)
    with caplog.at_level(logging.INFO):
        for step in range(241, 300):
            now[0] += 60.0 if step <= 245 else 0.5  # a slow start is no measure
            to_go.after(step)
    # 15 steps of 0.5 s; 740 steps and 40 steps are left after step 260
    assert (
        "500.0 ms a step: about 6 min for max_steps (1,000), 20 s to the next validation (step 300)"
        in to_go.text
    )
    assert len(caplog.records) == 1


def test_a_next_validation_is_never_after_the_last_step() -> None:
    to_go = TimeToGo(config(max_steps=130, validate_every=100), first_step=0)
    assert to_go.estimate(120, 3600.0).endswith("10.0 h to the next validation (step 130)")


def test_lines_and_the_progress_note_carry_loss_metric_rate_and_shares(tmp_path: Path) -> None:
    trainer, run = build(config(max_steps=12), tmp_path)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    costs = next(line for line in lines if line["kind"] == "train")["costs"]
    assert set(costs) == {
        *("exchange_share", "update_share", "wait_share", "unique_share", "exchanged_mb_per_step", "table_gb")
    }
    note = run.bar.notes[-1]  # type: ignore[attr-defined]
    for part in ("loss ", " users/s", "recall@50 -", "best", "unique ids ", "table "):
        assert part in note
    assert "exchange" not in note  # one worker has none


def test_a_profile_is_a_chrome_trace_of_the_named_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = build(config(profile_steps=(3, 4)), tmp_path)
    with caplog.at_level(logging.INFO):
        trainer.train()
    trace = tmp_path / "profile" / "steps-3-4.json"
    assert str(trace) in caplog.text
    events = json.loads(trace.read_text())["traceEvents"]
    names = [e.get("name", "") for e in events]
    assert any(name.startswith("aten::") for name in names)
    assert names.count("engine.step") == names.count("table.step") == 2


def test_steps_to_profile_must_be_in_order() -> None:
    with pytest.raises(ValidationError, match=r"first step to trace \(5\) comes after the last one \(4\)"):
        config(profile_steps=(5, 4))


class Writer:
    """In place of TensorBoard's `SummaryWriter`."""

    made: list["Writer"] = []  # noqa: RUF012

    def __init__(self, directory: str, purge_step: int) -> None:
        self.directory, self.purge_step, self.closed = directory, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_losses_rates_and_metrics_of_their_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made.clear()
    trainer, _ = build(config(max_steps=8, tracking={"name": "tensorboard"}), tmp_path)
    trainer.train()
    (writer,) = Writer.made
    assert (writer.directory, writer.purge_step, writer.closed) == (f"{tmp_path}/tensorboard", 1, True)
    by_name = {n for n, _, _ in writer.scalars}
    assert {
        "loss",
        "loss_terms/recommendation",
        "loss_terms/routing",
        "users_per_s",
        "recall@50",
        "unique_share",
    } <= by_name
    assert [s for n, _, s in writer.scalars if n == "loss"] == list(range(1, 9))
    assert [s for n, _, s in writer.scalars if n == "recall@50"] == [4, 8]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert [v for n, v, _ in writer.scalars if n == "loss"] == losses
    # a later attempt begins after what is done, in the folder that was asked for
    again = config(max_steps=9, tracking={"name": "tensorboard", "directory": str(tmp_path / "x")})
    open_tracker(again, fs=LOCAL, folder=str(tmp_path), first_step=8, group=WorkerGroup.alone()).close()
    assert (Writer.made[-1].directory, Writer.made[-1].purge_step) == (str(tmp_path / "x"), 9)


def test_tensorboard_event_files_hold_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard (extra `tensorboard`) is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = build(config(max_steps=8, tracking={"name": "tensorboard"}), tmp_path)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 9))
    torch.testing.assert_close(torch.tensor([e.value for e in events.Scalars("loss")]), torch.tensor(losses))


class Client:
    """In place of MLflow's client: one store for all clients."""

    runs: dict[str, dict[str, Any]] = {}  # noqa: RUF012

    def __init__(self, tracking_uri: str | None) -> None:
        self.uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        return f"id of {name}"

    def search_runs(self, experiments: list[str], filter_string: str, max_results: int) -> list[Any]:
        found = [r for r in self.runs if f"'{self.runs[r]['tags'][telemetry.MLflow.TAG]}'" in filter_string]
        return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=r)) for r in found]

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
        self.runs["r1"] = {
            "experiment": experiment,
            "tags": tags,
            "name": run_name,
            "metrics": [],
            "params": {},
            "uri": self.uri,
            "status": "RUNNING",
        }
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def log_param(self, run_id: str, name: str, value: Any) -> None:
        self.runs[run_id]["params"][name] = value

    def log_metric(self, run_id: str, name: str, value: float, step: int) -> None:
        assert "@" not in name
        self.runs[run_id]["metrics"].append((name, value, step))

    def set_terminated(self, run_id: str) -> None:
        self.runs[run_id]["status"] = "FINISHED"


def test_mlflow_gets_one_run_that_a_resumed_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("mlflow")
    module.MlflowClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    Client.runs.clear()
    folder = tmp_path / "0123abcd"
    tracking = {"name": "mlflow", "uri": "file:///somewhere", "experiment": "toys"}
    for max_steps in (4, 8):
        trainer, _ = build(config(max_steps=max_steps, tracking=tracking), folder)
        trainer.train()
        assert [r["status"] for r in Client.runs.values()] == ["FINISHED"]
        for saved in (folder / "checkpoints").glob("*/manifest.json"):  # as if it had been killed there
            found = json.loads(saved.read_text())
            found["state"]["stop_reason"] = ""
            saved.write_text(json.dumps(found))
    (run,) = Client.runs.values()
    assert (run["experiment"], run["name"], run["uri"]) == ("id of toys", "remi", "file:///somewhere")
    assert run["tags"] == {telemetry.MLflow.TAG: "0123abcd"}
    assert run["params"]["num_users_per_step"] == 8
    assert [s for n, _, s in run["metrics"] if n == "loss"] == list(range(1, 9))
    assert [s for n, _, s in run["metrics"] if n == "recall_at_50"] == [4, 8]


def test_mlflow_itself_takes_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "MLFLOW_ALLOW_FILE_STORE", "true"
    )  # a folder will do here, MLflow would rather have a database
    mlflow = pytest.importorskip("mlflow", reason="mlflow (extra `mlflow`) is not installed")
    uri = f"file://{tmp_path}/mlruns"
    cfg = config(max_steps=4, tracking={"name": "mlflow", "uri": uri, "experiment": "toys"})
    trainer, _ = build(cfg, tmp_path / "0123abcd")
    trainer.train()
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")]
)
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    trainer, _ = build(config(tracking={"name": name}), tmp_path)
    with pytest.raises(MissingDependencyError, match=rf"distributed_mi\[{name}\]"):
        trainer.train()


def test_only_worker_0_tracks_and_an_object_store_needs_a_directory() -> None:
    class Second(WorkerGroup):
        def __init__(self) -> None:
            super().__init__(1, 2, torch.device("cpu"), None)

    cfg = config(tracking={"name": "tensorboard"})
    store = pafs.SubTreeFileSystem("/tmp", LOCAL)
    options: dict[str, Any] = {"fs": store, "folder": "bucket/run", "first_step": 0}
    assert isinstance(open_tracker(cfg, **options, group=Second()), NoTracker)
    with pytest.raises(ConfigError, match=r"train\.tracking\.directory must be set"):
        open_tracker(cfg, **options, group=WorkerGroup.alone())
