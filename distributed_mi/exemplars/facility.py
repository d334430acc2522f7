"""Greedy facility location: the yardstick that affinity propagation is held against.

Chooses E exemplars one at a time, each the one that raises the sum of similarities to the nearest exemplar most
(Nemhauser et al. 1978: at least 1 - 1/e of the best possible rise). Lazy (Minoux 1978): gains only fall as exemplars
are added, so an old gain is an upper bound and few rows are looked at again.

Shapes:  U users, E exemplars, C candidates looked at together.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distributed_mi.exemplars.similarity import Similarities, row_blocks

_CANDIDATES = 32
"""Users whose gain is brought up to date together."""


def greedy_facility_location(
    similarities: Similarities, num_exemplars: int, *, on_choice: Callable[[], None] | None = None
) -> Tensor:
    """Exemplars by greedy facility location.

    Args:
        similarities: of all users, symmetric.
        num_exemplars: E, from 1 to U.
        on_choice: called after each choice.

    Returns:
        exemplars_E int64, ascending; ties go to the lowest index.

    Raises:
        ValueError: `num_exemplars` out of range.
    """
    users = similarities.users
    if not 1 <= num_exemplars <= users:
        raise ValueError(f"num_exemplars must be from 1 to {users}, got {num_exemplars}")
    first = int(similarities.sums().argmax())
    chosen = [first]
    nearest_U = similarities.rows(torch.tensor([first]))[0]
    bounds_U = torch.full((users,), torch.inf, dtype=torch.float64)
    bounds_U[first] = -1.0
    for _ in range(num_exemplars - 1):
        if on_choice:
            on_choice()
        best = _next(similarities, nearest_U, bounds_U)
        chosen.append(best)
        nearest_U = torch.maximum(nearest_U, similarities.rows(torch.tensor([best]))[0])
        bounds_U[best] = -1.0
    if on_choice:
        on_choice()
    return torch.tensor(sorted(chosen))


def _next(similarities: Similarities, nearest_U: Tensor, bounds_U: Tensor) -> int:
    """User with the largest gain; `bounds_U` is tightened on the way (-1 marks the chosen)."""
    users = len(bounds_U)
    fresh_U = torch.zeros(users, dtype=torch.bool)
    while True:
        stale_U = bounds_U.masked_fill(fresh_U, -1.0)
        highest = float(stale_U.max())
        fresh_best = float(bounds_U[fresh_U].max()) if bool(fresh_U.any()) else -1.0
        if fresh_best >= highest:
            return int((fresh_U & (bounds_U == fresh_best)).nonzero()[0])
        count = users if highest == torch.inf else min(_CANDIDATES, users)
        candidates = stale_U.topk(count).indices
        candidates = candidates[stale_U[candidates] >= 0.0]
        for low, high in row_blocks(len(candidates), 4 * users):
            ids = candidates[low:high]
            gains = (similarities.rows(ids) - nearest_U).clamp_(min=0.0).sum(dim=1, dtype=torch.float64)
            bounds_U[ids] = gains
        fresh_U[candidates] = True
