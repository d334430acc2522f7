"""Work in processes of its own.

    found = on_processes("benchmarks.bench_x:run_side", 2, {"rows": 1_000})

calls `run_side(payload)` in each of several gloo processes of one thread; `torch.distributed` is set up when there are
several.

    with OwnProcess("benchmarks.bench_x:make_side", {"rows": 1_000}) as side:
        found = side()

calls what `make_side(payload)` returned, in a process that waits between calls. So the sides of a comparison do not
share an allocator, an interpreter's lock or what the imports of another one did to the process.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self


def on_processes(target: str, size: int, payload: dict[str, Any]) -> Any:
    """What the function of process 0 returned.

    Args:
        target: `module:function`; takes the payload, returns something JSON-ready.
        size: number of processes.
        payload: JSON-ready; `folder`, a directory that all processes share while they run, is added.

    Raises:
        SystemExit: a process failed; its error output was shown.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(payload | {"folder": folder})
        common = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes = []
        for rank in range(size):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "benchmarks.processes", target, text]
            processes.append(subprocess.Popen(command, env=environment))
        codes = [p.wait() for p in processes]
        if any(codes):
            sys.exit(f"{target}: processes ended with {codes}")
        return json.loads((Path(folder) / "out.json").read_text())


class OwnProcess:
    """A call that is made in a process of its own, which ends with the `with` block."""

    def __init__(self, target: str, payload: dict[str, Any]) -> None:
        """Start the process and wait until it can be called.

        Args:
            target: `module:function`; takes the payload, returns a function without arguments.
            payload: JSON-ready.

        Raises:
            RuntimeError: it failed; its error output was shown.
        """
        command = [sys.executable, "-m", "benchmarks.processes", "--calls", target, json.dumps(payload)]
        self.target = target
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer()

    def __call__(self) -> Any:
        """One call; returns what it returned, which is JSON-ready.

        Raises:
            RuntimeError: it failed; its error output was shown.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.target}: the process ended with {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # it ends at the end of its input


def _serve_calls(target: str, text: str) -> None:
    """Answer each line of the input with what a call returned; what is printed goes to the error output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    call: Callable[[], Any] = _resolve(target)(json.loads(text))
    print(json.dumps(None), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(call()), file=answers, flush=True)


def _resolve(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _child(target: str, text: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    several = int(os.environ["WORLD_SIZE"]) > 1
    if several:
        dist.init_process_group("gloo")
    payload = json.loads(text)
    result = _resolve(target)(payload)
    if os.environ["RANK"] == "0":
        (Path(payload["folder"]) / "out.json").write_text(json.dumps(result))
    if several:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "--calls":
        _serve_calls(*sys.argv[2:])
    else:
        _child(*sys.argv[1:])
