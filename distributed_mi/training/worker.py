"""What one training worker runs, in a Ray Train worker or alone in the calling process."""

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import torch

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import ConfigError, InputError
from distributed_mi.core.progress import track
from distributed_mi.core.seeding import stream_key
from distributed_mi.data.batches import EveryPositionSampler, Sampler, Sequences, TrainSampler
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.placement import expected_load, make_placement
from distributed_mi.losses.negatives import NegativeSampler
from distributed_mi.training.batching import StepBatches
from distributed_mi.training.checkpoint import CheckpointStore, ModelSpec
from distributed_mi.training.config import TrainConfig
from distributed_mi.training.engine import build_engine
from distributed_mi.training.follow import FileBar, FileFlag
from distributed_mi.training.loop import ProgressBar, Run, Trainer, TrainState, ValidateFn, read_metrics
from distributed_mi.training.semantics import Semantics

logger = logging.getLogger(__name__)

SEQUENCES_FOLDER = "sequences"
"""Folder of a run for mapped training sequences; removed when the run is done."""
PAUSED = "paused"
"""Key of the result of work that ended early, to be started again with more workers, because the file `payload["room"]`
is there."""


@dataclass(frozen=True)
class TrainWorker:
    """The work of one run; called on every worker with the group of all.

    Args:
        config: the run.
        validate: metrics on validation users.
    """

    config: TrainConfig
    validate: ValidateFn

    def __call__(self, payload: dict[str, Any], group: WorkerGroup) -> dict[str, Any]:
        """Train to the end, export the best checkpoint.

        Args:
            payload: `workspace` and `generation`, where to read and write; `progress`, a file for the driver's bar;
                `room`, a file that the driver makes when more workers could be had.
            group: the workers.

        Returns:
            Facts for the stage's manifest; or `PAUSED` and the step, when training is to go on with more workers.
        """
        workspace, root = Workspace(payload["workspace"]), payload["generation"]
        config = self.config
        with _progress(config, payload, group) as bar:
            run = assemble(config, workspace, root, group, self.validate, bar)
            if "room" in payload:
                run = replace(run, wants_pause=FileFlag(payload["room"]))
            trainer = Trainer(config, run, fs=workspace.fs, metrics_path=f"{root}/metrics.jsonl")
            state = trainer.train()
        if trainer.paused:
            return {PAUSED: state.step}
        run.store.export(state.best_step, f"{root}/model", run.table)
        _remove_sequences(workspace, root, group)
        lines = read_metrics(workspace.fs, f"{root}/metrics.jsonl")
        return _stats(config, run, state, lines)


def _remove_sequences(workspace: Workspace, root: str, group: WorkerGroup) -> None:
    """Mapped files of the sequences; who still has them open keeps them until it ends."""
    folder = f"{root}/{SEQUENCES_FOLDER}"
    if group.rank == 0 and workspace.fs.get_file_info(folder).type == pafs.FileType.Directory:
        workspace.fs.delete_dir(folder)


class _Silent:
    def advance(self, count: int = 1, note: str = "") -> None:
        """Count nothing: only worker 0 shows progress."""


def _progress(
    config: TrainConfig, payload: dict[str, Any], group: WorkerGroup
) -> AbstractContextManager[ProgressBar]:
    if group.rank != 0:
        return nullcontext(_Silent())
    if "progress" in payload:
        return nullcontext(FileBar(payload["progress"]))
    return track(f"train {config.run_name}", config.max_steps, "steps")


def assemble(
    config: TrainConfig,
    workspace: Workspace,
    root: str,
    group: WorkerGroup,
    validate: ValidateFn,
    bar: ProgressBar,
) -> Run:
    """Read the data and build the parts of a run, with their first values; all workers call it."""
    counts_V = train_events(workspace)
    num_rows = len(counts_V)
    sequences = read_sequences(workspace, root, group)
    sequences.check_items(num_rows, group.rank, group.size)
    owner = config.model.resolve()
    semantics = None
    if owner.requires_semantics:
        semantics = Semantics.read(workspace, num_rows=num_rows, user_index_U=sequences.user_index_U)
    spec = model_spec(config, num_rows, semantics.text_dim if semantics else 0)
    table = spec.build_table(
        group,
        seed=config.seed,
        std=config.table.init_std,
        **sharding(config, counts_V, group.size),
    )
    model = spec.build_model(table, seed=stream_key(config.seed, "model") % (1 << 63)).to(group.device)
    if config.negatives.log_q and not model.reads_log_q:
        raise ConfigError(
            f"train.negatives.log_q: the loss of {config.model.name} has no scores to correct; set it to false"
        )
    engine = build_engine(model, config.engine, learning_rate=config.learning_rate, group=group)
    batches = StepBatches(
        _sampler(config, sequences, group),
        NegativeSampler(config.negatives, num_rows=num_rows, seed=config.seed, num_train_events_V=counts_V),
        group,
        semantics=semantics,
        catalogue_text=model.reads_catalogue_text,
        parts=config.engine.accumulation,
    )
    store = CheckpointStore(workspace.fs, f"{root}/checkpoints", group, background=config.checkpoint_async)
    return Run(model, spec, table, engine, group, batches, validate, store, bar)


def read_sequences(workspace: Workspace, root: str, group: WorkerGroup) -> Sequences:
    """The training split: mapped files in a local workspace, in memory from an object store. Collective.

    Args:
        workspace: with prepare complete.
        root: folder of the run, where worker 0 puts the files.
        group: the workers.
    """
    if not workspace.is_local:
        return Sequences.read(workspace, "train")
    folder = f"{root}/{SEQUENCES_FOLDER}"
    if group.rank == 0:
        Sequences.map(workspace, "train", folder)
    group.barrier()
    return Sequences.map(workspace, "train", folder, convert=False)


def _sampler(config: TrainConfig, sequences: Sequences, group: WorkerGroup) -> Sampler:
    every = config.model.resolve().target_rule == "every_position"
    sampler = (EveryPositionSampler if every else TrainSampler)(
        sequences,
        num_users_per_step=config.num_users_per_step,
        max_history=config.max_history,
        min_position=config.min_position,
        seed=config.seed,
    )
    needed = group.size * config.engine.accumulation
    if sampler.num_users < needed:
        raise ConfigError(
            f"train: the {sampler.num_users} users of a step cannot be shared by {group.size} workers in "
            f"{config.engine.accumulation} parts each; a step needs at least {needed}"
        )
    return sampler


def sharding(config: TrainConfig, counts_V: np.ndarray, num_workers: int) -> dict[str, Any]:
    """How the table lies on the workers, as `ModelSpec.build_table` takes it."""
    load_V = None
    if config.table.placement == "ranges":
        ids_per_worker = config.num_users_per_step * config.max_history // num_workers
        load_V = expected_load(counts_V, ids_per_worker) + config.negatives.num_negatives / len(counts_V)
    return {
        "placement": make_placement(config.table.placement, len(counts_V), num_workers, load_V),
        "replicated_rows": config.table.replicated_rows,
        "exchange_dtype": torch.bfloat16 if config.table.exchange == "bf16" else torch.float32,
    }


def model_spec(config: TrainConfig, num_rows: int, text_dim: int) -> ModelSpec:
    """What a checkpoint says about its model."""
    optimizer = config.table.model_dump(mode="json", include=set(TableOptimizerConfig.model_fields))
    settings = config.model.settings("train.model").model_dump(mode="json")
    return ModelSpec(
        config.model.name, settings, config.dim, num_rows, config.max_history, text_dim, optimizer
    )


def train_events(workspace: Workspace) -> np.ndarray:
    """Events in training of every item, `[V]` int64; position 0 is padding.

    Raises:
        InputError: the catalogue is empty or its item indices are not 1 .. V - 1.
    """
    columns = ["item_index", "num_train_events"]
    table = workspace.stage("prepare").read("catalogue", "catalogue", columns=columns)
    ids = table.column("item_index").to_numpy()
    if not len(ids) or not np.array_equal(np.sort(ids), np.arange(1, len(ids) + 1)):
        raise InputError("train: the catalogue's item_index must be 1, 2, ... without a gap; prepare again")
    counts_V = np.zeros(len(ids) + 1, np.int64)
    counts_V[ids] = table.column("num_train_events").to_numpy()
    return counts_V


def fit_counts(config: TrainConfig, workspace: Workspace, root: str, validate: ValidateFn) -> dict[str, Any]:
    """Fit a model without a loss in this process and export it."""
    group = WorkerGroup.alone()
    counts_V = train_events(workspace)
    spec = model_spec(config, len(counts_V), 0)
    table = spec.build_table(group, seed=config.seed, trainable=False)
    model = spec.build_model(table, seed=config.seed)
    model.fit_counts(torch.from_numpy(counts_V))
    metrics = validate(model.eval(), group)
    state = TrainState(
        best_metrics=metrics, best_metric=metrics.get(config.validation_metric), stop_reason="counted"
    )
    store = CheckpointStore(workspace.fs, f"{root}/checkpoints", group)
    store.export_model(f"{root}/model", spec, model, table, asdict(state))
    return {
        "step": 0,
        "best_step": 0,
        "best_value": state.best_metric,
        "validation_metric": config.validation_metric,
        "validation": metrics,
        "stopped": state.stop_reason,
        "table_rows": spec.num_rows,
        "dense_parameters": 0,
    }


def _stats(config: TrainConfig, run: Run, state: TrainState, lines: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    users = state.step * run.batches.num_users
    rates = [line["users_per_s"] for line in lines if line["kind"] == "train"]
    return {
        "step": state.best_step,
        "best_step": state.best_step,
        "best_value": state.best_metric,
        "validation_metric": config.validation_metric,
        "validation": state.best_metrics,
        "validations": sum(line["kind"] == "validation" for line in lines),
        "steps": state.step,
        "stopped": state.stop_reason,
        "train_seconds": round(state.train_seconds, 3),
        "users_per_s": round(users / max(state.train_seconds, 1e-9), 1),
        "users_per_s_median": float(np.median(rates)) if rates else None,
        "step_ms": round(1000 * state.train_seconds / max(state.step, 1), 3),
        "num_workers": run.group.size,
        "engine": type(run.engine).__name__,
        "table_rows": run.spec.num_rows,
        "dense_parameters": run.engine.num_parameters,
        "loss": _loss_summary(losses),
    }


def _loss_summary(losses: list[tuple[int, float]], points: int = 50) -> dict[str, Any]:
    """First, last and lowest loss, and at most `points` of the curve; all of it stands in `metrics.jsonl`."""
    if not losses:
        return {}
    stride = math.ceil(len(losses) / points)
    lowest = min(losses, key=lambda x: x[1])
    curve = [[step, round(loss, 6)] for step, loss in losses[::stride]]
    return {"first": losses[0][1], "last": losses[-1][1], "lowest": list(lowest), "curve": curve}
