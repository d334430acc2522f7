"""Whether a mean difference may be chance, by random exchange of the two sides.

Shapes:  U users (or groups of users that change sides together), M metrics, R random sign assignments.
"""

import numpy as np
from numpy.typing import NDArray

from distributed_mi.core.seeding import stream

_CELLS_AT_ONCE = 8_000_000
"""Signs held in memory at once: 64 MB."""


def sign_flip_p_values(
    differences_UM: NDArray[np.float64], permutations: int, seed: int
) -> NDArray[np.float64]:
    """Two-sided p-values of mean differences under random exchange of A and B for each user.

    With no true difference each user's sign is as likely as the other (Fisher's randomisation test; Smucker et al.,
    CIKM 2007). The observed assignment counts as one of the drawn, so p is at least `1 / (permutations + 1)`.

    Returns:
        float64 `[M]`.
    """
    num_users, num_metrics = differences_UM.shape
    observed = np.abs(differences_UM.sum(axis=0))
    tolerance = 1e-12 * np.abs(differences_UM).sum(axis=0)  # equal sums must not differ by rounding
    generator = stream(seed, "sign-flip")
    extreme = np.zeros(num_metrics)
    block = max(1, _CELLS_AT_ONCE // max(num_users, 1))
    for start in range(0, permutations, block):
        size = min(block, permutations - start)
        signs_RU = generator.integers(0, 2, size=(size, num_users), dtype=np.int8) * 2.0 - 1.0
        extreme += (np.abs(signs_RU @ differences_UM) >= observed - tolerance).sum(axis=0)
    return (extreme + 1) / (permutations + 1)
