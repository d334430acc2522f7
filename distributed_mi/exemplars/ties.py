"""Deterministic ties of affinity propagation.

Interchangeable users (equal vectors, mirror images, an isolated pair) send equal messages: all would be exemplars or
none, or swing between the two. scikit-learn adds random noise to every similarity. Here the *preferences of tied
users alone* fall by up to a hundred-thousandth along the index, so that the lowest index wins, no result depends on a
seed, and where nothing ties nothing is changed. Ties are recognised by equal sums of similarities before the first
round, and by a belief r(k,k) + a(k,k) of zero when the messages have settled. Labels and net similarity are computed
without this aid.

Shapes:  U users.
"""

import torch
from torch import Tensor

TIE_BREAK = 1e-5
"""Largest fall of a tied user's preference, as a share of the preference: about a hundred float32 steps."""

_EQUAL_SUMS = 3e-8
"""Relative difference of two users' sums of similarities that is float32 rounding of otherwise equal similarities."""


def equal_sums(sums_U: Tensor) -> Tensor:
    """Group of each user, `[U]` int64, -1 for a user alone: users whose similarities have the same sum.

    Equal vectors are in a group, and so are users that a symmetry of the whole set maps onto each other.
    """
    values, order = sums_U.sort(stable=True)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = values.diff() > _EQUAL_SUMS * values[1:].abs()
    number = starts.cumsum(0) - 1
    number = torch.where(number.bincount()[number] > 1, number, -1)
    return torch.empty_like(order).scatter_(0, order, number)


def tie_break(groups_U: Tensor) -> Tensor:
    """Share by which each preference is lowered, `[U]` float32: 0 for the first of a group and for users alone (-1)."""
    order = groups_U.argsort(stable=True)
    _, inverse, counts = torch.unique_consecutive(groups_U[order], return_inverse=True, return_counts=True)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[inverse]
    # the first stands clear of the others even in a group of more users than float32 has steps
    share = torch.where(rank > 0, 0.5 + 0.5 * rank / counts[inverse], 0.0)
    share = share.masked_fill(groups_U[order] < 0, 0.0)
    return torch.empty_like(share).scatter_(0, order, share).to(torch.float32) * TIE_BREAK
