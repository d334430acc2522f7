"""The training loop: steps, validation, early stopping, checkpoints, `metrics.jsonl`. Knows no Ray.

One process of a group runs this beside the others, in lockstep; what is decided (best, stop) is decided from
numbers that all of them have. The order of work after a step is fixed: losses, then validation, then checkpoint. So
a checkpoint knows the validation of its own step, and a run that continues from it does exactly what the
undisturbed run did.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import pyarrow.fs as pafs
import torch
from torch import Tensor

from distributed_mi.core.artifacts import write_bytes
from distributed_mi.core.cpu import threads_for_kernels
from distributed_mi.core.errors import StageError
from distributed_mi.core.seeding import stream_key
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.table import ItemTable
from distributed_mi.models.base import Recommender, TrainBatch
from distributed_mi.training.checkpoint import CheckpointStore, Keep, ModelSpec
from distributed_mi.training.config import TrainConfig
from distributed_mi.training.engine import Engine
from distributed_mi.training.prefetch import InBlocks, Prefetched, StepSource
from distributed_mi.training.telemetry import (
    NoTracker,
    Profile,
    StretchMeter,
    TimeToGo,
    Tracker,
    open_tracker,
)

logger = logging.getLogger(__name__)

ValidateFn = Callable[[Recommender, WorkerGroup], dict[str, float]]
"""Metrics of a model on validation users, identical on all workers. Collective. Travels to workers by
cloudpickle."""


class ProgressBar(Protocol):
    """What the loop reports to; see `core.progress.Bar`."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished steps."""


@dataclass
class TrainState:
    """What the loop remembers between steps; stands in every checkpoint."""

    step: int = 0
    """Finished steps."""
    best_step: int = 0
    """Step of the best validation; 0 before the first."""
    best_metric: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    """All metrics of the best validation."""
    last_metric: float | None = None
    """Of the newest validation."""
    validations_without_gain: int = 0
    stop_reason: str = ""
    """Why training ended; empty while it goes on."""
    train_seconds: float = 0.0
    """Spent in steps, without validation and checkpoints, over all attempts."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Run:
    """The parts that a loop drives."""

    model: Recommender
    spec: ModelSpec
    table: ItemTable
    engine: Engine
    group: WorkerGroup
    batches: StepSource
    validate: ValidateFn
    store: CheckpointStore
    bar: ProgressBar
    wants_pause: Callable[[], bool] = _never
    """Asked on worker 0 after each checkpoint: whether to stop here and go on with other workers."""


class Trainer:
    """Trains until the budget or the patience ends; `train` may be called again after any interruption."""

    def __init__(self, config: TrainConfig, run: Run, *, fs: pafs.FileSystem, metrics_path: str) -> None:
        self.config, self.run = config, run
        self.log = MetricsLog(fs, metrics_path, writes=run.group.rank == 0)
        self.state = TrainState()
        self._folder = metrics_path.rsplit("/", 1)[0]
        self.paused = False
        """Whether `train` ended before its time because `Run.wants_pause` said so."""
        self._pending: list[Tensor] = []
        self._pending_since = 0.0
        self._source: InBlocks | Prefetched | None = None
        self._meter = StretchMeter(run.table, run.group)
        self._tracker: Tracker = NoTracker()
        self._profile: Profile | None = None
        if config.profile_steps and run.group.rank == 0:
            self._profile = Profile(config.profile_steps, fs, f"{self._folder}/profile", run.group.device)
        self._dropout_key = stream_key(config.seed, f"dropout/{run.group.rank}")
        on_cpu = run.group.device.type == "cpu" and config.engine.precision == "fp32"
        compiled = run.model.is_compiled and on_cpu and not config.engine.uses_deepspeed
        self._threads = threads_for_kernels if compiled else nullcontext
        self._row_learning_rate = config.table.learning_rate or config.learning_rate
        run.model.train()

    def train(self) -> TrainState:
        """Resume from the newest complete checkpoint, if any, and train to the end.

        Returns:
            The final state; `best_step` has a checkpoint. When `paused` is set, the state of the last checkpoint.

        Raises:
            StageError: a loss is not finite; names the step and the last good checkpoint. CheckpointError: the
                checkpoint to resume from is damaged.
        """
        self._resume()
        self._tracker = open_tracker(
            self.config,
            fs=self.log.fs,
            folder=self._folder,
            first_step=self.state.step,
            group=self.run.group,
        )
        to_go = TimeToGo(self.config, self.state.step)
        try:
            with torch.random.fork_rng(devices=[]):
                while not self.state.stop_reason and not self.paused:
                    self._advance(to_go)
            self.run.store.wait()
        except BaseException:
            self.run.store.give_up()
            raise
        finally:
            self.close()
        return self.state

    def close(self) -> None:
        """End what prepares batches and lookups, and the tracker."""
        if self._source is not None:
            self._source.close()
        self._source = None
        self.run.table.forget_announced()
        self._tracker.close()

    def _resume(self) -> None:
        manifest = self.run.store.newest()
        if manifest is None:
            self.log.truncate(0)
            return
        self.run.store.restore(manifest, self.run.engine, self.run.table)
        self.state = TrainState(**manifest.state)
        self.log.truncate(self.state.step)
        self.run.bar.advance(self.state.step)
        if self.run.group.rank == 0:
            logger.info("continuing from the checkpoint of step %s", f"{self.state.step:,}")

    def _advance(self, to_go: TimeToGo) -> None:
        config, state = self.config, self.state
        if self._profile:
            self._profile.before(state.step + 1)
        self.step()
        if self._profile:
            self._profile.after(state.step)
        if self.run.group.rank == 0:
            to_go.after(state.step)
        last = state.step >= config.max_steps
        validation_due = last or state.step % config.validate_every == 0
        checkpoint_due = last or state.step % config.checkpoint_every == 0
        if validation_due or checkpoint_due or state.step % config.log_every == 0:
            self._flush_losses()
        improved = self._validate() if validation_due else False
        if last and not state.stop_reason:
            state.stop_reason = "max_steps"
        self.run.store.check()
        if checkpoint_due or improved or state.stop_reason:
            self._checkpoint()
        if checkpoint_due and not state.stop_reason:
            group = self.run.group
            self.paused = group.broadcast_json(group.rank == 0 and self.run.wants_pause())

    def step(self) -> None:
        """One step, without looking at its loss, validation or checkpoint."""
        run, state = self.run, self.state
        if self._source is None:
            beside = self.config.prefetch > 0 and run.group.device.type != "cpu"
            ahead = Prefetched if beside else InBlocks
            self._source = ahead(run.batches, max(1, self.config.prefetch))
        started = time.monotonic()
        if not self._pending:
            self._pending_since = started
        self._seed_dropout(state.step)
        batches = self._source(state.step)
        upcoming: Sequence[TrainBatch] = ()
        if run.group.size > 1 and state.step + 1 < self.config.max_steps:
            upcoming = self._source.peek(state.step + 1)
        self._meter.wait_seconds += time.monotonic() - started
        for batch in upcoming:
            run.table.announce(*run.model.step_ids(batch))
        with self._threads():
            with self._span("engine.step"):
                self._pending.append(run.engine.step(batches, run.batches.num_users))
            with self._span("table.step"):
                run.table.step(self._row_learning_rate)
        state.step += 1

    def _span(self, name: str) -> AbstractContextManager[Any]:
        return self._profile.span(name) if self._profile else nullcontext()

    def _seed_dropout(self, step: int) -> None:
        """Dropout is a function of (seed, worker, step) like everything else, so a resumed run draws the same masks."""
        # Not torch.manual_seed: while no GPU is in use it keeps a stack trace of every call, a quarter millisecond.
        seed = (self._dropout_key + step) % (1 << 63)
        torch.default_generator.manual_seed(seed)
        if self.run.group.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _flush_losses(self) -> None:
        """Sum the steps' losses over workers in one exchange, check them, log their mean."""
        if not self._pending:
            return
        local_ST = torch.stack(self._pending).to(self.run.group.device)
        losses_ST = self.run.group.all_reduce_sum(local_ST).cpu()
        self._pending.clear()
        steps, names = len(losses_ST), self.run.engine.term_names
        self._refuse_not_finite(losses_ST, names)
        seconds = time.monotonic() - self._pending_since
        self.state.train_seconds += seconds
        users_per_s = steps * self.run.batches.num_users / max(seconds, 1e-9)
        terms = {n: float(v) for n, v in zip(names, losses_ST.double().mean(0), strict=True)}
        loss = sum(terms.values())
        facts = self._meter.take(seconds, steps).values()
        rate = round(users_per_s, 1)
        self.log.append(
            "train", self.state, loss=loss, terms=terms, steps=steps, users_per_s=rate, costs=facts
        )
        tracked = {
            "loss": loss,
            **{f"loss_terms/{n}": v for n, v in terms.items()},
            "users_per_s": rate,
            **facts,
        }
        self._tracker.log(self.state.step, tracked)
        self.run.bar.advance(steps, self._note(loss, users_per_s, facts))

    def _note(self, loss: float, users_per_s: float, facts: dict[str, float]) -> str:
        """What stands behind the numbers of the progress bar."""
        parts = [f"loss {loss:.4f}", f"{users_per_s:,.0f} users/s"]
        if self.state.last_metric is not None:
            best = "best" if self.state.last_metric == self.state.best_metric else f"best {self._best_text()}"
            parts.append(f"{self.config.validation_metric} {self.state.last_metric:.4f} ({best})")
        if self.run.group.size > 1:
            parts.append(f"exchange {facts['exchange_share']:.0%}")
        parts += [f"unique ids {facts['unique_share']:.0%}", f"table {facts['table_gb']:.2g} GB"]
        return ", ".join(parts)

    def _refuse_not_finite(self, losses_ST: Tensor, names: list[str]) -> None:
        bad = (~torch.isfinite(losses_ST)).any(dim=1).nonzero().flatten()
        if not len(bad):
            return
        row = losses_ST[int(bad[0])]
        step = self.state.step - len(losses_ST) + int(bad[0]) + 1
        values = ", ".join(f"{n} {float(v):g}" for n, v in zip(names, row, strict=True))
        self.run.store.wait()
        kept = self.run.store.newest()
        where = f"the checkpoint of step {kept.step} is good" if kept else "there is no checkpoint yet"
        self.log.write()
        raise StageError(
            f"train: the loss of step {step} is not finite ({values}); {where} and nothing was written after it. "
            "Lower train.learning_rate, or set train.engine.gradient_clipping, and run again."
        )

    def _validate(self) -> bool:
        """Run a validation; True when it is the best so far."""
        config, state = self.config, self.state
        started = time.monotonic()
        self.run.model.eval()
        with torch.no_grad(), self.run.engine.whole_model() as model:
            metrics = self.run.validate(model, self.run.group)
        self.run.model.train()
        value = metrics.get(config.validation_metric)
        if value is None or not math.isfinite(value):
            raise StageError(
                f"train: validation gave {value} for train.validation_metric {config.validation_metric!r}; "
                f"it measured {', '.join(metrics) or 'nothing'}"
            )
        state.last_metric = value
        improved = state.best_metric is None or value > state.best_metric
        if improved:
            state.best_step, state.best_metric, state.best_metrics = state.step, value, dict(metrics)
            state.validations_without_gain = 0
        else:
            state.validations_without_gain += 1
            if config.patience and state.validations_without_gain >= config.patience:
                state.stop_reason = "patience"
        self.log.append(
            "validation",
            state,
            metrics=metrics,
            best_step=state.best_step,
            seconds=round(time.monotonic() - started, 3),
        )
        self._tracker.log(state.step, metrics)
        if self.run.group.rank == 0:
            note = "best so far" if improved else f"best {self._best_text()}"
            logger.info("step %s: %s %.4f (%s)", f"{state.step:,}", config.validation_metric, value, note)
        return improved

    def _checkpoint(self) -> None:
        run, state = self.run, self.state
        self.log.write()
        keep = Keep(self.config.keep_checkpoints, state.best_step)
        run.store.save(state.step, run.spec, run.engine, run.table, asdict(state), keep)

    def _best_text(self) -> str:
        return f"{self.state.best_metric:.4f} at step {self.state.best_step:,}"


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, `kind` train or validation, in step order.

    Kept in memory and written whole, because object stores cannot append; worker 0 writes.
    """

    def __init__(self, fs: pafs.FileSystem, path: str, *, writes: bool) -> None:
        self.fs, self.path, self.writes = fs, path, writes
        self.lines: list[dict[str, Any]] = []

    def append(self, kind: str, state: TrainState, **values: Any) -> None:
        """Add a line for the current step."""
        train_seconds = round(state.train_seconds, 3)
        self.lines.append({"kind": kind, "step": state.step, **values, "train_seconds": train_seconds})

    def truncate(self, step: int) -> None:
        """Take over what an earlier attempt wrote up to a step; the rest will be done again."""
        self.lines = [line for line in read_metrics(self.fs, self.path) if line["step"] <= step]

    def write(self) -> None:
        """Replace the file."""
        if self.writes:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_bytes(self.fs, self.path, text.encode())


def read_metrics(fs: pafs.FileSystem, path: str) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; none when there is no file."""
    if fs.get_file_info(path).type != pafs.FileType.File:
        return []
    with fs.open_input_stream(path) as stream:
        return [json.loads(line) for line in stream.read().decode().splitlines()]
