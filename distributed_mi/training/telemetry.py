"""What a run says about itself while it runs: rates and shares, time to go, a tracker of metrics, a profiler's trace.

metrics.jsonl     always; `loop.MetricsLog`
TensorBoard       `[train.tracking] name = "tensorboard"`; optional library
MLflow            `[train.tracking] name = "mlflow"`; optional library
profile/*.json    `train.profile_steps = [from, to]`; opens in chrome://tracing or https://ui.perfetto.dev
"""

import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs
import torch

from distributed_mi.core.artifacts import write_bytes
from distributed_mi.core.errors import ConfigError, MissingDependencyError
from distributed_mi.embeddings.counters import TableCounters
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.table import ItemTable
from distributed_mi.training.config import TrackingConfig, TrainConfig

logger = logging.getLogger(__name__)

ESTIMATE_AFTER = 20
"""Steps of an attempt after which the time to go is said."""
_WARM_UP = 5
"""Steps at the start of an attempt that are no measure of the others."""


@dataclass(frozen=True)
class StretchFacts:
    """What several steps cost, over all workers."""

    exchange_share: float
    """Part of the time that workers spent in the exchanges of the item table, waiting for each other included."""
    update_share: float
    """Part of the time that the update of table rows took."""
    wait_share: float
    """Part of the time that the loop waited for batches."""
    unique_share: float
    """Distinct ids of a lookup over all of its ids: what is fetched of what is asked for; 1 if nothing was counted."""
    exchanged_mb_per_step: float
    """Megabytes sent by all workers in a step."""
    table_gb: float
    """Gigabytes of rows and optimizer state on all workers."""

    def values(self) -> dict[str, float]:
        """Rounded, for a log line."""
        return {name: float(f"{value:.4g}") for name, value in vars(self).items()}


class StretchMeter:
    """Collects the costs of a stretch of steps on this worker."""

    def __init__(self, table: ItemTable, group: WorkerGroup) -> None:
        self.table, self.group = table, group
        self.wait_seconds = 0.0
        """Spent waiting for batches; the loop adds to it."""
        self._table_bytes = float(sum(t.numel() * t.element_size() for t in table.state()[1].values()))

    def take(self, seconds: float, steps: int) -> StretchFacts:
        """Facts since the last call. Collective: one exchange of eight numbers.

        Args:
            seconds: that this worker needed.
            steps: that it did.
        """
        counted: TableCounters = self.table.take_counters()
        mine = [seconds, counted.exchange_seconds, counted.update_seconds, self.wait_seconds]
        mine += [counted.ids, counted.unique_ids, counted.exchanged_bytes, self._table_bytes]
        self.wait_seconds = 0.0
        total = torch.tensor(mine, dtype=torch.float64).to(self.group.device)
        wall, exchange, update, wait, ids, unique, sent, table = self.group.all_reduce_sum(total).tolist()
        wall = max(wall, 1e-9)
        return StretchFacts(
            exchange_share=exchange / wall,
            update_share=update / wall,
            wait_share=wait / wall,
            unique_share=unique / ids if ids else 1.0,
            exchanged_mb_per_step=sent / 1e6 / max(steps, 1),
            table_gb=table / 1e9,
        )


class TimeToGo:
    """Says once, after `ESTIMATE_AFTER` steps of an attempt, how long the rest will take."""

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        self.config, self.first_step = config, first_step
        self._since = 0.0
        self.text = ""
        """What was said; empty before."""

    def after(self, step: int) -> None:
        """Look at the clock after a step."""
        done = step - self.first_step
        if done == _WARM_UP:
            self._since = time.monotonic()
        elif done == ESTIMATE_AFTER:
            step_s = (time.monotonic() - self._since) / (ESTIMATE_AFTER - _WARM_UP)
            self.text = self.estimate(step, step_s)
            logger.info("train %s: %s", self.config.run_name, self.text)

    def estimate(self, step: int, step_s: float) -> str:
        """Time to the end and to the next validation, from the seconds of a step; validations are not counted."""
        config = self.config
        next_validation = min(config.max_steps, (step // config.validate_every + 1) * config.validate_every)
        return (
            f"{1000 * step_s:,.1f} ms a step: about {_duration((config.max_steps - step) * step_s)} for max_steps "
            f"({config.max_steps:,}), {_duration((next_validation - step) * step_s)} to the next validation "
            f"(step {next_validation:,})"
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


class Profile:
    """Traces the steps of `train.profile_steps` with `torch.profiler` and writes a file for a trace viewer."""

    def __init__(
        self, steps: tuple[int, int], fs: pafs.FileSystem, folder: str, device: torch.device
    ) -> None:
        """Prepare.

        Args:
            steps: first and last step of the trace, counted from 1.
            fs: where the run lies.
            folder: of the trace.
            device: a CUDA device is traced too.
        """
        self.first, self.last = steps
        self.fs, self.path = fs, f"{folder}/steps-{self.first}-{self.last}.json"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler: Any = torch.profiler.profile(activities=activities, record_shapes=True)
        self._running = False

    def before(self, step: int) -> None:
        """Start when the step about to be made (from 1) is the first of the trace, or lies inside after a resume."""
        if not self._running and self.first <= step <= self.last:
            self._profiler.start()
            self._running = True

    def span(self, name: str) -> AbstractContextManager[Any]:
        """Names in the trace what happens within; compiled code does not show by itself."""
        return torch.profiler.record_function(name) if self._running else nullcontext()

    def after(self, step: int) -> None:
        """Stop after the last step and write the trace."""
        if not self._running or step < self.last:
            return
        self._running = False
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(trace))
            write_bytes(self.fs, self.path, trace.read_bytes())
        logger.info("profile of steps %d to %d: %s (chrome://tracing)", self.first, self.last, self.path)


class Tracker(Protocol):
    """Where metrics go beside `metrics.jsonl`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of a step."""

    def close(self) -> None:
        """Write what is buffered."""


class NoTracker:
    """Keeps nothing: what the other workers and untracked runs have."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Forget the values."""

    def close(self) -> None:
        """Nothing is open."""


class TensorBoard:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, directory: str, *, first_step: int) -> None:
        """Open the files; what an earlier attempt wrote after `first_step` is declared void.

        Raises:
            MissingDependencyError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                'train.tracking.name "tensorboard" needs the tensorboard library: '
                "pip install 'distributed_mi[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(directory, purge_step=first_step + 1)  # type: ignore[no-untyped-call]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()  # type: ignore[no-untyped-call]


class MLflow:
    """A run of an MLflow experiment; a resumed training continues its run."""

    TAG = "distributed_mi.generation"

    def __init__(
        self, config: TrackingConfig, *, run_name: str, generation: str, fields: Mapping[str, Any]
    ) -> None:
        """Find or start the run.

        Args:
            config: URI and experiment.
            run_name: name of the training run.
            generation: identity of the training; the MLflow run carries it as a tag and is found by it again.
            fields: parameters to show beside the metrics.

        Raises:
            MissingDependencyError: mlflow is not installed.
        """
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise MissingDependencyError(
                "train.tracking.name \"mlflow\" needs the mlflow library: pip install 'distributed_mi[mlflow]'"
            ) from error
        self._client = MlflowClient(tracking_uri=config.uri)
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
        earlier = self._client.search_runs([experiment], f"tags.`{self.TAG}` = '{generation}'", max_results=1)
        if earlier:
            self._run_id = earlier[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {self.TAG: generation}
            run = self._client.create_run(experiment, tags=tags, run_name=run_name)
            self._run_id = run.info.run_id
            for name, value in fields.items():
                self._client.log_param(self._run_id, name, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        for name, value in values.items():
            # MLflow's names may not hold "@".
            self._client.log_metric(self._run_id, name.replace("@", "_at_"), value, step=step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self._run_id)


def open_tracker(
    config: TrainConfig, *, fs: pafs.FileSystem, folder: str, first_step: int, group: WorkerGroup
) -> Tracker:
    """The configured tracker on worker 0, `NoTracker` elsewhere.

    Args:
        config: of the run.
        fs: where the run lies.
        folder: of the run; its last part is the identity of the training.
        first_step: steps that are done already.
        group: the workers.

    Raises:
        MissingDependencyError: the library is not installed. ConfigError: TensorBoard needs a directory.
    """
    tracking = config.tracking
    if group.rank != 0 or tracking.name == "none":
        return NoTracker()
    if tracking.name == "mlflow":
        fields = {"model": config.model.name, "workers": group.size, "seed": config.seed, "dim": config.dim}
        fields |= {"num_users_per_step": config.num_users_per_step, "learning_rate": config.learning_rate}
        generation = folder.rstrip("/").rsplit("/", 1)[-1]
        return MLflow(tracking, run_name=config.run_name, generation=generation, fields=fields)
    directory = tracking.directory
    if directory is None and not isinstance(fs, pafs.LocalFileSystem):
        raise ConfigError("train.tracking.directory must be set: the workspace is not on a local file system")
    directory = directory or f"{folder}/tensorboard"
    logger.info("TensorBoard: tensorboard --logdir %s", directory)
    return TensorBoard(directory, first_step=first_step)
