"""Shared fixtures: one local Ray for all Ray tests, the real data when it is at hand, a random generator."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray for the whole session; two clusters on one host disturb each other."""
    import ray

    ray.init(num_cpus=8, object_store_memory=300 << 20, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def dmi_data() -> Path:
    """Folder of the real data sets; skips when `DMI_DATA` does not point to it."""
    folder = os.environ.get("DMI_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DMI_DATA does not point to the real data")
    return Path(folder)


@pytest.fixture
def rng() -> np.random.Generator:
    """A fixed generator."""
    return np.random.default_rng(20240501)
