"""The loop: resume, early stop, losses that are not finite, what is kept and what is logged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_mi.core import cpu
from distributed_mi.core.errors import CheckpointError, StageError
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.table import Fetched
from distributed_mi.training.checkpoint import load_model
from distributed_mi.training.loop import Run
from tests.distributed import run_on_ranks
from tests.unit.training.toys import USERS, Bar, ToyBatches, build, config, loss_score


class KilledError(Exception):
    """Stands for a kill."""


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Every number that training changes."""
    table = {f"table.{n}": t.clone() for n, t in run.table.state()[1].items()}
    return table | run.engine.dense_state() | run.engine.optimizer_state()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(*values: float) -> Any:
    """A validation that gives these values one after the other."""
    left = list(values)
    return lambda model, group: {"recall@50": left.pop(0)}


@pytest.mark.parametrize(
    "engine",
    [{"name": "ddp"}, {"name": "deepspeed"}, {"name": "deepspeed", "zero_stage": 1}, {"zero_stage": 3}],
    ids=str,
)
@pytest.mark.parametrize("killed_at", [2, 5, 9])
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, engine: dict[str, Any], killed_at: int
) -> None:
    cfg = config(engine=engine)
    trainer, whole = build(cfg, tmp_path / "whole")
    expected = trainer.train()

    trainer, run = build(cfg, tmp_path / "parts")
    source = run.batches

    def killing(step: int) -> Any:
        if step == killed_at:
            raise KilledError
        return source(step)

    killing.num_users = USERS  # type: ignore[attr-defined]
    object.__setattr__(run, "batches", killing)
    with pytest.raises(KilledError):
        trainer.train()

    trainer, resumed = build(cfg, tmp_path / "parts")
    state = trainer.train()
    assert (state.step, state.best_step, state.best_metric) == (12, expected.best_step, expected.best_metric)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    kept = [
        {k: v for k, v in x.items() if not any(word in k for word in ("second", "users", "costs"))}
        for x in lines(tmp_path / "parts")
    ]
    assert kept == [
        {k: v for k, v in x.items() if not any(word in k for word in ("second", "users", "costs"))}
        for x in lines(tmp_path / "whole")
    ]
    assert isinstance(resumed.bar, Bar)
    assert resumed.bar.done == 12


def test_training_lowers_the_loss_and_validates_on_time(tmp_path: Path) -> None:
    trainer, _ = build(config(max_steps=150, validate_every=40, checkpoint_every=50, log_every=10), tmp_path)
    state = trainer.train()
    log = lines(tmp_path)
    curve = [x["loss"] for x in log if x["kind"] == "train"]
    assert sum(curve[-3:]) < sum(curve[:3])
    assert [x["step"] for x in log if x["kind"] == "validation"] == [40, 80, 120, 150]
    assert state.stop_reason == "max_steps"
    first = log[0]
    assert first["step"] == 10
    assert set(first["terms"]) == {"recommendation", "routing"}
    assert first["loss"] == pytest.approx(sum(first["terms"].values()))


def test_training_stops_after_patience_validations_without_gain(tmp_path: Path) -> None:
    """Best at the second validation; two more without gain (an equal value is no gain) end the run at step 16."""
    cfg = config(max_steps=100, patience=2, keep_checkpoints=1)
    trainer, run = build(cfg, tmp_path, scores(0.1, 0.3, 0.3, 0.2))
    state = trainer.train()
    assert (state.step, state.best_step, state.best_metric) == (16, 8, 0.3)
    assert state.stop_reason == "patience"
    assert run.store.complete_steps() == [8, 16]


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    trainer, _ = build(config(patience=1, max_steps=100), tmp_path, scores(0.3, 0.2))
    assert trainer.train().step == 8
    trainer, _ = build(config(patience=1, max_steps=100), tmp_path, scores())
    assert trainer.train().stop_reason == "patience"


def test_older_checkpoints_are_removed_but_never_the_best(tmp_path: Path) -> None:
    values = [0.5, *[0.1] * 9]
    cfg = config(max_steps=40, keep_checkpoints=2)
    trainer, run = build(cfg, tmp_path, scores(*values))
    trainer.train()
    assert run.store.complete_steps() == [4, 36, 40]


@pytest.mark.parametrize("log_every", [1, 3, 10])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path, log_every: int) -> None:
    """Step 7 goes wrong and is named whatever the interval of the check; the checkpoint of step 4 stays the newest."""
    trainer, run = build(config(log_every=log_every, prefetch=0), tmp_path)
    source = run.batches

    def poisoned(step: int) -> Any:
        if step == 6:
            next(iter(run.model.parameters())).data.fill_(float("nan"))
        return source(step)

    poisoned.num_users = USERS  # type: ignore[attr-defined]
    object.__setattr__(run, "batches", poisoned)
    with pytest.raises(
        StageError, match=r"step 7 is not finite \(recommendation nan.*checkpoint of step 4 is good"
    ):
        trainer.train()
    assert run.store.complete_steps() == [4]


def test_a_metric_that_validation_does_not_measure_is_refused(tmp_path: Path) -> None:
    trainer, _ = build(config(validation_metric="recall@7"), tmp_path)
    with pytest.raises(StageError, match=r"recall@7.*it measured recall@50"):
        trainer.train()


def test_an_incomplete_checkpoint_is_ignored(tmp_path: Path) -> None:
    trainer, run = build(config(), tmp_path)
    trainer.train()
    (tmp_path / "checkpoints" / "step-000000012" / "manifest.json").unlink()
    assert run.store.complete_steps() == [4, 8] or run.store.complete_steps() == [8]
    newest = run.store.newest()
    assert newest is not None
    assert newest.step == 8
    trainer, again = build(config(), tmp_path)
    assert trainer.train().step == 12
    assert 12 in again.store.complete_steps()


@pytest.mark.parametrize("name", ["dense.safetensors", "dense_optimizer.safetensors", "table-"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    trainer, run = build(config(), tmp_path)
    trainer.train()
    folder = Path(run.store.path(12))
    victim = next(p for p in folder.iterdir() if p.name.startswith(name))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data))
    trainer, _ = build(config(), tmp_path)
    with pytest.raises(CheckpointError, match=victim.name):
        trainer.train()


def test_a_manifest_that_is_no_manifest_is_an_error(tmp_path: Path) -> None:
    trainer, run = build(config(), tmp_path)
    trainer.train()
    (Path(run.store.path(12)) / "manifest.json").write_text('{"format": 1, "step": 12}')
    with pytest.raises(CheckpointError, match=r"step-000000012/manifest.json is not a checkpoint manifest"):
        run.store.newest()


def test_the_exported_model_has_the_numbers_of_the_best_step_and_no_optimizer(tmp_path: Path) -> None:
    trainer, run = build(config(max_steps=8), tmp_path, scores(0.3, 0.1))
    trainer.train()
    run.store.export(4, str(tmp_path / "model"), run.table)
    names = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert names == ["dense.safetensors", "manifest.json", "table-00000-of-00001-0000.safetensors"]

    _, fresh = build(config(), tmp_path / "other")
    manifest = run.store.newest()
    assert manifest is not None
    best = load_model(run.store.fs, run.store.path(4))
    exported = load_model(run.store.fs, str(tmp_path / "model"))
    batch = ToyBatches(WorkerGroup.alone())(3)[0]
    assert torch.equal(exported.encode(batch.history).interests_BKD, best.encode(batch.history).interests_BKD)
    assert not torch.equal(exported.items.rows(batch.target_ids_B), fresh.table.rows(batch.target_ids_B))
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_model(run.store.fs, str(tmp_path / "nothing"))


def test_best_score_is_that_of_the_best_checkpoint(tmp_path: Path) -> None:
    trainer, run = build(config(max_steps=40), tmp_path)
    state = trainer.train()
    model = load_model(run.store.fs, run.store.path(state.best_step))
    assert loss_score(model, WorkerGroup.alone())["recall@50"] == pytest.approx(state.best_metric, abs=1e-6)


def test_dropout_masks_depend_on_the_step_alone(tmp_path: Path) -> None:
    trainer, run = build(config(prefetch=0), tmp_path)
    seen: dict[int, float] = {}
    source = run.batches

    def watching(step: int) -> Any:
        seen[step] = float(torch.rand(()))
        return source(step)

    watching.num_users = USERS  # type: ignore[attr-defined]
    object.__setattr__(run, "batches", watching)
    trainer.train()
    torch.manual_seed(1)
    first = dict(seen)
    trainer, run = build(config(prefetch=0), tmp_path / "again")
    object.__setattr__(run, "batches", watching)
    trainer.train()
    assert seen == first
    assert len(set(seen.values())) == len(seen)


def train_and_watch_lookups(group: WorkerGroup, payload: dict[str, Any]) -> dict[str, Any]:
    """A whole run in accumulation parts; which lookups of its steps the table had been told of."""
    trainer, run = build(config(engine={"accumulation": 2}), Path(payload["folder"]), group=group)
    known: list[bool] = []
    original, waiting = run.table.fetch, getattr(run.table, "_announced", ())

    def fetch(*ids: torch.Tensor) -> Fetched:
        if run.model.training:
            known.append(len(waiting) > 0 and waiting[0].is_of(ids))
        return original(*ids)

    run.table.fetch = fetch  # type: ignore[method-assign]
    trainer.train()
    dense = {name: value.tolist() for name, value in run.engine.dense_state().items()}
    return {"known": known, "left": len(waiting), "dense": dense}


def test_two_workers_are_told_of_the_lookups_to_come_and_end_where_one_does(tmp_path: Path) -> None:
    target = "tests.unit.training.test_loop:train_and_watch_lookups"
    alone = train_and_watch_lookups(WorkerGroup.alone(), {"folder": str(tmp_path / "alone")})
    for found in run_on_ranks(target, 2, tmp_path / "ranks", {"folder": str(tmp_path / "two")}):
        assert found["known"] == [False, False] + [True] * 22  # twelve steps of two parts
        assert found["left"] == 0
        for name, value in alone["dense"].items():
            expected = torch.tensor(value)
            torch.testing.assert_close(torch.tensor(found["dense"][name]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "engine", "kernels"),
    [
        ({"name": "remi"}, {}, 3),
        ({"name": "remi"}, {"precision": "bf16"}, 0),
        ({"name": "remi"}, {"zero_stage": 1}, 0),
        ({"name": "youtube_dnn"}, {}, 3),
        ({"name": "youtube_dnn", "loss": {"name": "in_batch"}}, {}, 0),
    ],
    ids=str,
)
def test_threads_go_to_kernels_where_they_do_the_work_and_change_no_number(
    tmp_path: Path,
    model: dict[str, Any],
    engine: dict[str, Any],
    kernels: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(cpu, "_num_cores", lambda: 3)
    before, seen, found = torch.get_num_threads(), [], []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            trainer, run = build(config(model=model, engine=engine), tmp_path / str(threads))
            step = run.engine.step

            def watched(*args: Any, step: Any = step) -> torch.Tensor:
                seen.append((torch.get_num_threads(), cpu._here.kernels))
                return step(*args)

            monkeypatch.setattr(run.engine, "step", watched)
            trainer.train()
            found.append(weights(run))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert set(seen[len(seen) // 2 :]) == {(1, 3) if kernels else (3, 0)}
    for key, values in found[0].items():
        torch.testing.assert_close(found[1][key], values, rtol=1e-4, atol=1e-5)
