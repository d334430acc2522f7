"""The light half of the package costs milliseconds: what it must not drag in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "ray", "transformers", "vllm", "deepspeed", "pandas", "polars", "sklearn", "matplotlib"}
PACKAGE = Path(__file__).resolve().parents[3] / "distributed_mi"
CONFIGS = sorted(f"distributed_mi.{p.parent.name}.config" for p in PACKAGE.glob("*/config.py"))


def imported_by(*modules: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter after importing `modules`."""
    code = f"import json, sys\nfor m in {modules!r}: __import__(m)\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_bare_package_imports_nothing_of_its_own() -> None:
    found = imported_by("distributed_mi")
    assert not found & (HEAVY | {"numpy", "pyarrow", "pydantic"})


def test_configuration_models_of_all_packages_are_light() -> None:
    assert "distributed_mi.core.config" in CONFIGS
    found = imported_by(*CONFIGS)
    assert "pydantic" in found
    assert not found & (HEAVY | {"pyarrow"})


@pytest.mark.parametrize(
    "module", ["artifacts", "errors", "logging", "progress", "registry", "schema", "seeding"]
)
def test_core_is_light(module: str) -> None:
    assert not imported_by(f"distributed_mi.core.{module}") & HEAVY


@pytest.mark.parametrize("module", ["cli", "experiment", "pipeline"])
def test_the_command_line_is_light(module: str) -> None:
    assert not imported_by(f"distributed_mi.{module}") & HEAVY
