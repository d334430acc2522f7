"""A workspace made by hand and a small model with planted interests, for the tests of evaluation and serving."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distributed_mi.core.artifacts import Manifest, StageKey, Workspace, write_bytes
from distributed_mi.core.config import ConfigModel
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.sharded import ShardedItemTable
from distributed_mi.embeddings.table import ItemTable, LocalItemTable
from distributed_mi.models.base import HistoryBatch, Recommender, UserState

NUM_ITEMS, DIM, MAX_HISTORY, TEXT_DIM = 30, 8, 6, 4
LEAKAGE = {"passed": True, "text": "Leakage check passed for by-user: 0 of 20 label events."}


class TwoInterests(Recommender):
    """Interest k is the mean of the history items whose index has parity k; absent ones read the whole history."""

    class Config(ConfigModel):
        """Nothing to choose."""

    def __init__(self, *, items: ItemTable, with_attention: bool = True) -> None:
        super().__init__(self.Config(), items=items, max_history=MAX_HISTORY)
        self.with_attention = with_attention

    @property
    def num_interests(self) -> int:
        return 2

    def encode_rows(self, history: HistoryBatch, history_rows_BLD: Tensor) -> UserState:
        parity_B1L = (history.item_ids_BL % 2)[:, None, :]
        wanted_BKL = (parity_B1L == torch.arange(2)[None, :, None]) & history.mask_BL[:, None, :]
        absent_BK1 = ~wanted_BKL.any(dim=2, keepdim=True)
        weights_BKL = torch.where(absent_BK1, history.mask_BL[:, None, :], wanted_BKL).float()
        weights_BKL = weights_BKL / weights_BKL.sum(dim=2, keepdim=True)
        return UserState(weights_BKL @ history_rows_BLD, weights_BKL if self.with_attention else None)


def make_table(seed: int = 3, num_items: int = NUM_ITEMS) -> LocalItemTable:
    return LocalItemTable(num_items + 1, DIM, seed=seed, std=1.0)


def load(fs: Any, path: str, *, group: WorkerGroup | None = None) -> Recommender:
    """Stands in for `training.checkpoint.load_model`; a file of the folder says which table to make."""
    with fs.open_input_stream(f"{path}/seed.json") as stream:
        seed = json.loads(stream.read())
    if group is None or group.size == 1:
        return TwoInterests(items=make_table(seed)).eval()
    return TwoInterests(items=ShardedItemTable(NUM_ITEMS + 1, DIM, group=group, seed=seed, std=1.0)).eval()


def in_this_process(fn: Any, payload: dict[str, Any]) -> dict[str, Any]:
    """Stands in for `training.launcher.run_on_workers`."""
    return fn(payload, WorkerGroup.alone())


def commit(
    workspace: Workspace,
    stage: str,
    tables: dict[str, tuple[str, pa.Table]],
    *,
    files: dict[str, bytes] | None = None,
    **kwargs: Any,
) -> Manifest:
    """Write tables (folder -> (schema, table)) and files as a complete stage."""
    inputs = kwargs.pop("inputs", {})
    run = workspace.stage(stage).open(StageKey(stage, inputs, kwargs.pop("config", {})))
    for folder, (name, table) in tables.items():
        run.write_table(f"{folder}/part-0.parquet", table, name)
    for name, data in (files or {}).items():
        write_bytes(run.fs, run.path(name), data)
    return run.commit(rows={folder: t.num_rows for folder, (_, t) in tables.items()}, **kwargs)


def sequences(first_user: int, histories: list[tuple[list[int], int]], prefix: str) -> pa.Table:
    """`sequences` of (items, num_history) pairs."""
    return pa.table(
        {
            "user_index": pa.array(range(first_user, first_user + len(histories)), pa.int64()),
            "user_id": [f"{prefix}{i}" for i in range(len(histories))],
            "item_indices": pa.array([items for items, _ in histories], pa.list_(pa.int64())),
            "timestamps": pa.array([list(range(len(items))) for items, _ in histories], pa.list_(pa.int64())),
            "num_history": pa.array([n for _, n in histories], pa.int64()),
        }
    )


def random_histories(seed: int, count: int) -> list[tuple[list[int], int]]:
    generator = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        length = int(generator.integers(5, 12))
        out.append((generator.integers(1, NUM_ITEMS + 1, size=length).tolist(), int(0.8 * length)))
    return out


def catalogue() -> pa.Table:
    index = np.arange(1, NUM_ITEMS + 1)
    return pa.table(
        {
            "item_index": index,
            "item_id": [f"item-{i}" for i in index],
            "title": [f"Title {i}" for i in index],
            "brand": [""] * NUM_ITEMS,
            "categories": [["Toys", f"Kind {i % 4}"] for i in index],
            "num_events": NUM_ITEMS - index + 1,
            "num_train_events": np.where(index == 7, 99, NUM_ITEMS - index),
        }
    )


def prepare(workspace: Workspace, *, test_users: int = 25, split: str = "by-user") -> Manifest:
    train = [(items, len(items)) for items, _ in random_histories(1, 12)]
    tables = {
        "catalogue": ("catalogue", catalogue()),
        "sequences/train": ("sequences", sequences(0, train, "train-")),
        "sequences/validation": ("sequences", sequences(12, random_histories(2, 9), "valid-")),
        "sequences/test": (
            "sequences",
            sequences(21, [*random_histories(4, test_users), ([5], 0), ([6, 7], 2)], "test-"),
        ),
    }
    config = {
        "split": {"name": split, "train_fraction": 0.8, "validation_fraction": 0.1, "history_fraction": 0.8}
    }
    stats = {"leakage": LEAKAGE, "split": split}
    return commit(workspace, "prepare", tables, config=config, stats=stats)


def train(workspace: Workspace, run: str = "two", *, seed: int = 3) -> Manifest:
    identity = workspace.stage("prepare").require().identity
    lines = [{"kind": "train", "step": 10 * i, "loss": 5.0 / i} for i in range(1, 9)]
    lines += [{"kind": "validation", "step": 20 * i, "metrics": {"recall@50": 0.02 * i}} for i in range(1, 5)]
    return commit(
        workspace,
        f"train/{run}",
        {},
        files={
            "model/seed.json": json.dumps(seed).encode(),
            "metrics.jsonl": "\n".join(json.dumps(x) for x in lines).encode(),
        },
        inputs={"prepare": identity},
        config={"model": {"name": "two_interests"}, "seed": seed},
        stats={"best_step": 80},
    )


def text_vector(item_index: int) -> np.ndarray:
    """Odd items point along the first axis, even items along the second, with a little of their own."""
    vector = np.zeros(TEXT_DIM, dtype=np.float32)
    vector[0 if item_index % 2 else 1] = 1.0
    vector[2] = 0.01 * item_index
    return vector


def language(workspace: Workspace) -> None:
    """embed, exemplars and interests: exemplars are training users 2 (even items) and 5 (both kinds of items)."""
    identity = {"prepare": workspace.stage("prepare").require().identity}
    vectors = [text_vector(i).tolist() for i in range(1, NUM_ITEMS + 1)]
    items = pa.table(
        {
            "item_index": range(1, NUM_ITEMS + 1),
            "vector": pa.array(vectors, pa.list_(pa.float32())),
            "has_text": [True] * NUM_ITEMS,
        }
    )
    both = (0.5 * (text_vector(1) + text_vector(2))).tolist()
    users = pa.table(
        {
            "user_index": range(12),
            "vector": pa.array(
                [text_vector(2).tolist() if u == 2 else both for u in range(12)], pa.list_(pa.float32())
            ),
        }
    )
    tables = {"item_vectors": ("item_vectors", items), "user_vectors": ("user_vectors", users)}
    embed = commit(workspace, "embed", tables, inputs=identity)
    identity |= {"embed": embed.identity}
    exemplars = pa.table(
        {"cluster": [0, 1], "user_index": [2, 5], "user_id": ["train-2", "train-5"], "num_users": [1, 11]}
    )
    assignment = pa.table(
        {
            "user_index": range(12),
            "cluster": [0 if u == 2 else 1 for u in range(12)],
            "exemplar_user_index": [2 if u == 2 else 5 for u in range(12)],
            "similarity": pa.array([0.0] * 12, pa.float32()),
        }
    )
    tables = {"exemplars": ("exemplars", exemplars), "assignment": ("assignment", assignment)}
    identity |= {"exemplars": commit(workspace, "exemplars", tables, inputs=identity).identity}
    rows = [
        (2, 0, "even things", [2, 4], 2),
        (5, 0, "odd things", [1, 3], 1),
        (5, 1, "even things [bold]", [6], 6),
    ]
    answers = pa.table(
        {
            "user_index": [2, 5],
            "prompt_hash": ["a" * 64, "b" * 64],
            "prompt": ["prompt of 2", "prompt of 5"],
            "answer": [
                json.dumps({"interests": [{"text": t} for u, _, t, *_ in rows if u == x]}) for x in (2, 5)
            ],
            "backend": ["keyphrase"] * 2,
            "model": [""] * 2,
            "step": ["keyphrase"] * 2,
            "num_prompt_tokens": [0, 0],
            "num_answer_tokens": [0, 0],
            "seconds": [0.0, 0.0],
        }
    )
    interests = pa.table(
        {
            "user_index": [r[0] for r in rows],
            "interest_index": [r[1] for r in rows],
            "text": [r[2] for r in rows],
            "item_indices": [r[3] for r in rows],
        }
    )
    interest_vectors = interests.select(["user_index", "interest_index"]).append_column(
        "vector", pa.array([text_vector(r[4]).tolist() for r in rows], pa.list_(pa.float32()))
    )
    tables = {
        "answers": ("answers", answers),
        "interests": ("interests", interests),
        "interest_vectors": ("interest_vectors", interest_vectors),
    }
    commit(workspace, "interests", tables, inputs=identity)
