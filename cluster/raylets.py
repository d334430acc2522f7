"""Several Ray nodes on this machine, then a command against them: what breaks between hosts shows here first.

    $ python cluster/raylets.py -- python jobs/pipeline.py jobs/configs/quickstart.toml scaling.num_workers=2
    $ python cluster/raylets.py --nodes 2 --cpus 4 -- pytest -m ray

The command finds the nodes through `RAY_ADDRESS` and authenticates with a token that lives as long as this script.
Nodes share the machine's memory, disk and network: this shows placement and transfer between nodes, not speed.

Exit: that of the command.
"""

import argparse
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

logger = logging.getLogger("raylets")

OBJECT_STORE_BYTES = 150 << 20
"""Per node; three nodes fit a /dev/shm of 512 MiB."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options, then `--`, then the command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- COMMAND ...",
    )
    parser.add_argument("--nodes", type=int, default=3, help="Ray nodes, the head included (default 3)")
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of each node (default 2)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run once all nodes are up")
    options = parser.parse_args(argv)
    options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not options.command or options.nodes < 1 or options.cpus < 1:
        parser.error("needs a command behind `--`, at least one node and one CPU")
    return options


def run(options: argparse.Namespace, token_path: Path) -> int:
    """Start the nodes, run the command, end the nodes."""
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token_path))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster  # after the token is in the environment

    # No node_ip_address: `ray.init` replaces 127.0.0.1 by the machine's address, where such a head does not listen.
    node = {"num_cpus": options.cpus, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(options.nodes - 1):
            cluster.add_node(**node)
        cluster.wait_for_nodes(timeout=120)
        logger.info("%d nodes at %s; running %s", options.nodes, cluster.address, " ".join(options.command))
        return subprocess.run(
            options.command, env={**os.environ, "RAY_ADDRESS": cluster.address}, check=False
        ).returncode
    finally:
        cluster.shutdown()


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _leave)  # so that `finally` ends the nodes
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="raylets-") as folder:
        return run(options, Path(folder) / "token")


if __name__ == "__main__":
    sys.exit(main())
