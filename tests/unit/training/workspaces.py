"""Workspaces written by hand: what prepare, embed, exemplars and interests leave, small and with planted structure."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distributed_mi.core.artifacts import StageKey, Workspace
from distributed_mi.core.schema import TABLES
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.models.base import HistoryBatch, Recommender
from distributed_mi.training.config import TrainConfig

NUM_ITEMS, NUM_USERS, NUM_VALIDATION, TEXT_DIM = 60, 80, 24, 6


LEAKAGE = {"passed": True, "text": "Leakage check passed for by-user: 0 of 99 label events are trained on."}


def _commit(workspace: Workspace, stage: str, tables: dict[str, tuple[str, pa.Table]], **stats: Any) -> None:
    run = workspace.stage(stage).open(StageKey(stage, {}, {"made": "by hand"}))
    for folder, (name, table) in tables.items():
        run.write_table(f"{folder}/part-0.parquet", table, name)
    run.commit(rows={folder: table.num_rows for folder, (_, table) in tables.items()}, stats=stats)


def _sequences(rng: np.random.Generator, first: int, count: int, history_share: float) -> pa.Table:
    """Users of one of six topics of ten items, nine events of ten inside their topic."""
    items = []
    for _ in range(count):
        topic = rng.integers(0, 6)
        inside = rng.integers(1, 11, size=rng.integers(6, 13)) + 10 * topic
        outside = rng.integers(1, NUM_ITEMS + 1, size=len(inside))
        items.append(np.where(rng.random(len(inside)) < 0.9, inside, outside).tolist())
    return pa.table(
        {
            "user_index": np.arange(first, first + count),
            "user_id": [f"u{i}" for i in range(first, first + count)],
            "item_indices": pa.array(items, pa.list_(pa.int64())),
            "timestamps": pa.array([list(range(len(x))) for x in items], pa.list_(pa.int64())),
            "num_history": [max(1, int(history_share * len(x))) for x in items],
        },
        schema=TABLES["sequences"],
    )


def make_prepared(root: Path, leakage: dict[str, Any] | None = LEAKAGE) -> Workspace:
    """A workspace with a complete prepare stage."""
    rng = np.random.default_rng(3)
    train = _sequences(rng, 0, NUM_USERS, 1.0)
    validation = _sequences(rng, NUM_USERS, NUM_VALIDATION, 0.8)
    counts = np.bincount(train.column("item_indices").combine_chunks().flatten(), minlength=NUM_ITEMS + 1)[1:]
    catalogue = pa.table(
        {
            "item_index": np.arange(1, NUM_ITEMS + 1),
            "item_id": [f"i{i}" for i in range(1, NUM_ITEMS + 1)],
            "title": [f"item {i}" for i in range(1, NUM_ITEMS + 1)],
            "brand": [""] * NUM_ITEMS,
            "categories": pa.array([[f"topic {i // 10}"] for i in range(NUM_ITEMS)], pa.list_(pa.string())),
            "num_events": counts,
            "num_train_events": counts,
        },
        schema=TABLES["catalogue"],
    )
    workspace = Workspace(str(root))
    tables = {
        "catalogue": ("catalogue", catalogue),
        "sequences/train": ("sequences", train),
        "sequences/validation": ("sequences", validation),
    }
    _commit(workspace, "prepare", tables, **({"leakage": leakage} if leakage else {}))
    return workspace


def add_semantics(workspace: Workspace) -> None:
    """Complete embed, exemplars and interests: exemplars are users 0 and 1, with one and two interests.

    Item 60 has no text: its vector is that of its id.
    """
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(NUM_ITEMS, TEXT_DIM)).astype(np.float32)
    indices = np.arange(1, NUM_ITEMS + 1)
    items = pa.table(
        {"item_index": indices, "vector": vectors.tolist(), "has_text": indices < NUM_ITEMS},
        schema=TABLES["item_vectors"],
    )
    _commit(workspace, "embed", {"item_vectors": ("item_vectors", items)})
    exemplar = np.arange(NUM_USERS) % 2
    assignment = pa.table(
        {
            "user_index": np.arange(NUM_USERS),
            "cluster": exemplar,
            "exemplar_user_index": exemplar,
            "similarity": np.zeros(NUM_USERS, np.float32),
        },
        schema=TABLES["assignment"],
    )
    _commit(workspace, "exemplars", {"assignment": ("assignment", assignment)})
    interests = pa.table(
        {
            "user_index": [1, 0, 1],
            "interest_index": [1, 0, 0],
            "vector": [[3.0] * TEXT_DIM, [1.0] * TEXT_DIM, [2.0] * TEXT_DIM],
        },
        schema=TABLES["interest_vectors"],
    )
    _commit(workspace, "interests", {"interest_vectors": ("interest_vectors", interests)})


class HitsOfLastItem:
    """A validation without the evaluation package: is the last item of a user among the top of the items before it?

    Picklable by name. Every worker ranks all users, so the numbers are the same everywhere.
    """

    def __init__(self, workspace: Workspace, max_history: int, k: int = 10) -> None:
        table = workspace.stage("prepare").read("sequences/validation", "sequences")
        items = table.column("item_indices").to_pylist()
        rows = np.zeros((len(items), max_history), np.int64)
        for row, sequence in enumerate(items):
            seen = sequence[:-1][-max_history:]
            rows[row, max_history - len(seen) :] = seen
        self.rows, self.targets, self.k = rows.tolist(), [x[-1] for x in items], k

    def __call__(self, model: Recommender, group: WorkerGroup) -> dict[str, float]:
        import torch

        ids = torch.tensor(self.rows)
        state = model.encode(HistoryBatch(ids, ids > 0))
        found = model.items.topk(state.interests_BKD, self.k).ids_Bk.tolist()
        hits = sum(target in items for target, items in zip(self.targets, found, strict=True))
        return {"recall@50": hits / len(found)}


def tiny_config(**values: Any) -> TrainConfig:
    """A configuration that trains in about a second."""
    tree: dict[str, Any] = {
        "model": {"name": "remi", "num_interests": 2},
        "dim": 16,
        "max_history": 8,
        "num_users_per_step": 16,
        "negatives": {"num_negatives": 24},
        "max_steps": 60,
        "validate_every": 20,
        "checkpoint_every": 10,
        "log_every": 1,
        "learning_rate": 1e-2,
    }
    return TrainConfig.model_validate(tree | values)
