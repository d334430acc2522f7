"""The experiment file: one table for each stage, checked as a whole before anything runs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import PositiveInt

from distributed_mi.core.config import (
    ConfigModel,
    apply_overrides,
    check_components,
    load_toml,
    place_in,
    runtime,
    validate,
)
from distributed_mi.core.errors import ConfigError, DistributedMIError
from distributed_mi.data.config import DataConfig
from distributed_mi.evaluation.config import EvaluateConfig, parse_metric
from distributed_mi.exemplars.config import ExemplarsConfig
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.text.config import EmbedConfig
from distributed_mi.text.source import local_directory, looks_local
from distributed_mi.training.config import ModelChoice, ScalingConfig, TrainConfig


class RayConfig(ConfigModel):
    """How Ray is started when no cluster is named (`RAY_ADDRESS`, which `ray job submit` sets)."""

    address: str | None = runtime(None)
    """Address of a running cluster. None: `RAY_ADDRESS` when it is set, else a private Ray on this machine."""
    num_cpus: PositiveInt | None = runtime(None)
    """Logical CPUs of a private Ray. None: the cores, and at least 4 so that no graph of tasks stalls."""
    object_store_mib: PositiveInt = runtime(512)
    """Object store of a private Ray, in MiB; blocks beyond it spill to disk."""


class Experiment(ConfigModel):
    """Every table of an experiment file."""

    workspace: str = runtime("artifacts/workspace")
    """Directory of the results: a local path or an object-store URL. A relative path counts from the current folder."""
    data: DataConfig = DataConfig()
    """prepare: raw logs, filters, split."""
    embed: EmbedConfig = EmbedConfig()
    """embed: text encoder and pooling."""
    exemplars: ExemplarsConfig = ExemplarsConfig()
    """exemplars: affinity propagation."""
    interests: InterestsConfig = InterestsConfig()
    """interests: backend, prompt and limits."""
    train: TrainConfig = TrainConfig()
    """train: model, loss, optimizer, schedule, seed."""
    baselines: tuple[ModelChoice, ...] = ()
    """Models that `run` trains and evaluates with the settings of `train`, each as a run named after its model."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """evaluate: metrics and intervals."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers and what each holds. Results do not depend on it."""
    ray: RayConfig = RayConfig()
    """How Ray is reached or started."""

    def run_configs(self) -> list[TrainConfig]:
        """The training runs of `run`, baselines first: one `TrainConfig` each.

        Raises:
            ConfigError: two of them have one name, so that one would overwrite the other.
        """
        others = [self.train.model_copy(update={"run": None, "model": b}) for b in self.baselines]
        runs = [c.model_copy(update={"run": c.run_name}) for c in [*others, self.train]]
        for name, count in Counter(c.run_name for c in runs).items():
            if count > 1:
                raise ConfigError(
                    f'two runs would be named "{name}": a baseline is named after its model. Remove one [[baselines]], '
                    "give train.run another name, or train the other one from a file of its own in this workspace."
                )
        return runs


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read and check an experiment file, the fields of every named choice included, at any depth.

    Args:
        path: a TOML file; `quickstart` or another name of `jobs/configs` is found too.
        overrides: `table.field=value` texts, applied in order.

    Raises:
        ConfigError: file, line and field of what is wrong, with the nearest known name.
    """
    path = find(path)
    experiment = validate(Experiment, apply_overrides(load_toml(path), overrides), source=str(path))
    check_components(experiment, source=str(path))
    with _about("baselines", path):
        experiment.run_configs()
    with _about("train.validation_metric", path):
        parse_metric(experiment.train.validation_metric)
    with _about("embed.model", path):
        if experiment.embed.model is not None and looks_local(experiment.embed.model):
            local_directory(experiment.embed.model)
    return experiment


@contextmanager
def _about(field: str, path: Path) -> Iterator[None]:
    """Name field, file and line in an error about the value of a field that another package reads."""
    try:
        yield
    except DistributedMIError as error:
        text = str(error).removeprefix(f"{field}: ")
        raise ConfigError(f"{field}: {text}{place_in(str(path), field)}") from error


def find(path: str | Path) -> Path:
    """The file itself, or the shipped configuration of that name.

    Raises:
        ConfigError: neither exists; lists the shipped ones.
    """
    path = Path(path)
    if path.is_file():
        return path
    here = Path(__file__).resolve().parent
    folders = [here / "_configs", here.parent / "jobs" / "configs"]
    for folder in folders:
        for candidate in (folder / path.name, folder / f"{path.name}.toml"):
            if candidate.is_file() and path.parent in (Path("."), Path("jobs/configs")):
                return candidate
    shipped = sorted({p.stem for folder in folders for p in folder.glob("*.toml")})
    raise ConfigError(f"configuration file not found: {path}. Shipped: {', '.join(shipped)}")
