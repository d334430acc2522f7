"""A prepared and trained workspace."""

from pathlib import Path

import pytest

from distributed_mi.core.artifacts import Workspace
from distributed_mi.serving.retriever import Retriever
from tests.unit.evaluation import tiny


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(str(tmp_path / "work"))
    tiny.prepare(made)
    tiny.train(made)
    return made


@pytest.fixture
def retriever(workspace: Workspace) -> Retriever:
    return Retriever.open(workspace, "two", tiny.load)
