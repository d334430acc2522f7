"""Configuration of training: `[train]` changes the result, `[scaling]` does not."""

import os
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from distributed_mi.core.config import Component, ConfigModel, runtime
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.losses.config import NegativesConfig


class ModelChoice(Component):
    """Which recommender, with its own fields beside the name (`[train.model] name = "remi"`)."""

    kind: ClassVar[str] = "model"

    name: str = "remi"
    """File name under `distributed_mi/models`, or `package.module:Class` for one of your own."""


class TableConfig(TableOptimizerConfig):
    """The item table: its first values and how its rows are trained."""

    learning_rate: PositiveFloat | None = None
    """Step size of the rows. None: `train.learning_rate`."""
    init_std: PositiveFloat | None = None
    """Standard deviation of the first values of a row. None: sqrt(2 / dim), as in REMI's code (0.177 at dim 64)."""
    exchange: Literal["fp32", "bf16"] = "fp32"
    """Numbers in which rows and row gradients travel between workers. `bf16` halves the bytes and rounds both; rows,
    sums and optimizer state stay float32."""
    placement: Literal["modulo", "hashed", "ranges"] = runtime("modulo")
    """Which worker holds a row: `modulo` (round robin in order of popularity), `hashed`, or `ranges` of neighbouring
    ids with equal load. Changes no result."""
    replicated_rows: NonNegativeInt = runtime(0)
    """Most popular rows of which every worker keeps a copy, trained exactly. Pays where few workers' shards are asked
    for most; changes no result."""


class EngineConfig(ConfigModel):
    """What trains the dense parameters. The item table is trained beside it and never enters it."""

    name: Literal["auto", "deepspeed", "ddp"] = "auto"
    """`ddp` is plain torch with one all-reduce of the dense gradients a step; `deepspeed` can spread optimizer states,
    gradients and parameters over the workers (`zero_stage`). `auto`: DeepSpeed when `zero_stage` asks for it, else
    ddp, which spends less per step on small dense nets and starts sooner (`benchmarks/bench_engine.py`). Same losses
    to rounding."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed only. What is spread over workers: 0 nothing, 1 optimizer states (two thirds of the bytes of the dense
    part), 2 gradients too, 3 parameters too, which are gathered layer by layer. 0 needs one collective a step, which
    suits the small dense nets of recommenders; raise it when the dense part fills a GPU. The item table is spread at
    every stage."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: matrix products of the model in bfloat16 (autocast); parameters, table and optimizers stay float32. On a
    CPU steps of ComiRec-SA and REMI are faster in `fp32`, where they do without autograd."""
    gradient_clipping: NonNegativeFloat = 0.0
    """Largest norm of all dense gradients of a step together; 0 is off. Table rows are not clipped."""
    accumulation: PositiveInt = 1
    """Parts into which each worker cuts its share of a step, to save memory. Loss terms that look at other users of
    the step see those of the same part only."""

    @property
    def uses_deepspeed(self) -> bool:
        """Whether `name` and `zero_stage` mean DeepSpeed."""
        return self.name == "deepspeed" or self.zero_stage > 0

    @model_validator(mode="after")
    def _stage_needs_deepspeed(self) -> Self:
        if self.name == "ddp" and self.zero_stage > 0:
            raise ValueError(
                f'zero_stage {self.zero_stage} needs name = "deepspeed" or "auto"; ddp spreads nothing'
            )
        return self


class TrackingConfig(ConfigModel):
    """Where metrics go beside the run's `metrics.jsonl`: loss and its terms, validation metrics, users/s, shares."""

    name: Literal["none", "tensorboard", "mlflow"] = runtime("none")
    """`tensorboard` writes event files, `mlflow` sends to a tracking server or database. Each needs its library (extras
    `tensorboard` and `mlflow`)."""
    directory: str | None = runtime(None)
    """Folder of TensorBoard's event files. None: `tensorboard` in the run's folder."""
    uri: str | None = runtime(None)
    """Tracking URI of MLflow (`http://host:5000`, `sqlite:///runs.db`). None: `MLFLOW_TRACKING_URI`, else MLflow's own
    default."""
    experiment: str = runtime("distributed_mi")
    """Name of the MLflow experiment; made when it does not exist."""


class TrainConfig(ConfigModel):
    """Model, loss, optimizer, schedule and seed of one run."""

    run: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, under which `train/<run>` and `evaluate/<run>` are kept. None: the model's name."""
    model: ModelChoice = ModelChoice()
    """The recommender and its fields."""
    seed: int = 2021
    """Seed of everything random: first values, batches, negatives, dropout."""
    dim: PositiveInt = 64
    """D, width of item vectors and interests."""
    max_history: PositiveInt = 20
    """L, newest items of a history that the model reads."""
    max_steps: PositiveInt = 100_000
    """Steps at most; early stopping usually ends a run sooner."""
    num_users_per_step: PositiveInt = 128
    """Users of a step over all workers; each worker takes its share, so the number of workers does not change
    results."""
    min_position: PositiveInt = 4
    """First position (from 0) that may be a target, so a target has at least this many items before it."""
    learning_rate: PositiveFloat = 1e-3
    """Step size of Adam for dense parameters, and of the table unless it has its own."""
    table: TableConfig = TableConfig()
    """First values and optimizer of the item table."""
    negatives: NegativesConfig = NegativesConfig()
    """The items that targets are compared with."""
    engine: EngineConfig = EngineConfig()
    """What trains the dense parameters."""
    validate_every: PositiveInt = 500
    """Steps between two validations; the last step is validated too."""
    validation_metric: str = "recall@50"
    """Metric on validation users that picks the best checkpoint; higher is better."""
    patience: NonNegativeInt = 20
    """Validations in a row without improvement after which training stops; 0 never stops early."""
    checkpoint_every: PositiveInt = runtime(500)
    """Steps between two checkpoints: what a killed run loses at most, and with `checkpoint_async` the steps taken while
    one is being written. Improved validations are kept too."""
    checkpoint_async: bool = runtime(True)
    """Write checkpoints from a thread while training goes on. Needs room for a copy of the worker's rows and their
    optimizer's state; a worker for which that copy is more than half of its share of the machine's free memory writes
    them before its next step instead. The checkpoints are the same."""
    keep_checkpoints: PositiveInt = runtime(2)
    """Newest checkpoints to keep; the best one is kept besides."""
    log_every: PositiveInt = runtime(50)
    """Steps between two lines of `metrics.jsonl`; losses are checked for NaN at this interval."""
    prefetch: NonNegativeInt = runtime(8)
    """Steps whose batches (sampling, padding, negatives, text vectors) each worker prepares ahead: by a thread beside
    a GPU, which holds as many, or so many at once between steps on a CPU. The numbers are the same. 0: each step makes
    its batch first."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = runtime(None)
    """First and last step (from 1) to trace with torch's profiler on worker 0; the trace is written to `profile` in
    the run's folder. None: off. A traced step is slower, and a trace grows by about a megabyte a step."""
    tracking: TrackingConfig = TrackingConfig()
    """TensorBoard or MLflow beside `metrics.jsonl`."""
    force: bool = runtime(False)
    """Start although the preflight predicts more memory than there is (`--force`)."""

    @field_validator("profile_steps")
    @classmethod
    def _profile_in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(f"the first step to trace ({steps[0]}) comes after the last one ({steps[1]})")
        return steps

    @property
    def run_name(self) -> str:
        """`run`, or else the model's name."""
        return self.run or self.model.name.rsplit(":", 1)[-1]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ScalingConfig(ConfigModel):
    """Workers and what each holds. Steps count users over all workers, so nothing here changes results."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] | None = runtime(None)
    """Training workers; [least, most]: as many as the cluster has room for, fewer after a machine was lost, more from
    the next checkpoint on when there is room again. None: 2 where two cores exist, else 1. One worker runs in this
    process, without Ray."""
    gpus_per_worker: NonNegativeFloat = runtime(0.0)
    """GPUs of each worker; above 0 the workers talk through NCCL, else through gloo."""
    cpus_per_worker: PositiveFloat = runtime(1.0)
    """Logical CPUs that Ray reserves for each worker."""
    threads_per_worker: PositiveInt | None = runtime(None)
    """Threads of each worker. None: 1 on a CPU, because threads that wait for each other stop when the cores are busy
    (two threads of torch on two loaded cores: 7 to 11 times slower); with GPUs the machine's cores divided by the
    workers on it. On two idle cores 2 threads take 0.69 of the time of one for a float32 step of REMI with 128
    users (`benchmarks.bench_train_step`), 0.86 for YouTube DNN (benchmarks/LOG.md)."""
    max_failures: NonNegativeInt = runtime(3)
    """Restarts after a worker died; each resumes from the newest complete checkpoint."""
    autoscaling: bool = runtime(False)
    """Whether the cluster adds machines on demand. False: workers that all its machines together have no room for are
    refused at once instead of waited for."""
    start_timeout_s: PositiveFloat = runtime(900.0)
    """Seconds to wait for room for the (least) workers before the stage stops: others may hold the machines, one may
    have been lost, or they are still being added."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _num_workers_in_order(cls, value: Any) -> Any:
        counts = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if any(isinstance(n, int) and n < 1 for n in counts):
            raise ValueError("at least 1 worker is needed; leave it out for the default")
        if len(counts) == 2 and all(isinstance(n, int) for n in counts) and counts[0] > counts[1]:
            raise ValueError(f"[least, most] must ascend: [{counts[1]}, {counts[0]}]")
        return value

    @property
    def least_workers(self) -> int:
        """Workers without which the work does not start."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.most_workers

    @property
    def most_workers(self) -> int:
        """Workers when there is room for all."""
        if isinstance(self.num_workers, tuple):
            return self.num_workers[1]
        return self.num_workers or (2 if available_cores() >= 2 else 1)

    def threads(self, local_workers: int) -> int:
        """Threads of torch in a worker that shares its machine with `local_workers - 1` others."""
        if self.threads_per_worker is not None:
            return self.threads_per_worker
        return max(1, available_cores() // local_workers) if self.gpus_per_worker > 0 else 1
