"""Compiled kernels are forgotten when a source of any of them changes, and kept otherwise."""

import errno
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from distributed_mi.core import kernel_cache
from distributed_mi.core.kernel_cache import PACKAGE, forget_outdated_kernels

CALLED = """
from numba import njit

@njit(cache=True)
def called(x):
    return x + {added}
"""
CALLER = """
from numba import njit
from package.called_kernels import called

@njit(cache=True)
def caller(x):
    return called(x) * 10
"""
PROGRAM = """
import sys
from pathlib import Path
from distributed_mi.core.kernel_cache import forget_outdated_kernels
if sys.argv[1] == "look":
    forget_outdated_kernels(Path("package").resolve())
from package.calling_kernels import caller
print(caller(1), caller.stats.cache_hits[next(iter(caller.stats.cache_hits))] if caller.stats.cache_hits else 0)
"""


def run(folder: Path, mode: str) -> list[int]:
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(PACKAGE.parent), str(folder)]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


def test_a_kernel_is_made_anew_when_one_that_it_calls_in_another_file_changed(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "called_kernels.py").write_text(CALLED.format(added=1))
    (package / "calling_kernels.py").write_text(CALLER)
    assert run(tmp_path, "look") == [20, 0]
    assert run(tmp_path, "look") == [20, 1]
    (package / "called_kernels.py").write_text(CALLED.format(added=2))
    assert run(tmp_path, "do not look") == [20, 1]  # what numba does by itself
    assert run(tmp_path, "look") == [30, 0]


def test_every_file_that_compiles_is_looked_at() -> None:
    looked_at = {path for pattern in kernel_cache.SOURCES for path in PACKAGE.glob(pattern)}
    assert {path for path in PACKAGE.rglob("*.py") if "import njit" in path.read_text()} <= looked_at


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_left(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_kernels.py").write_text("")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="No space") if code == errno.ENOSPC else nullcontext():
        forget_outdated_kernels(tmp_path)
    assert not (tmp_path / "__pycache__").exists()
