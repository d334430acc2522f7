"""The train stage, and how work reaches several workers.

With one worker the work runs in the calling process and Ray is not touched. With more, Ray Train starts the workers
and connects them through torch.distributed. When one dies, or when there is room for more of them (`elastic.py`), they
are started again, as many as there is room for then. What continues after that is decided by this project's
checkpoints alone (`checkpoint.py`): nothing is lost between a checkpoint and Ray's notice of it.
"""

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import torch

from distributed_mi.core import errors
from distributed_mi.core import logging as project_logging
from distributed_mi.core.artifacts import (
    Manifest,
    StageKey,
    StageRun,
    Workspace,
    resolve_url,
    write_bytes,
)
from distributed_mi.core.config import content_hash
from distributed_mi.core.errors import ConfigError, DistributedMIError, StageError
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.training import preflight
from distributed_mi.training.checkpoint import has_manifest, read_manifest
from distributed_mi.training.config import ScalingConfig, TrainConfig
from distributed_mi.training.elastic import (
    refuse_if_too_large,
    resources_per_worker,
    wait_for_room,
    watching_for_room,
)
from distributed_mi.training.follow import Follow, following
from distributed_mi.training.loop import ValidateFn
from distributed_mi.training.semantics import STAGES as SEMANTIC_STAGES
from distributed_mi.training.worker import PAUSED, TrainWorker, fit_counts

logger = logging.getLogger(__name__)

WorkerFn = Callable[[dict[str, Any], WorkerGroup], dict[str, Any]]
"""`fn(payload, group) -> dict`, called on every worker; picklable by cloudpickle. One that returns `PAUSED` is called
again with other workers."""

_ERROR_FILE = "error.json"


def run(
    config: TrainConfig,
    scaling: ScalingConfig,
    workspace: Workspace,
    *,
    validate: ValidateFn,
    start_ray: Callable[[], None],
) -> Manifest:
    """Train one recommender, continue a training that was killed, or return at once when it is done.

    A stage whose `model/` was removed (it was damaged) exports it again from `checkpoints/`, without a step.

    Leaves in the generation: `config.json`, `metrics.jsonl`, `checkpoints/`, and `model/`, the best checkpoint
    without optimizer state.

    Args:
        config: the run.
        scaling: workers; changes no result.
        workspace: with prepare complete, and embed, exemplars and interests for a model with `requires_semantics`.
        validate: metrics of a model on the validation users, identical on all workers.
        start_ray: makes sure that Ray is up; called only when several workers are needed.

    Returns:
        The stage's manifest; its stats hold the best step, its metrics, users per second and a summary of the
        losses.

    Raises:
        WorkspaceError: an earlier stage is not complete. ConfigError: a field of the model is wrong.
        CheckpointError: the checkpoint to continue from is damaged. StageError: a loss is not finite, or workers
        died too often.
    """
    name = f"train/{config.run_name}"
    owner = config.model.resolve()
    stages = ("prepare", *(SEMANTIC_STAGES if owner.requires_semantics else ()))
    inputs = {stage: workspace.stage(stage).require().identity for stage in stages}
    stage_run = workspace.stage(name).open(StageKey(name, inputs, config.result_fields()))
    if stage_run.complete and not has_manifest(stage_run.fs, stage_run.path("model")):
        logger.warning("%s: %s is gone; writing it again", name, stage_run.path("model"))
        stage_run.reopen()
    if stage_run.manifest is not None:
        return stage_run.manifest
    write_bytes(stage_run.fs, stage_run.path("config.json"), _config_json(config))
    _say_leakage(config, workspace)
    if owner.has_loss:
        stats = _train(config, scaling, workspace, stage_run, validate, start_ray)
    else:
        stats = fit_counts(config, workspace, stage_run.root, validate)
    model = read_manifest(stage_run.fs, stage_run.path("model"))
    stats["content"] = content_hash(model.files)
    return stage_run.commit(rows={"items": int(stats["table_rows"]) - 1}, stats=stats)


def _say_leakage(config: TrainConfig, workspace: Workspace) -> None:
    """Once, before the first validation metric is shown."""
    text = workspace.stage("prepare").require().stats.get("leakage", {}).get("text")
    if text:
        logger.info("train %s: %s", config.run_name, text)
    else:
        logger.warning("train %s: the prepare stage has no leakage check", config.run_name)


def _train(
    config: TrainConfig,
    scaling: ScalingConfig,
    workspace: Workspace,
    stage_run: StageRun,
    validate: ValidateFn,
    start_ray: Callable[[], None],
) -> dict[str, Any]:
    logger.info(
        "train %s: %s on %s worker(s), %d users a step, at most %s steps%s",
        config.run_name,
        config.model.name,
        _count_text(scaling),
        config.num_users_per_step,
        f"{config.max_steps:,}",
        "; continuing" if stage_run.resumed else "",
    )
    predicted = preflight.check(config, scaling, workspace, _nodes(scaling, start_ray))
    payload = {"workspace": workspace.absolute_url, "generation": stage_run.root}
    follow = Follow(f"train {config.run_name}", config.max_steps, "steps")
    stats = run_on_workers(TrainWorker(config, validate), scaling, start_ray, payload, follow=follow)
    return stats | {"predicted_memory": predicted}


def _nodes(scaling: ScalingConfig, start_ray: Callable[[], None]) -> list[preflight.Node]:
    """The machines that the workers will run on, filled one after the other as Ray packs them."""
    if scaling.least_workers == 1:
        return [preflight.this_machine(scaling)]
    start_ray()
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if len(found) == 1:
        return [preflight.this_machine(scaling)]
    out, left = [], scaling.least_workers
    for resources in sorted(found, key=lambda r: r.get("CPU", 0.0), reverse=True):
        here = min(left, int(resources.get("CPU", 0.0) // scaling.cpus_per_worker))
        if here:
            out.append(preflight.Node(int(resources.get("memory", 0)) or None, here))
            left -= here
    return out


def run_on_workers(
    fn: WorkerFn,
    scaling: ScalingConfig,
    start_ray: Callable[[], None],
    payload: dict[str, Any],
    *,
    follow: Follow | None = None,
) -> dict[str, Any]:
    """Run `fn(payload, group)` on every worker.

    Args:
        fn: the work; collective over `group`, safe to start again after a kill.
        scaling: how many workers, with what. One: in this process, without Ray.
        start_ray: makes sure that Ray is up.
        payload: handed to every worker. Its `workspace` (a URL), if any, gets a folder for Ray's own files while
        the workers
            run, which machines of a cluster must share; without one that folder is temporary and local.
        follow: show a bar here that follows what worker 0 writes to the file `payload["progress"]`, which is added
            when there are several workers.

    Returns:
        What worker 0 returned.

    Raises:
        DistributedMIError: as raised by a worker; not retried. ConfigError: more workers than the cluster can hold.
        StageError: workers died more often than `scaling.max_failures`, or there was no room for them in time.
    """
    if scaling.most_workers == 1:
        with _torch_threads(scaling.threads(1)):
            return fn(payload, WorkerGroup.alone(_device(scaling)))
    start_ray()
    refuse_if_too_large(scaling)
    with _shared_folder(payload) as folder:
        if follow is None:
            return _run_attempts(fn, scaling, payload, folder)
        progress = f"{folder}/progress.json"
        with following(progress, follow):
            return _run_attempts(fn, scaling, payload | {"progress": progress}, folder)


def _count_text(scaling: ScalingConfig) -> str:
    least, most = scaling.least_workers, scaling.most_workers
    return str(most) if least == most else f"{least} to {most}"


def _run_attempts(
    fn: WorkerFn, scaling: ScalingConfig, payload: dict[str, Any], folder: str
) -> dict[str, Any]:
    """Start the work on the workers there is room for, again and again until it is done."""
    failures, attempt, deadline = 0, 0, None
    while True:
        deadline = deadline or time.monotonic() + scaling.start_timeout_s
        workers = wait_for_room(scaling, deadline)
        attempt_folder = f"{folder}/{attempt:04d}"
        started, room = f"{attempt_folder}/started.json", f"{attempt_folder}/room.json"
        more = {"room": room} if workers < scaling.most_workers else {}
        work = _RayWorker(fn, scaling, payload | more, folder, started, os.getcwd())
        with watching_for_room(scaling, workers, started, room):
            result, failure = _run_on_ray(work, workers, attempt_folder)
        _raise_error(folder)
        if result is not None and not result.get(PAUSED):
            return result
        attempt += 1
        if isinstance(failure, _NoRoomError):  # somebody else was quicker
            continue
        deadline = None
        if failure is None:
            logger.info("there is room for more than %d worker(s); starting again with them", workers)
            continue
        failures += failure.counts
        if failures > scaling.max_failures:
            raise StageError(
                f"the workers failed {failures} times (scaling.max_failures {scaling.max_failures}). "
                f"Run the same command again to continue from the newest checkpoint. Last failure: {failure}"
            ) from failure
        logger.warning(
            "a worker was lost (%d of at most %d failures); starting again", failures, scaling.max_failures
        )


def _config_json(config: TrainConfig) -> bytes:
    values = config.model_dump(mode="json") | {"model": config.model.result_fields()}
    return json.dumps(values, indent=2, sort_keys=True).encode() + b"\n"


def _device(scaling: ScalingConfig) -> torch.device:
    if scaling.gpus_per_worker <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"scaling.gpus_per_worker is {scaling.gpus_per_worker:g} but torch sees no GPU; set it to 0"
        )
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _shared_folder(payload: dict[str, Any]) -> Iterator[str]:
    """A folder that all workers can write, removed at the end."""
    if "workspace" in payload:
        workspace = Workspace(payload["workspace"])
        name = f".ray-{uuid.uuid4().hex[:8]}"
        try:
            yield f"{workspace.absolute_url}/{name}"
        finally:
            if workspace.fs.get_file_info(f"{workspace.root}/{name}").type == pafs.FileType.Directory:
                workspace.fs.delete_dir(f"{workspace.root}/{name}")
        return
    folder = tempfile.mkdtemp(prefix="distributed-mi-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class _AttemptError(Exception):
    """An attempt that ended early, with Ray's explanation."""

    counts = 1
    """What it adds to the failures."""


class _NoRoomError(_AttemptError):
    """The room that was there is taken, or its machine died before the workers started."""

    counts = 0


class _PreemptedError(_AttemptError):
    """A machine was taken away with notice."""

    counts = 0


@dataclass(frozen=True)
class _RayWorker:
    """The function that Ray Train calls in each worker process."""

    fn: WorkerFn
    scaling: ScalingConfig
    payload: dict[str, Any]
    folder: str
    started: str
    """File that worker 0 makes when all are there."""
    directory: str
    """Current directory of the driver, for relative paths."""

    def __call__(self) -> dict[str, Any]:
        """Run the work; leave a message for the driver when it fails for a reason that a restart cannot cure."""
        from ray import train

        _log_in_worker()
        if os.path.isdir(self.directory):
            os.chdir(self.directory)
        torch.set_num_threads(self.scaling.threads(train.get_context().get_local_world_size()))
        group = WorkerGroup.from_torch()
        if group.rank == 0:
            fs, path = resolve_url(self.started)
            write_bytes(fs, path, b"{}\n")
        try:
            return self.fn(self.payload, group)
        except DistributedMIError as error:
            # The other workers may be waiting for this one in a collective. The raise ends the group; the message,
            # which Ray would wrap, reaches the driver through this file.
            _write_error(self.folder, error)
            raise


def _run_on_ray(
    work: _RayWorker, workers: int, folder: str
) -> tuple[dict[str, Any] | None, _AttemptError | None]:
    """One attempt with Ray Train, which restarts nothing itself: what worker 0 returned, or why there is nothing."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # There was room a moment ago; where there is none now, asking again finds out how much is left.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    class Trainer(TorchTrainer):
        """Without an actor that is of no use where Ray runs without a dashboard, and writes a warning every second."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            unwanted = set() if _has_state_api() else {"PlacementGroupCleanerCallback"}
            return [c for c in callbacks if type(c).__name__ not in unwanted]

    api: Any = ray.train  # typed as version 1, which RAY_TRAIN_V2_ENABLED replaces at import
    if (
        len(ray.nodes()) == 1
    ):  # a private Ray: no node is taken away with notice, so nobody has to watch for it
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    fs, path = resolve_url(folder)
    on_gpu = work.scaling.gpus_per_worker > 0
    function: Any = _as_function(work)
    trainer = Trainer(
        function,
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources_per_worker(work.scaling)
        ),
        run_config=api.RunConfig(
            name="workers",
            storage_path=path,
            storage_filesystem=fs,
            failure_config=api.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            logging_config=api.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result: Any = trainer.fit()
    except (TrainingFailedError, ray.exceptions.RayActorError) as error:
        # The latter when Ray Train's controller has died.
        return None, _attempt_error(error)
    if not isinstance(result.return_value, dict):
        raise StageError(f"worker 0 returned {result.return_value!r}, must be a dict")
    return result.return_value, None


def _attempt_error(error: Exception) -> _AttemptError:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError

    kind = _AttemptError
    if isinstance(error, PreemptionError):
        kind = _PreemptedError
    elif isinstance(error, ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupTimeoutError
    ):
        kind = _NoRoomError
    return kind(str(error))


def _log_in_worker() -> None:
    """Ray Train has given the root logger its handlers already; a second one would print every line twice."""
    if logging.getLogger().handlers:
        logging.getLogger("distributed_mi").setLevel(os.environ.get("DMI_LOG_LEVEL", "INFO"))
    else:
        project_logging.setup()


def _as_function(worker: _RayWorker) -> Callable[[], dict[str, Any]]:
    """Ray Train wants a function, not a callable object."""

    def train_function() -> dict[str, Any]:
        return worker()

    return train_function


def _has_state_api() -> bool:
    """Whether Ray's dashboard answers."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        list_nodes(limit=1, timeout=5)
    except (RayStateApiException, ConnectionError):
        return False
    return True


def _write_error(folder: str, error: DistributedMIError) -> None:
    fs, path = resolve_url(folder)
    data = json.dumps({"class": type(error).__name__, "message": str(error)}).encode()
    write_bytes(fs, f"{path}/{_ERROR_FILE}", data)


def _read_error(folder: str) -> dict[str, str] | None:
    fs, path = resolve_url(folder)
    if fs.get_file_info(f"{path}/{_ERROR_FILE}").type != pafs.FileType.File:
        return None
    with fs.open_input_stream(f"{path}/{_ERROR_FILE}") as stream:
        found: dict[str, str] = json.loads(stream.read())
    return found


def _raise_error(folder: str) -> None:
    """Raise what a worker left."""
    found = _read_error(folder)
    if found is None:
        return
    kind = getattr(errors, found["class"], StageError)
    raise kind(found["message"])
