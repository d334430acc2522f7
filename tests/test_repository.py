"""The repository agrees with itself: documented fields, loadable configurations, one version of Ray, a clean tree."""

import importlib
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest
import yaml

import distributed_mi
from distributed_mi.cli import STAGE_TABLES, field_help, main
from distributed_mi.core.config import Component, ConfigModel
from distributed_mi.core.registry import KINDS, choices
from distributed_mi.data.config import FilterConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "distributed_mi"

TOP_LEVEL = {
    *("pyproject.toml", "cluster", "distributed_mi", "jobs", "benchmarks", "tests"),
    *("README.md", "LICENSE", "CHANGELOG.md", ".gitignore", ".ci"),
}


def repository_files() -> list[Path]:
    """What git tracks or would track; without git, every file outside of hidden and build folders."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found = [ROOT / name for name in done.stdout.split("\0") if name]
    else:
        ignored = {"__pycache__", "artifacts", "build", "dist", "venv"}
        found = [
            p
            for p in ROOT.rglob("*")
            if not any(
                part in ignored or (part[0] == "." and part not in TOP_LEVEL)
                for part in p.relative_to(ROOT).parts
            )
        ]
    return sorted(p for p in found if p.is_file())


FILES = repository_files()
CONFIGS = sorted((ROOT / "jobs" / "configs").rglob("*.toml"))


# Every field of every configuration model is documented.


def config_models() -> Iterator[type[ConfigModel]]:
    """Every configuration model of the package: importing all modules that hold one, then walking the subclasses."""
    for path in sorted(PACKAGE.rglob("config.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    importlib.import_module("distributed_mi.experiment")
    for kind, (folder, _) in KINDS.items():
        for name in choices(kind):
            importlib.import_module(f"distributed_mi.{folder.replace('/', '.')}.{name}")
    todo = list(ConfigModel.__subclasses__())
    while todo:
        model = todo.pop()
        todo += model.__subclasses__()
        if model.__module__.startswith("distributed_mi."):
            yield model


def undocumented(model: type[ConfigModel]) -> list[str]:
    """Fields without a docstring, and the model itself when it has none."""
    own = [] if (model.__doc__ or "").strip() else [model.__qualname__]
    fields = model.model_fields.items()
    return own + [
        f"{model.__qualname__}.{name}" for name, field in fields if not (field.description or "").strip()
    ]


def test_every_configuration_field_has_a_docstring() -> None:
    models = list(config_models())
    assert len(models) > 10
    assert [text for model in models for text in undocumented(model)] == []


def test_a_field_without_docstring_is_caught() -> None:
    class Planted(ConfigModel):
        """Has a docstring itself."""

        good: int = 1
        """Documented."""
        bad: int = 2

    assert [name.split(".")[-1] for name in undocumented(Planted)] == ["bad"]


# Every field is in the help.


@pytest.fixture(scope="module")
def help_of_run() -> str:
    """What `distributed-mi run --help` and `distributed-mi fields` print about fields, white space folded."""
    return " ".join(field_help(STAGE_TABLES["run"]).split())


def absent_from_help(model: type[ConfigModel], text: str) -> list[str]:
    """Fields of a model that a help text does not document; a table and a choice are there by what is below them."""
    absent = []
    for name, field in model.model_fields.items():
        doc = " ".join((field.description or "").split())
        entry = rf"(?<![\w.])([\w.]+\.)?{name} = ((?! = ).)*?{re.escape(doc)}"
        below = rf"(?<![\w.])([\w.]+\.)?{name}\.\w+"
        is_table = any(isinstance(a, type) and issubclass(a, ConfigModel) for a in _parts(field.annotation))
        if not re.search(below if is_table else entry, text):
            absent.append(f"{model.__qualname__}.{name}")
    return absent


def _parts(annotation: object) -> Iterator[object]:
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)


def test_help_documents_every_field_of_every_configuration_model(help_of_run: str) -> None:
    # Indexes are no part of an experiment file; the name of a choice is documented by the field that holds the choice.
    models = [m for m in config_models() if ".indexes." not in m.__module__ and not issubclass(m, Component)]
    assert len(models) > 10
    assert [text for model in models for text in absent_from_help(model, help_of_run)] == []


def test_help_goes_into_the_choices_of_a_choice(help_of_run: str) -> None:
    assert "train.model.backbone.rr_weight = 100.0" in help_of_run
    assert 'With train.model.backbone.name = "remi"' in help_of_run
    assert 'With train.model.backbone.name = "eimf"' not in help_of_run
    assert "fields of baselines are those of train.model" in help_of_run


def test_a_field_absent_from_the_help_is_caught(help_of_run: str) -> None:
    class Planted(ConfigModel):
        """Is in no experiment file."""

        seed: int = 1
        """Not the words of any seed."""
        table: FilterConfig = FilterConfig()
        """In the help by chance of its name."""
        nowhere: FilterConfig = FilterConfig()
        """In the help by no chance."""

    assert [n.split(".")[-1] for n in absent_from_help(Planted, help_of_run)] == ["seed", "nowhere"]


@pytest.mark.parametrize(
    ("command", "shown", "hidden"),
    [
        ("prepare", ["workspace", "data.k_core.method", "ray.num_cpus"], ["train.seed"]),
        ("interests", ["workspace", "embed.pooling", "ray.address"], ["train.run"]),
        ("evaluate", ["workspace", "train.run", "scaling.num_workers", "ray.address"], ["train.seed"]),
        ("recommend", ["workspace", "train.run", "train.model.name"], ["train.model.num_interests"]),
        ("explain", ["workspace", "train.run", "train.model.name"], ["train.model.backbone.name"]),
        ("quickstart", ["workspace", "train.model.backbone.rr_weight", "baselines.name"], []),
    ],
)
def test_help_of_a_command_documents_the_fields_that_it_reads(
    command: str, shown: list[str], hidden: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    found = set(re.findall(r"^  ([\w.]+) = ", capsys.readouterr().out, re.MULTILINE))
    assert set(shown) <= found
    assert not found & set(hidden)


# Every shipped configuration loads.


def test_there_are_shipped_configurations() -> None:
    assert "quickstart.toml" in {p.name for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configuration_loads_with_its_components(path: Path) -> None:
    from distributed_mi.experiment import load

    experiment = load(path, ["workspace=elsewhere"])
    assert experiment.workspace == "elsewhere"
    assert experiment.run_configs()
    assert experiment.train.result_fields()["model"]["name"] == experiment.train.model.name
    assert path.read_text(encoding="utf-8").startswith("#"), "begins with what it is for"


def advertised_overrides(path: Path) -> list[str]:
    """The overrides that the header of a configuration gives as examples."""
    lines = re.findall(
        r"^# Override\s+any value, e\.g\. (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    return [override for line in lines for override in line.split()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configuration_loads_with_the_overrides_that_it_advertises(path: Path) -> None:
    from distributed_mi.experiment import load

    overrides = advertised_overrides(path)
    assert overrides
    for override in [[o] for o in overrides] + [overrides]:
        load(path, override)


# One version of Ray, one version of the package.


def pins(lock: Path) -> dict[str, str]:
    """Name -> version of the `name==version` lines of a lock."""
    lines = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;#]+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in lines}


CPU = pins(ROOT / "cluster" / "locks" / "cpu.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> list[str]:
    """All requirement strings of pyproject.toml."""
    return [
        *PROJECT["dependencies"],
        *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
    ]


def test_lock_pins_every_requirement_within_its_range() -> None:
    from packaging.requirements import Requirement

    wanted = [Requirement(r) for r in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["text"]]]
    wrong = [
        str(r) for r in wanted if not r.specifier.contains(CPU.get(r.name.lower().replace("_", "-"), "0"))
    ]
    assert wrong == []


def test_locks_pin_exactly_and_do_not_contradict_each_other() -> None:
    for lock in (ROOT / "cluster" / "locks").glob("*.txt"):
        lines = [
            line for line in lock.read_text(encoding="utf-8").splitlines() if line and line[0] not in "# "
        ]
        assert len(lines) == len(pins(lock)), (
            f"{lock.name}: a line is not name==version, or a name stands twice"
        )
        assert {n: v for n, v in pins(lock).items() if CPU.get(n, v) != v} == {}


def test_ray_has_one_version_everywhere() -> None:
    in_project = {v for r in requirements() for v in re.findall(r"^ray(?:\[[^]]*\])?==(\S+)$", r)}
    assert in_project == {CPU["ray"]}
    assert not [r for r in requirements() if re.match(r"ray\b", r) and "==" not in r]
    job = yaml.safe_load((ROOT / "cluster/kuberay/rayjob.sample.yaml").read_text(encoding="utf-8"))
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == CPU["ray"]
    readme = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bRay (\d+\.\d+\.\d+)", readme)) == {CPU["ray"]}


def test_image_tag_states_both_versions_wherever_it_stands() -> None:
    tag = f"distributed-mi:{distributed_mi.__version__}-ray{CPU['ray']}"
    for name in ("kuberay/rayjob.sample.yaml", "Dockerfile", "README.md"):
        found = re.findall(r"\bdistributed-mi:[\w.-]+", (ROOT / "cluster" / name).read_text(encoding="utf-8"))
        assert found, name
        assert set(found) <= {tag, f"{tag}-llm"}, name
    job = yaml.safe_load((ROOT / "cluster/kuberay/rayjob.sample.yaml").read_text(encoding="utf-8"))
    containers = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert [c["image"] for c in containers] == [tag]


def test_job_sample_runs_files_that_the_image_holds() -> None:
    job = yaml.safe_load((ROOT / "cluster/kuberay/rayjob.sample.yaml").read_text(encoding="utf-8"))
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    workdir = re.findall(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)
    paths = [w for w in job["spec"]["entrypoint"].split() if w.startswith(workdir[0])]
    assert [p.removeprefix(workdir[0] + "/") for p in paths] == [
        "jobs/pipeline.py",
        "jobs/configs/quickstart.toml",
    ]
    assert all((ROOT / p.removeprefix(workdir[0] + "/")).is_file() for p in paths)


def test_python_of_the_image_is_allowed() -> None:
    from packaging.specifiers import SpecifierSet

    version = re.findall(
        r"^FROM python:([\d.]+)", (ROOT / "cluster" / "Dockerfile").read_text(), re.MULTILINE
    )
    assert len(version) == 1
    assert SpecifierSet(PROJECT["requires-python"]).contains(version[0])


def test_package_version_agrees() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == distributed_mi.__version__
    assert "version" in PROJECT["dynamic"]
    try:
        installed = metadata.version("distributed_mi")
    except metadata.PackageNotFoundError:
        return  # run from a checkout
    assert installed == distributed_mi.__version__


# A clean tree.


def test_only_the_agreed_entries_stand_at_the_top() -> None:
    assert {p.relative_to(ROOT).parts[0] for p in FILES} <= TOP_LEVEL


def test_scripts_are_executable() -> None:
    scripts = [p for p in FILES if p.suffix == ".sh" or p.parent == ROOT / ".ci"]
    assert [p.name for p in scripts if not os.access(p, os.X_OK)] == []


# Written in pieces, so that this file does not contain what it looks for.
FORBIDDEN = {
    "a home or work directory": re.compile(r"(?<![\w.~$}])/(?:" + "home|root|Users|" + r"work)/[\w.-]+"),
    "the address of a package registry": re.compile(
        "index"
        + r"-url|find"
        + r"-links|https?://[^\s/]*(?:"
        + "artifactory|nexus|py[p]i|python[h]osted|devpi"
        + ")"
    ),
}
BINARY = {".png", ".parquet", ".gz", ".zst", ".safetensors"}


def forbidden(text: str) -> list[str]:
    """What of `FORBIDDEN` a text contains."""
    return [f"{what}: {hit.group()}" for what, pattern in FORBIDDEN.items() for hit in pattern.finditer(text)]


def test_no_file_names_a_private_directory_or_a_registry() -> None:
    texts = {p.relative_to(ROOT): p.read_text(encoding="utf-8") for p in FILES if p.suffix not in BINARY}
    assert {str(path): found for path, text in texts.items() if (found := forbidden(text))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "see /ho" + "me/me/x",
        '"/wo' + 'rk/main"',
        "(/ro" + "ot/x)",
        "--index" + "-url=x",
        "https://py" + "pi.org/simple",
    ],
)
def test_a_planted_private_name_is_caught(text: str) -> None:
    assert len(forbidden(text)) == 1


@pytest.mark.parametrize(
    "text", ["workspace=/absolute/path", "distributed_mi/work/x", "~/.local/state", "/workspace/a"]
)
def test_harmless_paths_pass(text: str) -> None:
    assert forbidden(text) == []
