"""Checkpoints beside training: what is in them, when they count, what is refused. One process; kills are elsewhere."""

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch

from distributed_mi.core.errors import CheckpointError
from distributed_mi.embeddings.checkpoint import Snapshot
from distributed_mi.embeddings.table import LocalItemTable
from distributed_mi.training import checkpoint_writer
from distributed_mi.training.checkpoint import FORMAT, CheckpointManifest, load_model, read_manifest
from distributed_mi.training.checkpoint_writer import BackgroundWriter, CheckpointPart
from distributed_mi.training.loop import Run, Trainer
from tests.unit.training.toys import build, config, spec_of

FS = pafs.LocalFileSystem()


def build_async(folder: Path, **values: Any) -> tuple[Trainer, Run]:
    trainer, run = build(config(**values), folder)
    run.store.background = True
    return trainer, run


class Gate:
    """Holds every write of a file until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        original = checkpoint_writer.save_table

        def save_table(*given: Any, **named: Any) -> Any:
            assert self.open.wait(30)
            return original(*given, **named)

        monkeypatch.setattr(checkpoint_writer, "save_table", save_table)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    trainer, run = build_async(tmp_path)
    for _ in range(3):
        trainer.step()
    before = {n: t.clone() for n, t in run.table.state()[1].items()} | run.engine.dense_state()
    run.store.save(3, run.spec, run.engine, run.table, {"step": 3})
    assert run.store.writer.busy
    for _ in range(3):
        trainer.step()
    run.store.check()
    assert run.store.complete_steps() == []  # nothing reads as complete before it is
    gate.open.set()
    run.store.wait()
    assert run.store.complete_steps() == [3]
    _, again = build(config(), tmp_path / "again")
    manifest = run.store.newest()
    assert manifest is not None
    run.store.restore(manifest, again.engine, again.table)
    after = again.table.state()[1] | again.engine.dense_state()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert not torch.equal(run.table.state()[1]["weight"], before["weight"])


def test_asynchronous_and_waiting_writing_leave_the_same_files(tmp_path: Path) -> None:
    files = []
    for name, background in (("a", True), ("b", False)):
        trainer, run = build(config(), tmp_path / name)
        run.store.background = background
        trainer.train()
        files.append([read_manifest(FS, run.store.path(s)).files for s in run.store.complete_steps()])
    assert files[0] == files[1]
    assert len(files[0]) >= 2


def test_a_failing_write_stops_training_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, run = build_async(tmp_path, max_steps=40)
    original = checkpoint_writer.write_tensors

    def full_disk(fs: Any, path: str, tensors: Any) -> str:
        if "step-000000008" in path:
            raise OSError("No space left on device")
        return original(fs, path, tensors)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", full_disk)
    with pytest.raises(CheckpointError, match=r"step-000000008 could not be written: No space left"):
        trainer.train()
    assert trainer.state.step <= 12  # the next checkpoint asks, if no step did before
    assert run.store.complete_steps() == [4]
    monkeypatch.undo()
    trainer, run = build_async(tmp_path)
    assert trainer.train().step == 12


def test_without_room_for_a_copy_the_step_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, run = build_async(tmp_path)
    held = sum(t.numel() * t.element_size() for t in run.table.state()[1].values())
    for free, background in ((2 * held, True), (2 * held - 1, False), (None, True)):
        monkeypatch.setattr(checkpoint_writer, "available_memory_bytes", lambda found=free: found)
        assert checkpoint_writer.has_room_for_copy(run.table) is background
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two workers on this machine share what is free
    monkeypatch.setattr(checkpoint_writer, "available_memory_bytes", lambda: 2 * held)
    run.store.save(1, run.spec, run.engine, run.table, {})
    assert not run.store.writer.busy
    assert run.store.complete_steps() == [1]
    assert trainer.state.step == 0


def test_an_error_that_ends_training_leaves_no_thread_and_a_whole_checkpoint(tmp_path: Path) -> None:
    trainer, run = build_async(tmp_path)
    source = run.batches

    def poisoned(step: int) -> Any:
        if step == 5:
            raise OSError("a disk is gone")
        return source(step)

    poisoned.num_users = source.num_users  # type: ignore[attr-defined]
    object.__setattr__(run, "batches", poisoned)
    with pytest.raises(OSError, match="a disk is gone"):
        trainer.train()
    assert not run.store.writer.busy
    assert run.store.complete_steps() == [4]


# ---- several workers write: their parts, without a group -----------------------------------------------------------


def parts(folder: Path, size: int = 2) -> list[CheckpointPart]:
    """What the workers of a group would write; each holds every second row."""
    table = LocalItemTable(41, 8)
    ids, tensors = table.state()
    (folder / "step-000000004").mkdir(parents=True)
    manifest = CheckpointManifest(4, spec_of(config()), size, {}, has_optimizer=True, state={"step": 4})
    return [
        CheckpointPart(
            fs=FS,
            path=str(folder / "step-000000004"),
            attempt="a1",
            rank=rank,
            rows=Snapshot(ids[rank::size], {n: t[rank::size] for n, t in tensors.items()}),
            tensors={"dense.safetensors": {"x": torch.ones(2)}},
            manifest=manifest,
            complete=lambda: None,
            given_up=threading.Event(),
        )
        for rank in range(size)
    ]


def test_the_manifest_waits_for_every_worker(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    writer = BackgroundWriter()
    writer.run(first.write, background=True)
    assert writer.busy
    assert not (tmp_path / "step-000000004" / "manifest.json").exists()
    second.write()
    writer.wait()
    manifest = read_manifest(FS, first.path)
    names = sorted(p.name for p in Path(first.path).iterdir())
    assert names == sorted([*manifest.files, "manifest.json"])  # the notes are gone
    assert len(manifest.table_files) == 2


def test_a_worker_that_cannot_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = parts(tmp_path)
    original = checkpoint_writer.save_table

    def failing(rows: Any, fs: Any, path: str, rank: int, *given: Any, **named: Any) -> Any:
        if rank == 1:
            raise OSError("quota exceeded")
        return original(rows, fs, path, rank, *given, **named)

    monkeypatch.setattr(checkpoint_writer, "save_table", failing)
    with pytest.raises(CheckpointError, match="quota exceeded"):
        second.write()
    with pytest.raises(CheckpointError, match="worker 1: quota exceeded"):
        first.write()
    assert not (tmp_path / "step-000000004" / "manifest.json").exists()


def test_parts_of_another_attempt_do_not_count(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    late = CheckpointPart(**{**vars(second), "attempt": "a0"})
    late.write()
    writer = BackgroundWriter()
    writer.run(first.write, background=True)
    first.given_up.set()
    writer.wait()
    assert not (tmp_path / "step-000000004" / "manifest.json").exists()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trainer, run = build(config(max_steps=4), tmp_path)
    trainer.train()
    return Path(run.store.path(4))


def change_manifest(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_checkpoint_of_a_newer_version_is_refused_and_says_so(saved: Path, tmp_path: Path) -> None:
    change_manifest(saved, format=FORMAT + 1, unknown="field")
    with pytest.raises(CheckpointError, match=rf"newer version.*format is {FORMAT + 1}.*up to {FORMAT}"):
        load_model(FS, str(saved))
    trainer, _ = build(config(), tmp_path)
    with pytest.raises(CheckpointError, match="newer version"):
        trainer.train()


@pytest.mark.parametrize(
    "text", ['{"format": 0}', '{"format": "2"}', "[]", '{"stage": "train"}', "not JSON", '{"format": 2}']
)
def test_a_foreign_manifest_is_refused(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is not a checkpoint manifest.*Remove"):
        load_model(FS, str(saved))


def test_format_1_with_an_id_for_every_row_is_read(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    from distributed_mi.embeddings.checkpoint import sha256

    model = load_model(FS, str(saved))
    name = "table-00000-of-00001-0000.safetensors"
    tensors = load_file(saved / name)
    first, step, count = tensors.pop("id_range").tolist()
    save_file(tensors | {"ids": torch.arange(first, first + step * count, step)}, saved / name)
    files = read_manifest(FS, str(saved)).files | {name: sha256((saved / name).read_bytes())}
    change_manifest(saved, format=1, files=files)
    ids = torch.arange(41)
    assert torch.equal(load_model(FS, str(saved)).items.rows(ids), model.items.rows(ids))
