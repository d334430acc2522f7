"""A small catalogue with structure, batches that are a function of the step, and a run on them without stages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from distributed_mi.core.seeding import stream
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.models.base import HistoryBatch, TrainBatch
from distributed_mi.training.batching import cut_into_parts
from distributed_mi.training.checkpoint import CheckpointStore, ModelSpec
from distributed_mi.training.config import TrainConfig
from distributed_mi.training.engine import build_engine
from distributed_mi.training.loop import Run, Trainer

NUM_ROWS, HISTORY, USERS, NEGATIVES = 41, 5, 8, 12


@dataclass
class ToyBatches:
    """Users that stay within one of four blocks of ten items."""

    group: WorkerGroup
    parts: int = 1
    num_users: int = USERS

    def __call__(self, step: int) -> list[TrainBatch]:
        generator = stream(5, "toy", step)
        block_U = generator.integers(0, 4, size=(USERS, 1))
        items = torch.from_numpy(1 + 10 * block_U + generator.integers(0, 10, size=(USERS, HISTORY + 1)))
        items[::2, 0] = 0  # some histories are shorter
        negatives = torch.from_numpy(generator.integers(1, NUM_ROWS, size=NEGATIVES))
        out = []
        for first, last, offset in cut_into_parts(USERS, self.group.rank, self.group.size, self.parts):
            ids = items[first:last]
            history = HistoryBatch(ids[:, :HISTORY], ids[:, :HISTORY] > 0)
            out.append(
                TrainBatch(
                    history,
                    ids[:, HISTORY],
                    negatives,
                    gather=self.group.gather_with_grad,
                    gather_offset=offset,
                )
            )
        return out


class Bar:
    """Counts steps."""

    def __init__(self) -> None:
        self.done, self.notes = 0, []

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.notes.append(note)


def config(**values: Any) -> TrainConfig:
    """A small configuration."""
    tree: dict[str, Any] = {
        "model": {"name": "remi", "num_interests": 2, "rr_weight": 1.0},
        "dim": 8,
        "max_history": HISTORY,
        "num_users_per_step": USERS,
        "max_steps": 12,
        "validate_every": 4,
        "checkpoint_every": 4,
        "log_every": 1,
        "learning_rate": 1e-2,
    }
    return TrainConfig.model_validate(tree | values)


def spec_of(cfg: TrainConfig) -> ModelSpec:
    """The specification that the worker would make."""
    settings = cfg.model.settings().model_dump(mode="json")
    table = cfg.table.model_dump(include={"name", "lazy", "beta1", "beta2", "eps", "initial_accumulator"})
    return ModelSpec(cfg.model.name, settings, cfg.dim, NUM_ROWS, cfg.max_history, 0, table)


def build(
    cfg: TrainConfig, folder: Path, validate: Any = None, group: WorkerGroup | None = None
) -> tuple[Trainer, Run]:
    """A trainer on the toy batches."""
    group = group or WorkerGroup.alone()
    spec = spec_of(cfg)
    table = spec.build_table(group, seed=cfg.seed)
    model = spec.build_model(table, seed=cfg.seed)
    engine = build_engine(model, cfg.engine, learning_rate=cfg.learning_rate, group=group)
    fs = pafs.LocalFileSystem()
    run = Run(
        model=model,
        spec=spec,
        table=table,
        engine=engine,
        group=group,
        batches=ToyBatches(group, cfg.engine.accumulation),
        validate=validate or loss_score,
        store=CheckpointStore(fs, str(folder / "checkpoints"), group),
        bar=Bar(),
    )
    return Trainer(cfg, run, fs=fs, metrics_path=str(folder / "metrics.jsonl")), run


def loss_score(model: Any, group: WorkerGroup) -> dict[str, float]:
    """Minus the loss of a fixed step: higher is better, and it depends on every value of the model."""
    source = ToyBatches(group)
    total = sum(model(batch).total(USERS) for batch in source(10_000))
    return {"recall@50": -float(group.all_reduce_sum(total.reshape(1)))}
