"""One seed -> named, independent random streams.

A stream is a function of (seed, name, counters) alone: step 1,000 of a run draws the same numbers whether the run was
resumed or not, and whichever worker draws them.
"""

import hashlib
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1_024)
def stream_key(seed: int, name: str) -> int:
    """64-bit key of a named stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def stream(seed: int, name: str, *counters: int) -> np.random.Generator:
    """A generator for one place in one stream, for example `stream(seed, "negatives", step)`."""
    # Hashed as a whole: SeedSequence pads with zeros, so that it draws the same for [key, 5] and [key, 5, 0].
    place = f"{stream_key(seed, name)}:{':'.join(str(int(c)) for c in counters)}"
    entropy = np.frombuffer(hashlib.sha256(place.encode()).digest(), "<u4")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
