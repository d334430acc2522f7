"""The exemplars stage: user text vectors -> exemplar users, and every training user's exemplar.

Reads   <workspace>/embed (user_vectors), <workspace>/prepare (sequences/train and catalogue, for ids and titles)
Writes  <workspace>/exemplars: exemplars/ (one row per cluster), assignment/ and messages/ (one row per training user),
        report.md with its plots

Runs in this process unless the configuration asks for Ray actors: up to hundreds of thousands of users one machine is
quicker than several.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from distributed_mi.core.artifacts import Manifest, StageKey, StageRun, Workspace
from distributed_mi.core.errors import InputError, StageError
from distributed_mi.core.progress import track
from distributed_mi.exemplars.config import ExemplarsConfig

if TYPE_CHECKING:
    from distributed_mi.exemplars.affinity import AffinityResult, OnRound
    from distributed_mi.exemplars.problem import Problem

logger = logging.getLogger(__name__)

_YARDSTICK_USERS = 30_000
"""Above, greedy facility location and the preference curve would take longer than the clustering."""

_CURVE = (0.25, 0.5, 2.0, 4.0)
"""Multiples of the preference for the plot."""

_LARGEST = 5
"""Clusters that the report shows."""

_STATE = ("column_sum", "background", "self_responsibility", "self_availability", "reach_mean", "weight")


def run(
    config: ExemplarsConfig, workspace: Workspace, *, start_ray: Callable[[], None] | None = None
) -> Manifest:
    """Cluster the training users around exemplars.

    Args:
        config: method, preference, damping.
        workspace: with complete stages prepare and embed.
        start_ray: called before Ray is used; not called when everything runs in this process.

    Raises:
        InputError: a vector with a NaN or infinity (its user is named), or no users.
        StageError: the method would not fit into memory; says how much is needed, how much there is and what fits.
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
    previous = _previous_messages(workspace)
    started = time.monotonic()
    from distributed_mi.exemplars.preflight import choose

    users, width = vectors.shape
    method, predicted = choose(users, width, config)
    with _open_problem(config, method, vectors, run, start_ray) as problem:
        result, stats, summary = _cluster(config, problem, user_ids, previous)
    rows = _write(run, result, vectors, user_indices, user_ids, summary)
    stats |= _cluster_sizes(result) | {
        "method": method,
        "preflight": predicted,
        "users": len(user_ids),
        "exemplars": rows["exemplars"],
        "share": rows["exemplars"] / len(user_ids),
        "moved": _moved(previous, user_ids, result),
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
    return run.commit(
        rows=rows, stats=stats, top_files=_report(workspace, stats, result, user_indices, user_ids)
    )


@contextmanager
def _open_problem(
    config: ExemplarsConfig,
    method: str,
    vectors: np.ndarray,
    run: StageRun,
    start_ray: Callable[[], None] | None,
) -> Iterator["Problem"]:
    """What the method works on; its neighbour lists are made here, under a progress bar."""
    from distributed_mi.exemplars.problem import LocalProblem, SparseProblem

    users = len(vectors)
    with ExitStack() as stack:
        if method == "distributed" or (method == "sparse" and config.num_actors > 1):
            from distributed_mi.exemplars.distributed import Blocks, DistributedProblem

            if start_ray is not None:
                start_ray()
            folder = run.path("checkpoints") if run.directory.workspace.is_local else None
            if folder is None:
                logger.warning(
                    "exemplars: an object store takes no checkpoints; should an actor die, rounds are repeated"
                )
            stack.callback(run.clear, "checkpoints")
            blocks = Blocks(
                kind="lists" if method == "distributed" else "sparse",
                num_actors=max(2, config.num_actors),
                probes=config.probes,
                checkpoint_dir=folder,
                checkpoint_every=config.checkpoint_every,
                **({"neighbours": config.neighbours} if method == "sparse" else {}),
            )
            yield stack.enter_context(DistributedProblem(vectors, blocks))
        elif method == "sparse":
            with track("exemplars: neighbours", users, "users") as bar:
                problem = SparseProblem(
                    vectors,
                    neighbours=config.neighbours,
                    most_neighbours=config.most_neighbours,
                    probes=config.probes,
                    on_rows=bar.advance,
                )
            yield stack.enter_context(problem)
        else:
            local = stack.enter_context(LocalProblem(vectors))
            if local.solver == "lists" and (config.preference != "none" or config.share is not None):
                with track("exemplars: neighbours", users, "users") as bar:
                    local.find_neighbours(bar.advance)
            yield local


def _read_vectors(workspace: Workspace) -> tuple[np.ndarray, np.ndarray]:
    table = workspace.stage("embed").read("user_vectors", "user_vectors").sort_by("user_index")
    if table.num_rows == 0:
        raise InputError("exemplars: the embed stage left no user vectors; is the training split empty?")
    column = table["vector"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False, writable=True)
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


def _previous_messages(workspace: Workspace) -> pa.Table | None:
    """What the stage's previous run left, if it ran."""
    stage = workspace.stage("exemplars")
    manifest = stage.manifest()
    return (
        stage.read("messages", "messages") if manifest is not None and "messages" in manifest.rows else None
    )


def _warm(previous: pa.Table | None, user_ids: list[str]) -> dict[str, np.ndarray] | None:
    """The previous run's numbers for today's users; zeros for those who are new."""
    if previous is None or not np.any(previous["weight"].to_numpy() > 0):
        return None
    place = {u: i for i, u in enumerate(previous["user_id"].to_pylist())}
    old = np.array([place.get(u, -1) for u in user_ids])
    return {name: np.where(old >= 0, previous[name].to_numpy()[old], 0.0) for name in _STATE}


def _cluster(
    config: ExemplarsConfig, problem: "Problem", user_ids: list[str], previous: pa.Table | None
) -> tuple["AffinityResult", dict[str, Any], dict[str, np.ndarray] | None]:
    import torch

    from distributed_mi.exemplars.affinity import AffinityResult, Certificate, fit
    from distributed_mi.exemplars.preference import preference_for_share

    users = len(user_ids)
    if config.preference == "none" and config.share is None:
        everyone = torch.arange(users)
        certificate = Certificate((), 0, True, True)
        result = AffinityResult(everyone, everyone, True, 0, 0.0, 0.0, config.damping, certificate, 0)
        return result, _stats(result, [result], None, []), None
    preference: Any = config.preference
    tried: list[tuple[float, float]] = []
    if config.share is not None:
        with track("exemplars: preference", None, "steps") as bar:
            preference, tried = preference_for_share(
                problem,
                config.share,
                on_step=lambda step, p, share: bar.advance(1, f"{p:.4g} gives {100 * share:.2f} %"),
            )
    schedule = [
        (config.damping, config.max_iter),
        *((d, config.retry_max_iter) for d in config.retry_damping),
    ]
    warm = _warm(previous, user_ids) if config.warm_start else None
    with _Rounds() as rounds:
        try:
            result, attempts = fit(
                problem,
                preference,
                schedule=schedule,
                convergence_iter=config.convergence_iter,
                on_attempt=rounds.attempt,
                warm=warm,
            )
        except MemoryError as error:
            raise StageError(f"exemplars: {error}") from error
    if not result.converged:
        logger.warning(
            "exemplars: no convergence with damping %s; keeping the best net similarity found, at damping %s. "
            "Another preference or a higher damping may help.",
            ", ".join(str(a.damping) for a in attempts),
            result.damping,
        )
    summary = problem.summary
    lonely = _without_listed_exemplar(problem, result)
    small = users <= _YARDSTICK_USERS
    facility = _facility_location(problem, result) if config.compare_facility_location and small else None
    if config.preference_curve and small and problem.lists is not None and not tried:
        tried = _curve(problem, result)
    return (
        result,
        _stats(result, attempts, facility, tried) | {"users_without_listed_exemplar": lonely},
        summary,
    )


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


def _without_listed_exemplar(problem: "Problem", result: "AffinityResult") -> int:
    """Users in whose list no exemplar stands; they are labelled with the nearest all the same."""
    lists = problem.lists
    if lists is None:
        return 0
    listed = np.zeros(problem.similarities.users, dtype=bool)
    listed[result.exemplars_E.numpy()] = True
    sums = np.concatenate([[0], np.cumsum(listed[lists.columns_M[: lists.entries]])])
    found = sums[lists.starts_R[1:]] > sums[lists.starts_R[:-1]]
    return int((~found & ~listed).sum())


def _facility_location(problem: "Problem", result: "AffinityResult") -> float:
    """Net similarity that greedy facility location reaches with as many exemplars."""
    import torch

    from distributed_mi.exemplars.clusters import label, net_similarity
    from distributed_mi.exemplars.facility import greedy_facility_location
    from distributed_mi.exemplars.similarity import kept_in_memory

    similarities, count = kept_in_memory(problem.similarities), len(result.exemplars_E)
    with track("facility location", count, "exemplars") as bar:
        chosen = greedy_facility_location(similarities, count, on_choice=bar.advance)
    _, nearest = label(similarities, chosen)
    preferences = torch.full((len(nearest),), result.preference, dtype=torch.float64)
    return net_similarity(nearest, chosen, preferences)


def _curve(problem: "Problem", result: "AffinityResult") -> list[tuple[float, float]]:
    """Shares of exemplars at multiples of the preference, each begun from the messages of the one before."""
    import torch

    from distributed_mi.exemplars.affinity import settle

    points = [(result.preference, result.share)]
    if result.preference >= 0:
        return points
    warm = problem.last
    with track("exemplars: other preferences", len(_CURVE), "preferences") as bar:
        for factor in _CURVE:
            preferences = torch.full((len(result.labels_U),), factor * result.preference, dtype=torch.float64)
            other = settle(problem, preferences, damping=0.7, max_iter=60, convergence_iter=6, warm=warm)
            warm = problem.last
            points.append((factor * result.preference, other.share))
            bar.advance(1, f"{factor * result.preference:.4g} gives {100 * other.share:.2f} %")
    return points


def _stats(
    result: "AffinityResult",
    attempts: list["AffinityResult"],
    facility: float | None,
    shares: list[tuple[float, float]],
) -> dict[str, Any]:
    return {
        "converged": result.converged,
        "rounds": result.rounds,
        "damping": result.damping,
        "preference": result.preference,
        "net_similarity": result.net_similarity,
        "facility_location_net_similarity": facility,
        "certificate": asdict(result.certificate) | {"changes": list(result.certificate.changes)},
        "pairs": result.pairs,
        "shares_by_preference": [list(point) for point in shares],
        "users_without_listed_exemplar": 0,
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


def _moved(previous: pa.Table | None, user_ids: list[str], result: "AffinityResult") -> dict[str, int] | None:
    """What changed since the previous run; None without one."""
    if previous is None:
        return None
    old = dict(zip(previous["user_id"].to_pylist(), previous["exemplar_user_id"].to_pylist(), strict=True))
    exemplars = [user_ids[e] for e in result.exemplars_E.tolist()]
    new = {u: exemplars[c] for u, c in zip(user_ids, result.labels_U.tolist(), strict=True)}
    both = old.keys() & new.keys()
    before, after = set(old.values()), set(exemplars)
    return {
        "users_in_both": len(both),
        "users_moved": sum(old[u] != new[u] for u in both),
        "exemplars_kept": len(before & after),
        "exemplars_gone": len(before - after),
        "exemplars_new": len(after - before),
    }


def _write(
    run: StageRun,
    result: "AffinityResult",
    vectors: np.ndarray,
    user_indices: np.ndarray,
    user_ids: list[str],
    summary: dict[str, np.ndarray] | None,
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
    nothing = np.zeros(len(user_ids))
    message_table = pa.table(
        {
            "user_id": user_ids,
            "exemplar_user_id": [user_ids[e] for e in exemplars[labels]],
            **{name: nothing if summary is None else summary[name] for name in _STATE},
        }
    )
    run.write_table("exemplars/part-0.parquet", exemplar_table, "exemplars")
    run.write_table("assignment/part-0.parquet", assignment_table, "assignment")
    run.write_table("messages/part-0.parquet", message_table, "messages")
    return {
        "exemplars": exemplar_table.num_rows,
        "assignment": assignment_table.num_rows,
        "messages": message_table.num_rows,
    }


def _report(
    workspace: Workspace,
    stats: dict[str, Any],
    result: "AffinityResult",
    user_indices: np.ndarray,
    user_ids: list[str],
) -> dict[str, bytes]:
    """File name -> content of `report.md` and its plots."""
    from distributed_mi.exemplars import report

    sizes = np.bincount(result.labels_U.numpy(), minlength=len(result.exemplars_E))
    pictures = {report.SIZES: report.size_plot(sizes)}
    shares = [(p, s) for p, s in stats["shares_by_preference"] if p < 0]
    if len(shares) > 1:
        pictures[report.CURVE] = report.curve_plot(shares, stats["preference"])
    top = np.argsort(-sizes, kind="stable")[:_LARGEST]
    users = user_indices[result.exemplars_E.numpy()[top]]
    titles = _titles(workspace, users)
    largest = [
        (user_ids[int(result.exemplars_E[c])], int(sizes[c]), titles[int(u)])
        for c, u in zip(top, users, strict=True)
    ]
    text = report.markdown(stats, sorted(pictures), largest)
    return pictures | {"report.md": text.encode()}


def _titles(workspace: Workspace, users: np.ndarray) -> dict[int, list[str]]:
    """Titles of some training users' histories, newest first; the item's id where it has none."""
    import pyarrow.compute as pc

    prepare = workspace.stage("prepare")
    chosen = pc.field("user_index").isin(users.tolist())
    rows = prepare.read("sequences/train", "sequences", columns=["user_index", "item_indices"], filter=chosen)
    histories = dict(zip(rows["user_index"].to_pylist(), rows["item_indices"].to_pylist(), strict=True))
    items = sorted({i for history in histories.values() for i in history})
    wanted = pc.field("item_index").isin(items)
    table = prepare.read("catalogue", "catalogue", columns=["item_index", "item_id", "title"], filter=wanted)
    names = {
        i: title or item_id
        for i, item_id, title in zip(*(table[c].to_pylist() for c in table.column_names), strict=True)
    }
    return {user: [names[i] for i in reversed(history)] for user, history in histories.items()}
