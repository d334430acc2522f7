"""A run saved on 4 workers, loaded on 1, 2 and 3: the evaluation is the same to the last bit, and training goes on."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch

from distributed_mi.embeddings import checkpoint
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.models.base import Recommender
from distributed_mi.training.checkpoint import load_model, read_manifest
from tests.distributed import run_on_ranks
from tests.unit.training.toys import NUM_ROWS, ToyBatches, build, config

pytestmark = pytest.mark.slow  # ten processes, each of which imports torch

FS = pafs.LocalFileSystem()


def ranked(model: Recommender) -> list[Any]:
    """Top-k of the users of three steps: scores, ids and interests of each."""
    found: list[Any] = []
    for step in range(3):
        users = ToyBatches(WorkerGroup.alone())(step)[0].history
        best = model.items.topk(model.encode(users).interests_BKD.flatten(0, 1), 10)
        found += [part.tolist() for part in best]
    return found


def save(group: WorkerGroup, payload: dict[str, Any]) -> list[int]:
    """Train 8 of 12 steps on this group, writing beside the steps."""
    checkpoint.MAX_FILE_BYTES = 200  # several files a worker
    trainer, run = build(config(), Path(payload["folder"]) / "run", group=group)
    run.store.background = True
    trainer.run = replace(run, wants_pause=lambda: trainer.state.step == 8)
    trainer.train()
    assert trainer.paused
    steps = run.store.complete_steps()
    run.store.export(8, f"{payload['folder']}/model", run.table)
    return steps


def load(group: WorkerGroup, payload: dict[str, Any]) -> dict[str, Any]:
    """Evaluate what four saved, and go on from it to step 12."""
    with torch.no_grad():
        model = load_model(FS, f"{payload['folder']}/model", group=group)
        found = ranked(model)
    own = Path(payload["folder"]) / f"run-{group.size}"
    if group.rank == 0:
        shutil.copytree(Path(payload["folder"]) / "run", own)
    group.barrier()
    trainer, _ = build(config(), own, group=group)
    state = trainer.train()
    return {"ranked": found, "step": state.step, "best": state.best_metrics["recall@50"]}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    steps = run_on_ranks(
        "tests.parity.test_any_worker_count:save", 4, folder / "save", {"folder": str(folder)}
    )
    assert steps == [[4, 8]] * 4
    return folder


def test_what_four_saved_is_evaluated_alike_by_one_two_and_three(four: Path) -> None:
    manifest = read_manifest(FS, str(four / "model"))
    assert manifest.world_size == 4
    assert len(manifest.table_files) > 4
    with torch.no_grad():
        expected = ranked(load_model(FS, str(four / "model")))
    alone, _ = build(config(), four / "alone")
    undisturbed = alone.train()
    assert len(expected[1][0]) < NUM_ROWS
    for size in (1, 2, 3):
        target = "tests.parity.test_any_worker_count:load"
        for result in run_on_ranks(target, size, four / f"load-{size}", {"folder": str(four)}):
            assert result["ranked"] == expected, size
            assert result["step"] == 12
            assert result["best"] == pytest.approx(undisturbed.best_metrics["recall@50"], abs=1e-4)
