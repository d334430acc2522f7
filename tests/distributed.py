"""Run a function on several gloo processes of this machine, for tests that need real collectives without Ray.

A launch costs a few seconds (each process imports torch), so a test module makes few of them and checks much in each.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_on_ranks(
    target: str, size: int, folder: Path, payload: dict[str, Any], timeout_s: float = 240
) -> list[Any]:
    """Call `module:function(group, payload)` on `size` processes and return their JSON-ready results in rank order.

    Raises:
        AssertionError: a process failed; shows the end of its error output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "payload.json").write_text(json.dumps(payload))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = []
    for rank in range(size):
        with open(folder / f"error-{rank}.txt", "w") as errors:
            command = [sys.executable, __file__, target, str(rank), str(size), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stderr=errors, cwd=ROOT))
    try:
        codes = [p.wait(timeout=timeout_s) for p in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [r for r, code in enumerate(codes) if code]
    texts = [f"rank {r}:\n" + (folder / f"error-{r}.txt").read_text()[-3000:] for r in failed]
    assert not failed, "\n".join(texts)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(size)]


def _child(target: str, rank: int, size: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from distributed_mi.embeddings.group import WorkerGroup

    torch.set_num_threads(1)
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    payload = json.loads((folder / "payload.json").read_text())
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    result = function(WorkerGroup.from_torch(), payload)
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
