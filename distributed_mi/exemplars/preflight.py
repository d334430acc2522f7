"""What each method will need, before anything starts.

Bytes follow from the data structures; seconds from the speed of a small matrix product and of a copy, measured on the
spot, times what a run on Beauty and Office took (about 50 rounds). Lists have no length in advance: `exact` is
predicted with 192 entries a user, what 17,890 Beauty users with preference -10 need; at worst it ends with all pairs,
which is given too.

Shapes:  U users, D width of the vectors.
"""

import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distributed_mi.core.errors import StageError
from distributed_mi.exemplars import similarity
from distributed_mi.exemplars.config import ExemplarsConfig
from distributed_mi.exemplars.lists import ENTRY_BYTES
from distributed_mi.exemplars.problem import DENSE_PAIR_BYTES, DENSE_USERS

logger = logging.getLogger(__name__)

_ENTRIES = 192
"""Length of an exact list; see above."""

_ROUNDS = 50
"""Rounds of a run that converges without a retry."""

_BASE_BYTES = 512 << 20
"""Blocks, labels and the libraries' own buffers, in each process."""

_EXACT_SECONDS = 1800.0
"""`auto` takes `exact` up to here."""

_PROBE_WIDTH = 512


@dataclass(frozen=True)
class Need:
    """Prediction for one method."""

    method: str
    """`exact`, `exact, all pairs`, `distributed` or `sparse`."""
    bytes: int
    """Peak memory beyond what is in use now; with actors, of all of them."""
    seconds: float
    """To the labels, when the first attempt converges."""

    def text(self) -> str:
        """For people."""
        return f"{self.method} {self.bytes / 1e9:.1f} GB, {self.seconds:,.0f} s"


@dataclass(frozen=True)
class Speed:
    """Of this machine, now."""

    flops: float
    """Float32 operations of a matrix product in a second."""
    bytes: float
    """Bytes read and written in a second by a copy."""

    @classmethod
    def measure(cls) -> "Speed":
        """About a tenth of a second."""
        left = torch.ones(_PROBE_WIDTH, _PROBE_WIDTH)
        source, target = torch.ones(1 << 24), torch.ones(1 << 24)
        torch.mm(left, left)
        started = time.perf_counter()
        for _ in range(4):
            torch.mm(left, left)
        product = time.perf_counter() - started
        started = time.perf_counter()
        target.copy_(source)
        copy = time.perf_counter() - started
        return cls(4 * 2 * _PROBE_WIDTH**3 / max(product, 1e-9), 8 * (1 << 24) / max(copy, 1e-9))


def predict(users: int, width: int, config: ExemplarsConfig, speed: Speed) -> list[Need]:
    """What every method needs, in the order in which `auto` prefers them."""
    vectors = users * width * 16  # given, centred, and once in float64
    entries = users * min(_ENTRIES, users)
    product = 2.0 * users * users * width / speed.flops
    dense_round = 20.0 * users * users / speed.bytes
    list_round = 24.0 * entries / speed.bytes + 1e-3
    whole = Need(
        "exact, all pairs",
        DENSE_PAIR_BYTES * users * users + vectors + _BASE_BYTES,
        2 * product + _ROUNDS * dense_round,
    )
    # a list that grows is copied, and every row is looked at about twice
    exact = Need(
        "exact",
        2 * ENTRY_BYTES * entries + vectors + _BASE_BYTES,
        2.5 * product + _ROUNDS * list_round,
    )
    if users <= DENSE_USERS:
        exact = Need("exact", whole.bytes, whole.seconds)
    actors = max(2, config.num_actors)
    spread = Need(
        "distributed", exact.bytes + (actors - 1) * (_BASE_BYTES + users * width * 12), 2.5 * product
    )
    graph = users * min(config.most_neighbours, users)
    cell = max(1.0, users**0.5 / 4)
    search = (
        2.0 * users * config.probes * cell * width * 8 / speed.flops
    )  # a scan reaches an eighth of a product's speed
    sparse = Need(
        "sparse",
        3 * ENTRY_BYTES * graph + vectors + _BASE_BYTES,
        search + _ROUNDS * 48.0 * graph / speed.bytes,
    )
    return [exact, whole, spread, sparse]


def choose(users: int, width: int, config: ExemplarsConfig) -> tuple[str, dict[str, Any]]:
    """Say what every method will need, and decide.

    Returns:
        The method, never `auto`; what was predicted, for the manifest.

    Raises:
        StageError: the method does not fit into memory and `force` is off; names one that does.
    """
    needs = predict(users, width, config, Speed.measure())
    by_name = {n.method: n for n in needs}
    free = similarity.available_memory_bytes()
    known = "unknown" if free is None else f"{free / 1e9:.1f} GB"
    logger.info(
        "exemplars: %s users of width %d; predicted: %s; free memory: %s",
        f"{users:,}",
        width,
        "; ".join(n.text() for n in needs),
        known,
    )

    def fits(method: str) -> bool:
        return free is None or by_name[method].bytes <= free

    method: str = config.method
    if method == "auto":
        quick = by_name["exact"].seconds <= _EXACT_SECONDS
        method = "exact" if quick and fits("exact") else "sparse"
    if not fits(method) and not config.force:
        others = [m for m in ("exact", "distributed", "sparse") if m != method and fits(m)]
        advice = (
            f"exemplars.method={others[0]} fits ({by_name[others[0]].text()})"
            if others
            else "No method fits: cluster fewer users, take a machine with more memory, or more machines"
        )
        raise StageError(
            f"exemplars: method {method} over {users:,} users needs {by_name[method].bytes / 1e9:.1f} GB, {known} are "
            f"free. {advice}. `--force` (exemplars.force=true) starts all the same."
        )
    return method, {
        "method": method,
        "free_bytes": free,
        "needs": [asdict(n) | {"seconds": round(n.seconds, 1)} for n in needs],
    }
