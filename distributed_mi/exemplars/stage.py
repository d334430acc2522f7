"""The exemplars stage: user text vectors -> exemplar users, and every training user's exemplar.

Reads   <workspace>/embed (user_vectors), <workspace>/prepare (sequences/train, for the users' own ids)
Writes  <workspace>/exemplars: exemplars/ (one row per cluster), assignment/ (one row per training user)

Runs in this process: the exact method is bound by the memory bandwidth of one machine, so Ray would only copy.
"""

import logging
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from distributed_mi.core.artifacts import Manifest, StageKey, StageRun, Workspace
from distributed_mi.core.errors import InputError, StageError
from distributed_mi.core.progress import track
from distributed_mi.exemplars.config import ExemplarsConfig

if TYPE_CHECKING:
    from torch import Tensor

    from distributed_mi.exemplars.affinity import AffinityResult, OnRound

logger = logging.getLogger(__name__)

_SCRATCH_BYTES = 256 << 20
"""Blocks, labels and the library's own buffers beside the matrices."""


def run(config: ExemplarsConfig, workspace: Workspace) -> Manifest:
    """Cluster the training users around exemplars.

    Raises:
        InputError: a vector with a NaN or infinity (its user is named), or no users.
        StageError: the matrices would not fit into memory; says how much is needed and how much there is.
    """
    prepare, embed = workspace.stage("prepare").require(), workspace.stage("embed").require()
    run = workspace.stage("exemplars").open(
        StageKey("exemplars", {"prepare": prepare.identity, "embed": embed.identity}, config.result_fields())
    )
    if run.manifest is not None:
        return run.manifest
    user_indices, vectors = _read_vectors(workspace)
    user_ids = _read_user_ids(workspace, user_indices)
    _check_finite(vectors, user_ids)
    needed = preflight(*vectors.shape)
    started = time.monotonic()
    result, stats = _cluster(config, vectors)
    rows = _write(run, result, vectors, user_indices, user_ids)
    stats |= _cluster_sizes(result) | {
        "share": rows["exemplars"] / len(user_ids),
        "predicted_bytes": needed,
        "seconds": round(time.monotonic() - started, 1),
    }
    logger.info(
        "exemplars: %s of %s users (%.1f%%), %s, net similarity %.6g, facility location %s",
        f"{rows['exemplars']:,}",
        f"{len(user_ids):,}",
        100 * stats["share"],
        f"converged after {result.rounds} rounds" if result.converged else "NOT converged",
        result.net_similarity,
        stats["facility_location_net_similarity"],
    )
    return run.commit(rows=rows, stats=stats)


def preflight(users: int, width: int) -> int:
    """Say what the exact method will need before it starts.

    Returns:
        The bytes predicted: three float32 matrices of users x users, the vectors in float32 and float64, and blocks.

    Raises:
        StageError: more than is available.
    """
    from distributed_mi.exemplars.similarity import available_memory_bytes

    needed = 12 * users * users + 24 * users * width + _SCRATCH_BYTES
    available = available_memory_bytes()
    known = "unknown" if available is None else f"{available / 1e9:.1f} GB"
    logger.info("exemplars: %s users need %.1f GB, available %s", f"{users:,}", needed / 1e9, known)
    if available is not None and needed > available:
        raise StageError(
            f"exemplars: exact affinity propagation over {users:,} users needs {needed / 1e9:.1f} GB, "
            f"{known} are free. "
            "Cluster fewer users (a smaller training split), or run on a machine with more memory."
        )
    return needed


def _read_vectors(workspace: Workspace) -> tuple[np.ndarray, np.ndarray]:
    table = workspace.stage("embed").read("user_vectors", "user_vectors").sort_by("user_index")
    if table.num_rows == 0:
        raise InputError("exemplars: the embed stage left no user vectors; is the training split empty?")
    column = table["vector"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False)
    if len(vectors) % table.num_rows:
        raise InputError("exemplars: user vectors differ in width; run the embed stage again")
    return table["user_index"].to_numpy(), vectors.reshape(table.num_rows, -1)


def _read_user_ids(workspace: Workspace, user_indices: np.ndarray) -> list[str]:
    table = (
        workspace.stage("prepare")
        .read("sequences/train", "sequences", columns=["user_index", "user_id"])
        .sort_by("user_index")
    )
    if not np.array_equal(table["user_index"].to_numpy(), user_indices):
        raise InputError(
            "exemplars: user vectors and training sequences name different users; run embed again"
        )
    return table["user_id"].to_pylist()


def _check_finite(vectors: np.ndarray, user_ids: list[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise InputError(
            f"exemplars: the text vector of user {user_ids[bad[0]]} has a NaN or an infinity "
            f"({len(bad):,} such users in all). Check the text encoder, then run embed again."
        )


def _cluster(config: ExemplarsConfig, vectors: np.ndarray) -> tuple["AffinityResult", dict[str, Any]]:
    import torch

    from distributed_mi.exemplars.affinity import AffinityResult, fit
    from distributed_mi.exemplars.similarity import similarity_matrix

    tensor = torch.tensor(vectors)
    users = len(tensor)
    if config.preference == "none":
        everyone = torch.arange(users)
        result = AffinityResult(everyone, everyone, True, 0, 0.0, 0.0, config.damping)
        return result, _stats(result, [result], None)
    similarities = similarity_matrix(tensor)
    schedule = [
        (config.damping, config.max_iter),
        *((d, config.retry_max_iter) for d in config.retry_damping),
    ]
    with _Rounds() as rounds:
        result, attempts = fit(
            similarities,
            config.preference,
            schedule=schedule,
            convergence_iter=config.convergence_iter,
            on_attempt=rounds.attempt,
        )
    if not result.converged:
        logger.warning(
            "exemplars: no convergence with damping %s; keeping the best net similarity found, at damping %s. "
            "Another preference or a higher damping may help.",
            ", ".join(str(a.damping) for a in attempts),
            result.damping,
        )
    facility = _facility_location(similarities, result) if config.compare_facility_location else None
    return result, _stats(result, attempts, facility)


class _Rounds:
    """A progress bar for each attempt; the one before is closed when the next starts."""

    def __enter__(self) -> "_Rounds":
        self._stack = ExitStack()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stack.close()

    def attempt(self, damping: float, max_iter: int) -> "OnRound":
        self._stack.close()
        bar = self._stack.enter_context(track(f"exemplars (damping {damping})", max_iter, "rounds"))

        def on_round(exemplars: int, changed: int) -> None:
            bar.advance(1, f"{exemplars:,} exemplars, {changed:,} changed")

        return on_round


def _facility_location(similarities: "Tensor", result: "AffinityResult") -> float:
    """Net similarity that greedy facility location reaches with as many exemplars."""
    from distributed_mi.exemplars.affinity import label
    from distributed_mi.exemplars.facility import greedy_facility_location

    count = len(result.exemplars_E)
    with track("facility location", count, "exemplars") as bar:
        chosen = greedy_facility_location(similarities, count, on_choice=bar.advance)
    _, own = label(similarities, chosen)
    own[chosen] = result.preference
    return float(own.double().sum())


def _stats(
    result: "AffinityResult", attempts: list["AffinityResult"], facility: float | None
) -> dict[str, Any]:
    return {
        "converged": result.converged,
        "rounds": result.rounds,
        "damping": result.damping,
        "preference": result.preference,
        "net_similarity": result.net_similarity,
        "facility_location_net_similarity": facility,
        "attempts": [
            {
                "damping": a.damping,
                "rounds": a.rounds,
                "converged": a.converged,
                "exemplars": len(a.exemplars_E),
                "net_similarity": a.net_similarity,
            }
            for a in attempts
        ],
    }


def _cluster_sizes(result: "AffinityResult") -> dict[str, Any]:
    """Size -> number of clusters of that size, and the largest."""
    sizes, counts = np.unique(np.bincount(result.labels_U.numpy()), return_counts=True)
    histogram = {str(size): int(count) for size, count in zip(sizes, counts, strict=True)}
    return {"cluster_sizes": histogram, "largest_cluster": int(sizes[-1])}


def _write(
    run: StageRun,
    result: "AffinityResult",
    vectors: np.ndarray,
    user_indices: np.ndarray,
    user_ids: list[str],
) -> dict[str, int]:
    exemplars, labels = result.exemplars_E.numpy(), result.labels_U.numpy()
    difference = vectors - vectors[exemplars[labels]]
    exemplar_table = pa.table(
        {
            "cluster": np.arange(len(exemplars)),
            "user_index": user_indices[exemplars],
            "user_id": [user_ids[e] for e in exemplars],
            "num_users": np.bincount(labels, minlength=len(exemplars)),
        }
    )
    assignment_table = pa.table(
        {
            "user_index": user_indices,
            "cluster": labels,
            "exemplar_user_index": user_indices[exemplars[labels]],
            "similarity": -np.einsum("ud,ud->u", difference, difference),
        }
    )
    run.write_table("exemplars/part-0.parquet", exemplar_table, "exemplars")
    run.write_table("assignment/part-0.parquet", assignment_table, "assignment")
    return {"exemplars": exemplar_table.num_rows, "assignment": assignment_table.num_rows}
