"""The same work on several gloo processes of this machine, one thread each, for benchmarks of collectives.

    found = on_processes("benchmarks.bench_x:run_side", 2, {"rows": 1_000})

calls `run_side(payload)` in each process; `torch.distributed` is set up when there are several.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def on_processes(target: str, size: int, payload: dict[str, Any]) -> dict[str, Any]:
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
        result: dict[str, Any] = json.loads((Path(folder) / "out.json").read_text())
    return result


def _child(target: str, text: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    several = int(os.environ["WORLD_SIZE"]) > 1
    if several:
        dist.init_process_group("gloo")
    module, name = target.split(":")
    payload = json.loads(text)
    result = getattr(importlib.import_module(module), name)(payload)
    if os.environ["RANK"] == "0":
        (Path(payload["folder"]) / "out.json").write_text(json.dumps(result))
    if several:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _child(*sys.argv[1:])
