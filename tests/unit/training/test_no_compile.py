"""DeepSpeed must not compile anything when an engine is built."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BUILD = """
import sys
from pathlib import Path
from tests.unit.training.toys import build, config
_, run = build(config(engine={'name': 'deepspeed'}), Path(sys.argv[1]))
print(type(run.engine).__name__)
"""
LIMIT_S = 120.0
"""Importing torch and DeepSpeed takes 5 s on two idle cores; a compilation shows in the folder soon after."""


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed tries no compilation without a compiler")
def test_building_an_engine_compiles_nothing(tmp_path: Path) -> None:
    """A cold cache of extensions stays empty.

    DeepSpeed 0.19.8 builds its shared-memory collective in `init_distributed` (comm/torch.py, `build_shm_op`) wherever
    it could be built, over 100 s of g++ on two busy cores, and has no setting against it; see `import_deepspeed`. The
    empty answer set there can go when this test passes without it.
    """
    cache = tmp_path / "extensions"
    cache.mkdir()
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BUILD, str(tmp_path / "run")]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        ends = time.monotonic() + LIMIT_S
        while process.poll() is None and not any(cache.iterdir()) and time.monotonic() < ends:
            time.sleep(0.1)
        assert list(cache.iterdir()) == []
        assert process.poll() == 0
        assert process.stdout is not None
        assert process.stdout.read().split()[-1:] == ["DeepSpeedEngine"]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it started too
        process.communicate()
