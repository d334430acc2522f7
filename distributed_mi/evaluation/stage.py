"""The evaluate stage: a trained model -> ranked lists of every user of the split -> report, plots.

Writes `<workspace>/evaluate/<run>/`: report.json, report.md and PNG plots beside the manifest, and the ranked list and
metrics of each user in `<generation>/per_user/part-0.parquet`, which `compare` reads.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from distributed_mi.core.artifacts import Manifest, StageKey, StageRun, Workspace, write_table
from distributed_mi.core.errors import WorkspaceError
from distributed_mi.core.progress import Bar, track
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.evaluation import plots, protocol, report, scoring
from distributed_mi.evaluation.config import EvaluateConfig
from distributed_mi.evaluation.metrics.base import Floats, Ints, RankedLists
from distributed_mi.evaluation.protocol import Cases, load_cases, load_catalogue
from distributed_mi.evaluation.topk import rank_share, share
from distributed_mi.models.base import Recommender

logger = logging.getLogger(__name__)

PER_USER = "per_user/part-0.parquet"
"""Ranked lists and metrics of each user, inside the generation."""


@dataclass(frozen=True)
class EvaluateWorker:
    """What one worker does: load the model, rank its share of the users; rank 0 scores and writes.

    Args:
        load: `training.checkpoint.load_model`: `load(fs, path, group=group)` gives the model.
    """

    load: Callable[..., Recommender]

    def __call__(self, payload: dict[str, Any], group: WorkerGroup) -> dict[str, Any]:
        """Collective.

        Args:
            payload: `workspace` (URL), `model` (path of the exported model), `out` (path of the Parquet file that rank
                0 writes), `config` (an `EvaluateConfig` as JSON).
            group: the workers.

        Returns:
            On rank 0 `values` (metric -> number or None), `num_users`, `skipped_users`; elsewhere nothing.
        """
        return evaluate_worker(payload, group, load=self.load)


def evaluate_worker(
    payload: dict[str, Any], group: WorkerGroup, *, load: Callable[..., Recommender]
) -> dict[str, Any]:
    """Body of `EvaluateWorker`."""
    config = EvaluateConfig.model_validate(payload["config"])
    workspace = Workspace(payload["workspace"])
    cases, catalogue = load_cases(workspace, config.split), load_catalogue(workspace)
    model = load(workspace.fs, payload["model"], group=group)
    first, last = share(cases.num_users, group)
    with _progress(f"evaluate {config.split}", last - first, group) as bar:
        mine = rank_share(
            model,
            cases,
            group,
            length=scoring.longest(config.metrics),
            users_per_batch=config.users_per_batch,
            exclude_seen=config.exclude_seen,
            bar=bar,
        )
    ranked = _to_rank_0(mine, group)
    if group.rank != 0:
        return {}
    scores = scoring.score(RankedLists(ranked, *cases.labels, catalogue), config.metrics)
    write_table(workspace.fs, payload["out"], _per_user_table(cases, ranked, scores.per_user), "per_user")
    return {"values": scores.values, "num_users": cases.num_users, "skipped_users": cases.skipped_users}


def _progress(what: str, users: int, group: WorkerGroup) -> AbstractContextManager[Bar | None]:
    """Progress of rank 0's share, which is like the others'."""
    return track(what, users, "users") if group.rank == 0 else nullcontext()


def _to_rank_0(mine: Ints, group: WorkerGroup) -> Ints:
    """All lists in user order on rank 0 (shares are contiguous), no rows elsewhere."""
    counts = [len(mine)] + [0] * (group.size - 1)
    rows, _ = group.all_to_all_rows(torch.from_numpy(mine).to(group.device), counts)
    return rows.cpu().numpy()


def _per_user_table(cases: Cases, ranked_UN: Ints, per_user: Mapping[str, Floats]) -> pa.Table:
    lengths = (ranked_UN > 0).sum(axis=1)
    lists = pa.LargeListArray.from_arrays(
        np.concatenate([[0], np.cumsum(lengths)]), pa.array(ranked_UN[ranked_UN > 0])
    )
    columns = {
        "user_index": pa.array(cases.sequences.user_index_U[cases.rows]),
        "user_id": cases.sequences.user_id_U.take(pa.array(cases.rows)),
        "num_history": pa.array(cases.num_history),
        "num_labels": pa.array(np.diff(cases.labels[1])),
        "ranked_item_indices": lists,
    }
    return pa.table({**columns, **{name: pa.array(values) for name, values in per_user.items()}})


def run(
    config: EvaluateConfig,
    workspace: Workspace,
    *,
    run_name: str,
    load: Callable[..., Recommender],
    run_on_workers: Callable[..., dict[str, Any]],
    num_workers: int = 1,
) -> Manifest:
    """Evaluate one trained run, or return at once when it is already done.

    Args:
        config: the `[evaluate]` table.
        workspace: with complete prepare and `train/<run_name>` stages.
        run_name: which training run.
        load: `load(fs, path, *, group) -> Recommender`, importable by name (it travels to the workers).
        run_on_workers: `run_on_workers(fn, payload=...)` runs `fn(payload, group)` on every worker and returns rank 0's
            dict.
        num_workers: told to the log only; numbers do not depend on it.

    Raises:
        WorkspaceError: an earlier stage is missing, or the run was trained on another prepared data set.
    """
    prepare = workspace.stage("prepare").require()
    train = workspace.stage(f"train/{run_name}").require()
    check_same_data(prepare, train, run_name)
    inputs = {"prepare": prepare.identity, "train": train.identity}
    stage = f"evaluate/{run_name}"
    stage_run = workspace.stage(stage).open(StageKey(stage, inputs, config.result_fields()))
    if stage_run.manifest is not None:
        return stage_run.manifest
    logger.info("evaluate %s on %s users, %d worker(s)", run_name, config.split, num_workers)
    started = time.monotonic()
    payload = {
        "workspace": workspace.absolute_url,
        "model": workspace.stage(f"train/{run_name}").path("model"),
        "out": stage_run.path(PER_USER),
        "config": config.model_dump(mode="json"),
    }
    result = run_on_workers(EvaluateWorker(load), payload=payload)
    content = _report(config, stage_run, prepare, train, run_name, result, time.monotonic() - started)
    manifest = stage_run.commit(
        rows={"per_user": int(result["num_users"])},
        stats={"metrics": content["metrics"], "skipped_users": content["skipped_users"]},
        top_files=_top_files(content, workspace, run_name),
    )
    logger.info(
        "evaluate %s: done in %.1f s, see %s/%s/report.md", run_name, content["seconds"], workspace.url, stage
    )
    return manifest


def check_same_data(prepare: Manifest, train: Manifest, run_name: str) -> None:
    """Refuse a model whose item indices belong to another prepared data set.

    Raises:
        WorkspaceError: says which command trains again.
    """
    if train.inputs.get("prepare") != prepare.identity:
        raise WorkspaceError(
            f"run {run_name} was trained on other data than the workspace now holds (prepare has run again since): "
            "run `distributed-mi train CONFIG` first"
        )


def _report(
    config: EvaluateConfig,
    stage_run: StageRun,
    prepare: Manifest,
    train: Manifest,
    run_name: str,
    result: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    table = stage_run.read_table(PER_USER, "per_user", columns=None)
    per_user = {m: table[m].to_numpy() for m in config.metrics if m in table.column_names}
    return report.build(
        run=run_name,
        model=_model_name(train),
        protocol=protocol.describe(prepare, exclude_seen=config.exclude_seen),
        config=config.result_fields(),
        result=result,
        intervals=scoring.intervals(per_user, config.bootstrap_samples, config.bootstrap_seed),
        leakage=prepare.stats.get("leakage", {}),
        checkpoint=report.checkpoint_facts(train),
        seconds=seconds,
    )


def _model_name(train: Manifest) -> str:
    model = train.config.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    if not name:
        raise WorkspaceError(
            f"the manifest of {train.stage} does not name its model: run `distributed-mi train CONFIG`"
        )
    return str(name)


def _top_files(content: Mapping[str, Any], workspace: Workspace, run_name: str) -> dict[str, bytes]:
    pictures = plots.draw_all(content, workspace, run_name)
    return {
        "report.json": report.to_json(content),
        "report.md": report.to_markdown(content, sorted(pictures)).encode(),
        **pictures,
    }
