"""Workspaces with planted topics, complete up to the stage interests, for the tests of its evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distributed_mi.core import schema
from distributed_mi.core.artifacts import StageKey, StageRun, Workspace
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.stage import run
from tests.unit.interests.fakes import no_ray

TOPICS = {
    "Music": ["jazz", "trumpet", "album", "ballad", "quartet", "swing"],
    "Kitchen": ["garlic", "steel", "pan", "grater", "knife", "whisk"],
    "Garden": ["rose", "spade", "seeds", "hedge", "pond", "compost"],
    "Space": ["rocket", "moon", "orbit", "comet", "galaxy", "probe"],
}
PER_TOPIC = 25
NUM_ITEMS = PER_TOPIC * len(TOPICS)
NAMELESS = 5
"""Item without title, of which only the id is known."""
VOCABULARY = {w: i for i, w in enumerate([w for t, words in TOPICS.items() for w in (t.lower(), *words)])}
SPLITS = ("train", "validation", "test")


def encode(texts: Sequence[str]) -> np.ndarray:
    """Counts of known words, and a constant so that no vector is zero."""
    out = np.zeros((len(texts), len(VOCABULARY) + 1), dtype=np.float32)
    out[:, -1] = 0.1
    for row, text in enumerate(texts):
        for word in text.lower().replace(",", " ").replace(":", " ").split():
            if word in VOCABULARY:
                out[row, VOCABULARY[word]] += 1
    return out


def catalogue() -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    items = []
    for index in range(1, NUM_ITEMS + 1):
        topic, words = list(TOPICS.items())[(index - 1) // PER_TOPIC]
        title = " ".join(rng.choice(words, 2, replace=False))
        items.append(
            {
                "item_index": index,
                "item_id": f"B{index:03d}",
                "title": None if index == NAMELESS else title,
                "brand": None,
                "categories": [topic],
                "num_events": 9,
                "num_train_events": 9,
            }
        )
    return items


def events_of(user: int, length: int) -> list[int]:
    """Items of the user's own topic, with one of another now and then."""
    rng = np.random.default_rng([2, user])
    topic = rng.integers(len(TOPICS))
    topics = np.where(rng.random(length) < 0.95, topic, rng.integers(len(TOPICS), size=length))
    return (topics * PER_TOPIC + rng.integers(PER_TOPIC, size=length) + 1).tolist()


def split_rows(split: str, num_users: int, length: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the three tables, as prepare cuts them."""
    rows: dict[str, list[dict[str, Any]]] = {s: [] for s in SPLITS}

    def add(name: str, user: int, events: Sequence[int], num_history: int) -> None:
        rows[name].append(
            {
                "user_index": user,
                "user_id": f"U{user:03d}",
                "item_indices": list(events),
                "timestamps": list(range(len(events))),
                "num_history": num_history,
            }
        )

    for user in range(num_users):
        events = events_of(user, length)
        if split == "by-user":
            name = "train" if user < 0.8 * num_users else "validation" if user < 0.9 * num_users else "test"
            add(name, user, events, length if name == "train" else int(0.8 * length))
        elif split == "leave-one-out":
            add("train", user, events[:-2], length - 2)
            add("validation", user, events[:-1], length - 2)
            add("test", user, events, length - 1)
        elif user >= 0.9 * num_users:  # global-temporal: users who came between the two cuts
            add("validation", user, events[:-3], 0)
            add("test", user, events, length - 3)
        else:  # every third has nothing between the cuts, every second nothing after
            later, last = 0 if user % 3 == 0 else 4, 0 if user % 2 == 0 else 3
            train = events[: length - later - last]
            add("train", user, train, len(train))
            if later:
                add("validation", user, events[: len(train) + later], len(train))
            if last:
                add("test", user, events, len(train) + later)
    return rows


def make(
    path: Path,
    split: str = "by-user",
    *,
    num_users: int = 80,
    length: int = 15,
    one_in: int = 4,
    user_vectors: str = "mean",
    interests: InterestsConfig | None = None,
) -> Workspace:
    """A workspace in which every `one_in`-th training user is an exemplar and the stage interests has run."""
    workspace = Workspace(str(path))
    rows = split_rows(split, num_users, length)
    items = catalogue()
    key = {"split": {"name": split}, "users": num_users, "length": length}
    prepare = workspace.stage("prepare").open(StageKey("prepare", {}, key))
    write(prepare, "catalogue", "catalogue", items)
    for name in SPLITS:
        write(prepare, f"sequences/{name}", "sequences", rows[name])
    inputs = {"prepare": prepare.commit(rows={"items": NUM_ITEMS}).identity}
    items_VT = encode([i["title"] or "" for i in items])
    train = {r["user_index"]: r for r in rows["train"]}
    users_UT = np.stack([items_VT[np.array(r["item_indices"]) - 1].mean(axis=0) for r in train.values()])
    config = {"user_vectors": user_vectors, "item_fields": ["title"]}
    embed = workspace.stage("embed").open(StageKey("embed", inputs, config))
    write(
        embed,
        "item_vectors",
        "item_vectors",
        [
            {"item_index": i["item_index"], "vector": v, "has_text": i["title"] is not None}
            for i, v in zip(items, items_VT.tolist(), strict=True)
        ],
    )
    user_rows = [{"user_index": u, "vector": v} for u, v in zip(train, users_UT.tolist(), strict=True)]
    write(embed, "user_vectors", "user_vectors", user_rows)
    inputs["embed"] = embed.commit(rows={}).identity
    exemplars = workspace.stage("exemplars").open(StageKey("exemplars", inputs, {"one_in": one_in}))
    chosen = list(train)[::one_in]
    distances = ((users_UT[:, None] - users_UT[::one_in][None]) ** 2).sum(axis=2)
    nearest = distances.argmin(axis=1)
    nearest[::one_in] = np.arange(len(chosen))
    write(
        exemplars,
        "exemplars",
        "exemplars",
        [
            {"cluster": c, "user_index": u, "user_id": train[u]["user_id"], "num_users": 1}
            for c, u in enumerate(chosen)
        ],
    )
    write(
        exemplars,
        "assignment",
        "assignment",
        [
            {"user_index": u, "cluster": int(c), "exemplar_user_index": chosen[c], "similarity": 0.0}
            for u, c in zip(train, nearest, strict=True)
        ],
    )
    exemplars.commit(rows={"exemplars": len(chosen)})
    run(interests or InterestsConfig(), workspace, encode=encode, start_ray=no_ray)
    return workspace


def write(run: StageRun, folder: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    run.write_table(f"{folder}/part-0.parquet", pa.Table.from_pylist(list(rows), schema.TABLES[name]), name)
