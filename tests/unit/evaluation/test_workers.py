"""Two gloo processes with a sharded table give the numbers of one process."""

from pathlib import Path
from typing import Any

import numpy as np

from distributed_mi.core.artifacts import Workspace, read_table
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.evaluation.config import EvaluateConfig
from distributed_mi.evaluation.stage import EvaluateWorker
from distributed_mi.evaluation.validate import make_validator
from tests.distributed import run_on_ranks
from tests.unit.evaluation import tiny

METRICS = ["recall@5", "ndcg@5", "coverage@5"]


def on_worker(group: WorkerGroup, payload: dict[str, Any]) -> dict[str, Any]:
    """Evaluate with and without seen items, and validate in batches of one (a share of 4 users beside one of 5)."""
    results = {out: EvaluateWorker(tiny.load)(p, group) for out, p in payload["evaluations"].items()}
    workspace = Workspace(payload["workspace"])
    model = tiny.load(workspace.fs, payload["model"], group=group)
    validate = make_validator(workspace.url, tiny.MAX_HISTORY, METRICS, users_per_batch=1)
    return {"evaluations": results, "validation": validate(model, group)}


def test_two_workers_equal_one(workspace: Workspace, tmp_path: Path) -> None:
    def payload(name: str) -> dict[str, Any]:
        model = workspace.stage("train/two").path("model")
        evaluations = {
            str(exclude): {
                "workspace": workspace.url,
                "model": model,
                "out": str(tmp_path / f"{name}-{exclude}.parquet"),
                "config": EvaluateConfig(
                    metrics=METRICS, exclude_seen=exclude, users_per_batch=4
                ).model_dump(),
            }
            for exclude in (False, True)
        }
        return {"workspace": workspace.url, "model": model, "evaluations": evaluations}

    alone = on_worker(WorkerGroup.alone(), payload("alone"))
    first, second = run_on_ranks(
        "tests.unit.evaluation.test_workers:on_worker", 2, tmp_path / "ranks", payload("two")
    )
    assert first["validation"] == second["validation"] == alone["validation"]
    assert first["evaluations"] == alone["evaluations"]
    assert second["evaluations"] == {"False": {}, "True": {}}
    for exclude in (False, True):
        ours, expected = (
            read_table(workspace.fs, str(tmp_path / f"{name}-{exclude}.parquet"), "per_user")
            for name in ("two", "alone")
        )
        assert ours.equals(expected)
        assert np.all([len(x) == 5 for x in ours["ranked_item_indices"].to_pylist()])
