"""The sides of `bench_affinity`: what the process of one `Job` does.

A side imports its libraries, loads the vectors, clusters 300 of them to have everything compiled, and then is timed.
Its memory is the kernel's peak when the clustering ends; a job with `baseline` ends after loading.

Shapes:  U users, D width of the vectors, E exemplars.
"""

import contextlib
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.affinity_job import Job, Outcome, Run, read_vectors

WARM_UP_USERS = 300

MATRIX_USERS = 12_000
"""Most users for which a yardstick may hold a whole matrix."""

DENSE_PASS_BYTES = 20
"""A pair in a round of `DenseMessages`: three float32 read, two written."""

LIST_PASS_BYTES = 24
"""An entry in a round of `ListMessages`: an int32 and three float32 read, two written."""


def run_side(job: Job, out: Path) -> dict[str, Any]:
    """Do a job in this process; exemplars and labels go to a file.

    Returns:
        What the method found out, and `seconds`; `peak_bytes`, the kernel's peak of the process; `grown_bytes`, how far
        the peak during the clustering lies above what the process held when it began.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("faiss").setLevel(logging.WARNING)
    run = METHODS[job.method](job)
    vectors = read_vectors(Path(job.vectors), job.users)
    outcome, warm, seconds = Outcome(), Outcome(), 0.0
    if not job.baseline:
        warm = run(vectors[:WARM_UP_USERS].copy(), True)
    peak_before = _peak_bytes()
    held = _forget_peak()
    if not job.baseline:
        started = time.perf_counter()
        outcome = run(vectors, False)
        seconds = time.perf_counter() - started
    peak = _peak_bytes()
    nothing = np.empty(0, dtype=np.int64)
    np.savez(
        out,
        exemplars=nothing if outcome.exemplars_E is None else outcome.exemplars_E,
        labels=nothing if outcome.labels_U is None else outcome.labels_U,
    )
    facts = {**outcome.facts, **outcome.later(), "warm_up": warm.facts}
    memory = {"peak_bytes": max(peak, peak_before), "grown_bytes": peak - held}
    return {"seconds": seconds, **memory, **facts}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak() -> int:
    """Make the kernel count the peak anew, where it lets us; returns the bytes held now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def _rounds(job: Job, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of rounds, as `on_round` of a clustering."""
    from distributed_mi.core.progress import track

    with track(what, job.max_iter, "rounds") as bar:
        yield lambda exemplars, changed: bar.advance(1, f"{exemplars:,} exemplars, {changed:,} changed")


def _found(result: Any, **facts: Any) -> Outcome:
    """The outcome of an `AffinityResult`."""
    known = {
        "rounds": result.rounds,
        "converged": result.converged,
        "exemplars": len(result.exemplars_E),
        "net_similarity": result.net_similarity,
        "pairs": result.pairs,
        "fixed_point": result.certificate.fixed_point,
        "unproven_rows": result.certificate.unproven_rows,
    }
    return Outcome(result.exemplars_E.numpy(), result.labels_U.numpy(), {**known, **facts})


def _exact(job: Job) -> Run:
    import torch

    from distributed_mi.exemplars.affinity import affinity_propagation, settle
    from distributed_mi.exemplars.preference import resolve_preference
    from distributed_mi.exemplars.problem import LocalProblem

    torch.set_num_threads(job.threads)

    def run(vectors: np.ndarray, warming: bool) -> Outcome:
        if warming and job.method == "lists":  # lists so short that they grow: all kernels are compiled
            with LocalProblem(vectors, solver="lists", length=4) as problem:
                return _found(settle(problem, resolve_preference(-1.0, problem.similarities), damping=0.5))
        with _rounds(job, job.method) as on_round:
            result = affinity_propagation(
                vectors,
                job.preference,
                damping=job.damping,
                max_iter=job.max_iter,
                solver=job.method,  # type: ignore[arg-type]
                on_round=on_round,
            )
        return _found(result)

    return run


def _sparse(job: Job) -> Run:
    import faiss  # noqa: F401  (counts as an import, not as memory of the clustering)
    import torch

    from distributed_mi.core.progress import track
    from distributed_mi.exemplars.affinity import settle
    from distributed_mi.exemplars.preference import resolve_preference
    from distributed_mi.exemplars.problem import SparseProblem

    torch.set_num_threads(job.threads)
    neighbours = job.options.get("neighbours", 64)

    def run(vectors: np.ndarray, warming: bool) -> Outcome:
        started = time.perf_counter()
        with track("graph", len(vectors), "users") as bar:
            most = job.options.get("most_neighbours", 256)
            problem = SparseProblem(vectors, neighbours=neighbours, most_neighbours=most, on_rows=bar.advance)
        graph = time.perf_counter() - started
        with problem, _rounds(job, "messages") as on_round:
            result = settle(
                problem,
                resolve_preference(job.preference, problem.similarities),
                damping=job.damping,
                max_iter=job.max_iter,
                on_round=on_round,
            )
        messages = time.perf_counter() - started - graph
        outcome = _found(result, seconds_graph=graph, seconds_messages=messages)
        assert problem.lists is not None
        starts = problem.lists.starts_R
        columns = problem.lists.columns_M[: problem.lists.entries]
        outcome.later = lambda: {
            "no_exemplar_listed": unlisted_share(starts, columns, result.exemplars_E.numpy())
        }
        return outcome

    return run


def unlisted_share(starts_R: np.ndarray, columns_M: np.ndarray, exemplars_E: np.ndarray) -> float:
    """Share of all users whose list holds no exemplar; exemplars themselves do not count as such users."""
    users = len(starts_R) - 1
    is_exemplar = np.zeros(users, dtype=bool)
    is_exemplar[exemplars_E] = True
    before = np.concatenate([[0], np.cumsum(is_exemplar[columns_M], dtype=np.int64)])
    none = before[starts_R[1:]] == before[starts_R[:-1]]
    return float((none & ~is_exemplar).sum() / users)


def _scikit_learn(job: Job) -> Run:
    from sklearn.cluster import AffinityPropagation

    def run(vectors: np.ndarray, warming: bool) -> Outcome:
        found = AffinityPropagation(
            preference=job.preference, damping=job.damping, max_iter=job.max_iter, random_state=job.seed
        ).fit(vectors.astype(job.options.get("dtype", "float64"), copy=False))
        exemplars = found.cluster_centers_indices_
        # without convergence and exemplars it gives no array and labels of -1
        exemplars = np.asarray(exemplars if len(exemplars) else [], dtype=np.int64)
        facts = {"rounds": int(found.n_iter_), "exemplars": len(exemplars), "pairs": len(vectors) ** 2}
        return Outcome(exemplars, found.labels_.astype(np.int64), facts)

    return run


def _distributed(job: Job) -> Run:
    import ray

    from distributed_mi.exemplars.affinity import settle
    from distributed_mi.exemplars.distributed import Blocks, DistributedProblem
    from distributed_mi.exemplars.preference import resolve_preference

    ray.init(num_cpus=8, object_store_memory=300_000_000, include_dashboard=False, logging_level="ERROR")

    class Counting(DistributedProblem):
        """Counts rounds, those done again included, and whether a checkpoint was used."""

        rounds_passed = 0
        restored = False

        def call(self, method: str, *arguments: Any) -> list[Any]:
            answers = super().call(method, *arguments)
            self.rounds_passed += method == "round"
            self.restored |= method == "restore"
            return answers

    def run(vectors: np.ndarray, warming: bool) -> Outcome:
        kill_round = None if warming else job.options.get("kill_round")
        with (
            tempfile.TemporaryDirectory() as folder,
            _rounds(job, f"{job.options['num_actors']} actors") as bar,
        ):
            blocks = Blocks(
                kind=job.options["kind"],
                num_actors=job.options["num_actors"],
                checkpoint_dir=folder if kill_round else None,
            )
            started = time.perf_counter()
            rounds = 0
            with Counting(vectors, blocks) as problem:
                ready = time.perf_counter() - started

                def on_round(exemplars: int, changed: int) -> None:
                    nonlocal rounds
                    rounds += 1
                    bar(exemplars, changed)
                    if rounds == kill_round:
                        ray.kill(problem.actors[-1])

                result = settle(
                    problem,
                    resolve_preference(job.preference, problem.similarities),
                    damping=job.damping,
                    max_iter=job.max_iter,
                    on_round=on_round,
                )
            return _found(
                result,
                seconds_start=ready,
                peak_bytes_of_actors=problem.peak_bytes,
                deaths=problem.deaths,
                rounds_again=problem.rounds_passed - result.rounds,
                from_checkpoint=problem.restored,
            )

    return run


def _yardstick(job: Job, choose: Callable[[np.ndarray, int], np.ndarray]) -> Run:
    """Exemplars by other means; everybody is labelled with the nearest."""
    import torch

    from distributed_mi.exemplars.clusters import label
    from distributed_mi.exemplars.similarity import VectorSimilarities

    torch.set_num_threads(job.threads)

    def run(vectors: np.ndarray, warming: bool) -> Outcome:
        exemplars = torch.from_numpy(choose(vectors, min(job.options["num_exemplars"], len(vectors))))
        labels, _ = label(VectorSimilarities(torch.from_numpy(vectors)), exemplars)
        return Outcome(exemplars.numpy(), labels.numpy(), {"exemplars": len(exemplars)})

    return run


def _facility(job: Job) -> Run:
    import torch

    from distributed_mi.core.progress import track
    from distributed_mi.exemplars.facility import greedy_facility_location
    from distributed_mi.exemplars.similarity import MatrixSimilarities, VectorSimilarities, similarity_matrix

    def choose(vectors: np.ndarray, count: int) -> np.ndarray:
        points = torch.from_numpy(vectors)
        whole = len(vectors) <= MATRIX_USERS
        similarities = MatrixSimilarities(similarity_matrix(points)) if whole else VectorSimilarities(points)
        with track("facility location", count, "exemplars") as bar:
            return greedy_facility_location(similarities, count, on_choice=bar.advance).numpy()

    return _yardstick(job, choose)


def _k_medoids(job: Job) -> Run:
    try:
        import kmedoids
    except ImportError as error:
        raise SystemExit("the k-medoids side needs a package: pip install kmedoids") from error
    import torch

    from distributed_mi.exemplars.similarity import similarity_matrix

    def choose(vectors: np.ndarray, count: int) -> np.ndarray:
        distances = similarity_matrix(torch.from_numpy(vectors)).neg_().numpy()
        found = kmedoids.fasterpam(distances, count, random_state=job.seed, n_cpu=job.threads)
        return np.sort(found.medoids.astype(np.int64))

    return _yardstick(job, choose)


def _k_means(job: Job) -> Run:
    from sklearn.cluster import MiniBatchKMeans

    def choose(vectors: np.ndarray, count: int) -> np.ndarray:
        found = MiniBatchKMeans(n_clusters=count, random_state=job.seed).fit(vectors)
        return nearest_members(vectors, found.cluster_centers_, found.labels_)

    return _yardstick(job, choose)


def nearest_members(vectors_UD: np.ndarray, centres_CD: np.ndarray, labels_U: np.ndarray) -> np.ndarray:
    """The member of each cluster that is nearest to its centre, ascending; a cluster without members has none."""
    distances = np.square(vectors_UD - centres_CD[labels_U]).sum(axis=1)
    order = np.lexsort((distances, labels_U))
    _, first = np.unique(labels_U[order], return_index=True)
    return np.sort(order[first])


def _bandwidth(job: Job) -> Run:
    import torch

    from benchmarks.affinity_bandwidth import bandwidth

    torch.set_num_threads(job.threads)

    def run(vectors: np.ndarray, warming: bool) -> Outcome:
        users, repeats = job.options["list_users"], job.options["repeats"]
        if warming:
            users, repeats = min(users, WARM_UP_USERS), 1
        return Outcome(facts=bandwidth(vectors, job.preference, users, repeats, job.seed))

    return run


METHODS: dict[str, Callable[[Job], Run]] = {
    "lists": _exact,
    "dense": _exact,
    "sparse": _sparse,
    "scikit-learn": _scikit_learn,
    "distributed": _distributed,
    "facility": _facility,
    "k-medoids": _k_medoids,
    "k-means": _k_means,
    "bandwidth": _bandwidth,
}
"""Name -> imports what it needs and returns the work."""
