"""The stages joined: which result feeds which, with one Ray for all of them, started only when a stage needs it."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed_mi.core.artifacts import Manifest, Workspace
from distributed_mi.core.errors import WorkspaceError
from distributed_mi.experiment import Experiment, RayConfig
from distributed_mi.training.config import ScalingConfig, TrainConfig

logger = logging.getLogger(__name__)

_SMALL_TABLE_BYTES = 64 << 20
"""Item tables below this size are ranked in the calling process unless the configuration says otherwise."""

STAGES = ("prepare", "embed", "exemplars", "interests", "train", "evaluate")


@dataclass
class RaySession:
    """Starts Ray at the first call and ends at `close` what it started; a run that only skips starts nothing."""

    config: RayConfig
    started: bool = field(default=False, init=False)

    def __call__(self) -> None:
        """Make sure that Ray is up in this process."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        os.environ.setdefault("RAY_worker_niceness", "0")
        import ray

        if ray.is_initialized():
            return
        address = self.config.address or os.environ.get("RAY_ADDRESS")
        if address:
            logger.info("connecting to Ray")
            ray.init(address=address, logging_level=logging.ERROR)
        else:
            num_cpus = self.config.num_cpus or max(4, os.cpu_count() or 1)
            logger.info("starting Ray on this machine: %d logical CPUs", num_cpus)
            ray.init(
                num_cpus=num_cpus,
                object_store_memory=self.config.object_store_mib << 20,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        self.started = True

    def close(self) -> None:
        """End the Ray that this session started."""
        if self.started:
            import ray

            ray.shutdown()
            self.started = False


@dataclass(frozen=True)
class Outcome:
    """What happened to one stage of a run."""

    stage: str
    manifest: Manifest
    skipped: bool
    seconds: float


class Pipeline:
    """An experiment with its workspace; each method runs one stage or finds it done.

    A stage holds the workspace while it runs, so that two at once are refused whoever starts them
    (`WorkspaceLockedError`).
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.workspace = Workspace(experiment.workspace)
        self.start_ray = RaySession(experiment.ray)
        self.outcomes: list[Outcome] = []
        self._holder: int | None = None
        """Thread of this pipeline that holds the workspace."""
        relative = "://" not in experiment.workspace and not Path(experiment.workspace).is_absolute()
        if relative and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            logger.warning(
                "workspace %s is relative, and a job's working directory is a copy that Ray removes: "
                "set workspace=/an/absolute/path or a URL",
                experiment.workspace,
            )

    @contextmanager
    def lock(self, purpose: str) -> Iterator[None]:
        """Hold the workspace over several stages; inside it the stages find it held. See `Workspace.lock`.

        Raises:
            WorkspaceLockedError: another run, or another thread, holds it.
        """
        if self._holder == threading.get_ident():
            yield
            return
        with self.workspace.lock(purpose):
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def prepare(self) -> Manifest:
        """Raw logs -> catalogue and sequences."""
        from distributed_mi.data import stage

        return self._timed(
            "prepare", lambda: stage.run(self.experiment.data, self.workspace, start_ray=self.start_ray)
        )

    def embed(self) -> Manifest:
        """Titles -> item and user vectors."""
        from distributed_mi.text import stage

        return self._timed(
            "embed", lambda: stage.run(self.experiment.embed, self.workspace, start_ray=self.start_ray)
        )

    def exemplars(self) -> Manifest:
        """User vectors -> exemplar users and assignment."""
        from distributed_mi.exemplars import stage

        return self._timed(
            "exemplars",
            lambda: stage.run(self.experiment.exemplars, self.workspace, start_ray=self.start_ray),
        )

    def interests(self) -> Manifest:
        """Exemplars' histories -> interests, as texts and vectors."""
        from distributed_mi.interests import stage

        return self._timed(
            "interests",
            lambda: stage.run(
                self.experiment.interests, self.workspace, encode=self.encode_texts, start_ray=self.start_ray
            ),
        )

    def train(self, config: TrainConfig | None = None) -> Manifest:
        """Sequences (and interests) -> checkpoint of one run; by default the run of the `train` table."""
        from distributed_mi.evaluation.validate import make_validator
        from distributed_mi.training import launcher

        config = config or self.experiment.run_configs()[-1]
        validate = make_validator(
            self.experiment.workspace,
            max_history=config.max_history,
            metrics=(config.validation_metric,),
        )
        return self._timed(
            f"train/{config.run_name}",
            lambda: launcher.run(
                config, self.experiment.scaling, self.workspace, validate=validate, start_ray=self.start_ray
            ),
        )

    def train_dry_run(self) -> tuple[str, str]:
        """What training would need on this machine: a table, and why it cannot fit (empty: it can). Starts nothing."""
        from distributed_mi.training import preflight

        config, scaling = self.experiment.run_configs()[-1], self.experiment.scaling
        sizes = preflight.Sizes.read(config, self.workspace)
        verdict = preflight.judge(config, scaling, sizes, [preflight.this_machine(scaling)])
        return verdict.text, verdict.refusal

    def evaluate(self, run_name: str | None = None) -> Manifest:
        """Checkpoint -> report on the whole catalogue."""
        from distributed_mi.evaluation import stage
        from distributed_mi.training.checkpoint import load_model
        from distributed_mi.training.launcher import run_on_workers

        run_name = run_name or self.experiment.run_configs()[-1].run_name

        def rank() -> Manifest:
            scaling = self._evaluation_scaling(run_name)
            return stage.run(
                self.experiment.evaluate,
                self.workspace,
                run_name=run_name,
                load=load_model,
                run_on_workers=lambda fn, payload: run_on_workers(
                    fn, scaling, start_ray=self.start_ray, payload=payload
                ),
                num_workers=scaling.most_workers,
            )

        return self._timed(f"evaluate/{run_name}", rank)

    def _evaluation_scaling(self, run_name: str) -> ScalingConfig:
        """The workers that rank; see `EvaluateConfig.num_workers`."""
        trained = self.workspace.stage(f"train/{run_name}").require()
        table_bytes = 4 * trained.stats["table_rows"] * trained.config["dim"]
        scaling = self.experiment.scaling
        default = 1 if table_bytes < _SMALL_TABLE_BYTES else scaling.num_workers
        return scaling.model_copy(update={"num_workers": self.experiment.evaluate.num_workers or default})

    def run(self, stages: Sequence[str] = STAGES) -> list[Outcome]:
        """Run the named stages in order, skipping what is done; train and evaluate also run the baselines."""
        with self.lock("run"):
            for name in (s for s in STAGES if s in stages):
                if name == "train":
                    for config in self.experiment.run_configs():
                        self.train(config)
                elif name == "evaluate":
                    for config in self.experiment.run_configs():
                        self.evaluate(config.run_name)
                else:
                    getattr(self, name)()
        return self.outcomes

    def encode_texts(self, texts: Sequence[str]) -> Any:
        """Vectors `[n, T]` float32 of texts, from the encoder and with the scale of the embed stage."""
        from distributed_mi.text.stage import encode_texts

        scale = self.workspace.stage("embed").require().stats["scale"]
        return encode_texts(self.experiment.embed, texts, scale=scale, start_ray=self.start_ray)

    def _timed(self, name: str, run: Callable[[], Manifest]) -> Manifest:
        with self.lock(name):
            before = self.workspace.stage(name).manifest()
            started = time.monotonic()
            logger.info("%s: start", name)
            manifest = run()
            seconds = time.monotonic() - started
        skipped = before is not None and before.created == manifest.created
        logger.info("%s: %s, %.1f s", name, "already done, skipped" if skipped else "done", seconds)
        self.outcomes.append(Outcome(name, manifest, skipped, seconds))
        return manifest

    def reports(self) -> list[dict[str, Any]]:
        """The reports of the experiment's runs, in the order in which they are trained.

        Raises:
            WorkspaceError: a run has not been evaluated.
        """
        import json

        found = []
        for config in self.experiment.run_configs():
            path = f"{self.workspace.stage(f'evaluate/{config.run_name}').base}/report.json"
            try:
                with self.workspace.fs.open_input_stream(path) as stream:
                    found.append(json.loads(stream.read()))
            except FileNotFoundError as error:
                raise WorkspaceError(
                    f"run {config.run_name} has no report: run `distributed-mi evaluate CONFIG`"
                ) from error
        return found
