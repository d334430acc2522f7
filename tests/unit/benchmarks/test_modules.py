"""Benchmarks are not run by the tests; that they import what exists is."""

import importlib
from pathlib import Path

import pytest

import benchmarks.harness

FOLDER = Path(benchmarks.harness.__file__).parent


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_imports_without_what_it_compares_with(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__
