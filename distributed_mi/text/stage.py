"""The embed stage: item and training-user text vectors.

Reads   <workspace>/prepare (catalogue, sequences/train)
Writes  <workspace>/embed: item_vectors/ in the order of item_index, user_vectors/ in the order of user_index

An item of which nothing is known but its id is encoded by that id, so that every item has a vector and a user of such
items too; `has_text` is false there, and training takes the vector for none.

Each distinct text is encoded once, by a Ray Data pool of encoder actors (in this process when there are few). Texts
travel longest first, so that a block's texts have similar lengths and little of a forward pass is padding.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from distributed_mi.core.artifacts import Manifest, StageKey, StageRun, Workspace
from distributed_mi.core.errors import DistributedMIError, InputError, StageError, own_error
from distributed_mi.core.progress import track
from distributed_mi.text.config import EmbedConfig
from distributed_mi.text.source import BUNDLED_PACKAGE, locate, model_key
from distributed_mi.text.templates import ItemText, item_text, user_text

logger = logging.getLogger(__name__)

IN_PROCESS_TEXTS = 2_000
"""Fewer distinct texts than this are encoded here: starting an actor would take longer."""

_BLOCK_TEXTS = 512
"""Texts that one call of an actor takes."""

_SHARD_ROWS = 65_536
"""Vectors in one Parquet file."""

_MEAN_EVENTS = 200_000
"""Events whose item vectors are summed together (0.3 GB at 384 wide)."""


def run(config: EmbedConfig, workspace: Workspace, *, start_ray: Callable[[], None]) -> Manifest:
    """Encode the catalogue and the training users.

    Raises:
        MissingDependencyError: transformers or the bundled encoder is not installed.
        InputError: an encoder that cannot be used, or an empty catalogue or training split.
        StageError: a text came back not at all, or twice.
    """
    prepare = workspace.stage("prepare").require()
    inputs = {"prepare": prepare.identity, "encoder": model_key(config)}
    run = workspace.stage("embed").open(StageKey("embed", inputs, config.result_fields()))
    if run.manifest is not None:
        return run.manifest
    item_indices, made = _item_texts(config, workspace)
    texts = [m.text for m in made]
    user_indices, offsets, events = _sequences(workspace, len(texts))
    item_vectors, facts = _encode(config, texts, config.max_item_tokens, "items", start_ray)
    if config.user_vectors == "mean":
        user_vectors = mean_vectors(item_vectors, offsets, events)
    else:
        users = _user_texts(texts, offsets, events, config.max_user_tokens)
        user_vectors, _ = _encode(config, users, config.max_user_tokens, "users", start_ray)
    scale, distances = _distances(user_vectors, rescale=config.rescale)
    for vectors in (item_vectors, user_vectors):
        vectors *= np.float32(scale)
    _write(run, "item", item_indices, item_vectors, has_text=np.array([m.says_something for m in made]))
    _write(run, "user", user_indices, user_vectors)
    stats = facts | distances | {"scale": scale, "item_text_sources": _count_sources(made, config)}
    return run.commit(
        rows={"item_vectors": len(item_vectors), "user_vectors": len(user_vectors)}, stats=stats
    )


def encode_texts(
    config: EmbedConfig, texts: Sequence[str], *, scale: float, start_ray: Callable[[], None]
) -> np.ndarray:
    """Encode texts as the stage encodes items, on the same scale.

    Args:
        config: the configuration of the embed stage.
        texts: any texts; each distinct one is encoded once.
        scale: `stats["scale"]` of the embed stage's manifest.
        start_ray: called before Ray is first needed.

    Returns:
        `[len(texts), T]` float32, un-normalised.
    """
    vectors, _ = _encode(config, texts, config.max_item_tokens, "texts", start_ray)
    return vectors * np.float32(scale)


def mean_vectors(item_vectors: np.ndarray, offsets: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Mean of the vectors of each user's items, repeated items counted as often as they stand.

    Args:
        item_vectors: `[V - 1, T]`, row 0 is item 1.
        offsets: `[U + 1]`, where each user's events begin and end; every user has at least one.
        events: item indices of all users, one after the other.

    Returns:
        `[U, T]` float32.
    """
    users = len(offsets) - 1
    means = np.empty((users, item_vectors.shape[1]), dtype=np.float32)
    low = 0
    while low < users:
        high = int(np.searchsorted(offsets, offsets[low] + _MEAN_EVENTS, side="right")) - 1
        high = min(max(high, low + 1), users)
        rows = item_vectors[events[offsets[low] : offsets[high]] - 1]
        sums = np.add.reduceat(rows, offsets[low:high] - offsets[low], axis=0, dtype=np.float64)
        means[low:high] = sums / np.diff(offsets[low : high + 1])[:, None]
        low = high
    return means


def _item_texts(config: EmbedConfig, workspace: Workspace) -> tuple[np.ndarray, list[ItemText]]:
    columns = ["item_index", "item_id", "title", "brand", "categories"]
    table = workspace.stage("prepare").read("catalogue", "catalogue", columns=columns).sort_by("item_index")
    indices = table["item_index"].to_numpy()
    if not len(indices):
        raise InputError("embed: the catalogue is empty")
    if not np.array_equal(indices, np.arange(1, len(indices) + 1)):
        raise InputError(
            "embed: item_index of the catalogue does not count from 1 without gaps; run prepare again"
        )
    made = [
        item_text(item_id, title, brand, categories, config.item_fields)
        for item_id, title, brand, categories in zip(
            *(table[c].to_pylist() for c in columns[1:]), strict=True
        )
    ]
    return indices, made


def _count_sources(made: Sequence[ItemText], config: EmbedConfig) -> dict[str, int]:
    """Items by where their text comes from; a line when some lack the configured fields."""
    sources = dict(sorted(Counter(m.source for m in made).items()))
    fallbacks = len(made) - sources.get("fields", 0)
    if fallbacks:
        logger.info(
            "embed: %s of %s items lack %s: %s",
            f"{fallbacks:,}",
            f"{len(made):,}",
            ", ".join(config.item_fields),
            sources,
        )
    return sources


def _sequences(workspace: Workspace, num_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User indices, offsets `[U + 1]` and the item indices of all training users, one after the other."""
    table = (
        workspace.stage("prepare")
        .read("sequences/train", "sequences", columns=["user_index", "item_indices"])
        .sort_by("user_index")
    )
    if not table.num_rows:
        raise InputError("embed: there are no training users")
    lists = table["item_indices"].combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    events = lists.flatten().to_numpy()
    offsets = offsets - offsets[0]
    if (np.diff(offsets) < 1).any():
        raise InputError("embed: a training user has no events; run prepare again")
    if events.min() < 1 or events.max() > num_items:
        raise InputError(
            f"embed: a training sequence names an item outside 1..{num_items}; run prepare again"
        )
    return table["user_index"].to_numpy(), offsets, events


def _user_texts(texts: list[str], offsets: np.ndarray, events: np.ndarray, max_tokens: int) -> list[str]:
    """Each user's item texts as one; items that cannot be reached within the token limit are left out."""
    return [
        user_text([texts[i - 1] for i in events[low : min(high, low + max_tokens)]])
        for low, high in pairwise(offsets)
    ]


def _encode(
    config: EmbedConfig, texts: Sequence[str], max_tokens: int, unit: str, start_ray: Callable[[], None]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Vectors of all texts, each distinct one encoded once, and facts for the manifest."""
    column = pa.array(texts, pa.large_string()).dictionary_encode()
    distinct: list[str] = column.dictionary.to_pylist()
    locate(config)  # a model that cannot be used is refused here, before Ray or an actor is started
    in_process = len(distinct) < IN_PROCESS_TEXTS
    if not in_process:
        start_ray()
    encode = _encode_here if in_process else _encode_in_pool
    with track(f"embed {unit}", len(distinct), "texts") as bar:
        vectors, facts = encode(config, distinct, max_tokens, bar.advance)
    return vectors[column.indices.to_numpy()], facts


def _encode_here(
    config: EmbedConfig, texts: list[str], max_tokens: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, dict[str, Any]]:
    from distributed_mi.text.encoder import TextEncoder

    encoder = TextEncoder(config)
    vectors = encoder(texts, max_tokens=max_tokens, on_batch=advance)
    return vectors, _facts(config, encoder.dim, encoder.revision, len(texts))


def _facts(config: EmbedConfig, dim: int, revision: str, texts: int) -> dict[str, Any]:
    model = config.model or BUNDLED_PACKAGE
    return {"dim": dim, "model": model, "model_revision": revision, "num_distinct_texts": texts}


class EncodeBatch:
    """What one encoder actor of the pool holds: the weights, loaded once."""

    def __init__(self, config: EmbedConfig, max_tokens: int, num_threads: int) -> None:
        import torch

        from distributed_mi.text.encoder import TextEncoder

        torch.set_num_threads(max(1, min(num_threads, len(os.sched_getaffinity(0)))))
        device = None if config.gpus_per_actor else "cpu"
        self.max_tokens = max_tokens
        try:
            self.encoder: TextEncoder | DistributedMIError = TextEncoder(config, device=device)
        except DistributedMIError as error:
            self.encoder = error  # raised by the first call: Ray keeps only the text of a constructor's error

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Columns text_id, text -> text_id, vector, revision."""
        if isinstance(self.encoder, DistributedMIError):
            raise self.encoder
        vectors = self.encoder(batch["text"].to_pylist(), max_tokens=self.max_tokens)
        revision = pa.array([self.encoder.revision] * len(vectors))
        return pa.table({"text_id": batch["text_id"], "vector": vector_column(vectors), "revision": revision})


def _encode_in_pool(
    config: EmbedConfig, texts: list[str], max_tokens: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Every text through the actor pool, back in any order, each exactly once."""
    import ray
    from ray.data import ActorPoolStrategy

    actors, cpus = _pool_shape(config)
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    step = max(config.batch_size, min(_BLOCK_TEXTS, math.ceil(len(texts) / (4 * actors))))
    blocks = [
        pa.table({"text_id": chosen, "text": pa.array([texts[i] for i in chosen], pa.large_string())})
        for chosen in (order[low : low + step] for low in range(0, len(order), step))
    ]
    with _quiet_ray_data():
        encoded = ray.data.from_arrow(blocks).map_batches(
            EncodeBatch,
            fn_constructor_args=(config, max_tokens, cpus),
            compute=ActorPoolStrategy(size=actors),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=cpus,
            num_gpus=config.gpus_per_actor or None,
        )
        batches = encoded.iter_batches(batch_size=None, batch_format="pyarrow")
        return _collect(config, batches, len(texts), advance)


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without its own bars and log, which are put back; a project error of an actor comes out as itself."""
    import ray
    from ray.data import DataContext

    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
    }
    before, level = {name: getattr(context, name) for name in wanted}, log.level
    for name, value in wanted.items():
        setattr(context, name, value)
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except ray.exceptions.RayError as error:
        raise own_error(error) from error
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        log.setLevel(level)


def _collect(
    config: EmbedConfig, batches: Any, count: int, advance: Callable[[int], None]
) -> tuple[np.ndarray, dict[str, Any]]:
    vectors = np.empty((0, 0), dtype=np.float32)
    seen = np.zeros(count, dtype=np.int64)
    revision = "unknown"
    for batch in batches:
        rows = batch["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        rows = rows.reshape(batch.num_rows, -1)
        if not len(vectors):
            vectors = np.zeros((count, rows.shape[1]), dtype=np.float32)
        ids = batch["text_id"].to_numpy()
        vectors[ids] = rows
        np.add.at(seen, ids, 1)
        revision = batch["revision"][0].as_py()
        advance(batch.num_rows)
    if (seen != 1).any():
        raise StageError(
            f"embed: {int((seen == 0).sum()):,} of {count:,} texts did not come back from the encoder actors and "
            f"{int((seen > 1).sum()):,} came back more than once. Run again."
        )
    return vectors, _facts(config, vectors.shape[1], revision, count)


def _pool_shape(config: EmbedConfig) -> tuple[int, int]:
    """Number of actors, and the CPUs that each asks for, so that all fit onto the nodes that are there."""
    import ray

    nodes = [int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]]
    nodes = [n for n in nodes if n > 0] or [1]
    actors = config.num_actors or len(nodes)
    return actors, max(1, min(nodes) // math.ceil(actors / len(nodes)))


def _distances(vectors: np.ndarray, *, rescale: bool) -> tuple[float, dict[str, Any]]:
    from distributed_mi.text.distances import median_squared_distance, scale_factor, squared_nn_distances

    nearest = squared_nn_distances(vectors)
    everyone = median_squared_distance(vectors)
    before = float(np.median(nearest)) if len(nearest) else None
    scale = scale_factor(nearest) if rescale else 1.0

    def scaled(value: float | None) -> float | None:
        return None if value is None else value * scale**2

    logger.info(
        "embed: median squared distance of users %s, to the nearest %s; vectors scaled by %.4g",
        everyone,
        before,
        scale,
    )
    return scale, {
        "median_squared_nn_distance_before": before,
        "median_squared_nn_distance": scaled(before),
        "median_squared_distance": scaled(everyone),
        "users_with_a_twin": float((nearest == 0.0).mean()) if len(nearest) else 0.0,
    }


def vector_column(vectors: np.ndarray) -> pa.ListArray:
    """Rows of a float32 matrix as an Arrow list column."""
    offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(vectors).reshape(-1)))


def _write(run: StageRun, name: str, indices: np.ndarray, vectors: np.ndarray, **columns: np.ndarray) -> None:
    """Write `<name>_vectors/`; `columns` stand beside the vectors."""
    run.clear(f"{name}_vectors")
    columns = {f"{name}_index": indices, **columns}
    for number, low in enumerate(range(0, len(vectors), _SHARD_ROWS)):
        rows = slice(low, low + _SHARD_ROWS)
        block = {column: values[rows] for column, values in columns.items()}
        table = pa.table(block | {"vector": vector_column(vectors[rows])})
        run.write_table(f"{name}_vectors/part-{number:05d}.parquet", table, f"{name}_vectors")
