"""How many workers the cluster has room for, and when it has room for more.

Room is asked of Ray's scheduler by reserving it: one small placement group for each worker. What is reserved is there
(a machine that died a moment ago gives nothing, although Ray still lists it), fractions and GPUs are counted as Ray
counts them, and an autoscaler reads what is still pending as demand.

Ray Train has an elastic policy of its own. It works (Ray 2.60), but after the loss of a machine it asks for the old
number of workers until a timeout of 60 s has passed (this module: 20 s until the next step, on two busy cores), it
resizes by killing workers wherever they are, and below the least number it waits for ever.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed_mi.core.artifacts import resolve_url, write_bytes
from distributed_mi.core.errors import ConfigError, StageError
from distributed_mi.training.config import ScalingConfig
from distributed_mi.training.follow import FileFlag

logger = logging.getLogger(__name__)

POLL_S = 0.2
"""Seconds between two looks at reservations."""
WATCH_S = 1.0
"""Seconds between two looks while workers work."""
SETTLE_S = 3.0
"""Seconds to wait for the most workers once there is room for the least: a group that just ended frees its room bit by
bit."""
REMIND_S = 30.0
"""Seconds between two messages that say what is waited for."""


def resources_per_worker(scaling: ScalingConfig) -> dict[str, float]:
    """What Ray reserves for each worker."""
    gpus = {"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {}
    return {"CPU": scaling.cpus_per_worker, **gpus}


class Reservations:
    """Room for single workers, reserved or still wanted, until `release`."""

    def __init__(self, scaling: ScalingConfig, workers: int) -> None:
        from ray.util.placement_group import placement_group

        self.groups: list[Any] = [placement_group([resources_per_worker(scaling)]) for _ in range(workers)]

    def granted(self) -> int:
        """Workers for which there is room."""
        from ray.util.placement_group import placement_group_table

        states = placement_group_table()
        return sum(states.get(g.id.hex(), {}).get("state") == "CREATED" for g in self.groups)

    def release(self) -> None:
        """Give all back."""
        from ray.util.placement_group import remove_placement_group

        for group in self.groups:
            remove_placement_group(group)


def refuse_if_too_large(scaling: ScalingConfig) -> None:
    """Compare the least number of workers with all machines of the cluster, in use or not.

    Raises:
        ConfigError: they are more than fit, and the cluster does not grow.
    """
    import ray

    needed = resources_per_worker(scaling)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    possible = sum(int(min(m.get(name, 0.0) // amount for name, amount in needed.items())) for m in machines)
    if possible >= scaling.least_workers or scaling.autoscaling:
        return
    each = " and ".join(f"{amount:g} {name}" for name, amount in needed.items())
    raise ConfigError(
        f"scaling.num_workers needs {scaling.least_workers} workers of {each} each, but the cluster's {len(machines)} "
        f"machine(s) have room for {possible} in all. Lower scaling.num_workers, scaling.cpus_per_worker or "
        "scaling.gpus_per_worker, add machines (raise ray.num_cpus where Ray is started for this run alone), or set "
        "scaling.autoscaling=true where the cluster adds machines itself."
    )


def wait_for_room(scaling: ScalingConfig, deadline: float) -> int:
    """Wait until the least number of workers fits, and a little longer for the most.

    Args:
        scaling: the workers.
        deadline: end of the wait, on the clock of `time.monotonic`.

    Returns:
        Workers to start now.

    Raises:
        StageError: the wait is over.
    """
    reservations = Reservations(scaling, scaling.most_workers)
    least, most = scaling.least_workers, scaling.most_workers
    settled, reminded = None, time.monotonic()
    try:
        while True:
            now, granted = time.monotonic(), reservations.granted()
            if granted >= least and settled is None:
                settled = now + SETTLE_S
            elif granted < least:
                settled = None
            if granted >= most or (settled is not None and now >= settled):
                return granted
            if settled is None and now >= deadline:
                raise StageError(
                    f"no room for {least} worker(s) within scaling.start_timeout_s {scaling.start_timeout_s:g} s; "
                    f"there is room for {granted}. Nothing is lost: run the same command again when the machines are "
                    "there, or lower scaling.num_workers."
                )
            if settled is None and now - reminded >= REMIND_S:
                reminded = now
                logger.warning("waiting for room for %d worker(s); the cluster has it for %d", least, granted)
            time.sleep(POLL_S)
    finally:
        reservations.release()


@contextmanager
def watching_for_room(scaling: ScalingConfig, workers: int, started: str, room: str) -> Iterator[None]:
    """While `workers` work, want room for the rest.

    Args:
        scaling: the workers.
        workers: how many of them work.
        started: URL of a file that is there once they do. Before, the room would be taken from them.
        room: URL of the file to write once there is room for more.
    """
    if workers >= scaling.most_workers:
        yield
        return
    finished = threading.Event()
    arguments = (scaling, workers, FileFlag(started), room, finished)
    thread = threading.Thread(target=_watch, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _watch(
    scaling: ScalingConfig, workers: int, started: FileFlag, room: str, finished: threading.Event
) -> None:
    while not started():
        if finished.wait(WATCH_S):
            return
    reservations = Reservations(scaling, scaling.most_workers - workers)
    try:
        while not finished.wait(WATCH_S):
            if reservations.granted():
                fs, path = resolve_url(room)
                write_bytes(fs, path, b"{}\n")
                finished.wait()  # what is reserved is kept until the workers come for it
    finally:
        reservations.release()
