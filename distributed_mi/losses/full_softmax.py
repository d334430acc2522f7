"""Softmax over the whole catalogue, in tiles.

    loss_b = log sum_v exp(q_b . e_v) - q_b . e_b+

Tiles are computed again in the backward pass, so `[B, V]` scores are never held, only `[B, tile]`. A step costs
2 B V D operations for the scores and what `project` costs for V rows, both three times with the backward pass and the
second look.

Shapes:  B users, V items with padding, C items of a tile, T width of the catalogue's rows, D width of queries.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distributed_mi.losses.sampled_softmax import MASKED, target_scores

TILE_ROWS = 4_096
"""Items of a tile: 2 MB of scores for 128 users."""


def full_softmax(
    query_BD: Tensor,
    target_rows_BD: Tensor,
    catalogue_VT: Tensor,
    *,
    project: Callable[[Tensor], Tensor],
    tile_rows: int = TILE_ROWS,
) -> Tensor:
    """Loss of each user, `[B]`.

    Args:
        query_BD: what is compared with the items.
        target_rows_BD: projected row of each user's target, which must be in the catalogue.
        catalogue_VT: rows of all items; a row of zeros (padding, or nothing known of the item) is no candidate.
        project: rows `[C, T]` -> `[C, D]`, the same as made `target_rows_BD`; its parameters get gradients.
        tile_rows: C.
    """

    def tile(query_BD: Tensor, rows_CT: Tensor) -> Tensor:
        scores_BC = query_BD @ project(rows_CT).T
        return torch.logsumexp(scores_BC.masked_fill(~rows_CT.any(dim=1), MASKED), dim=1)

    parts = [
        checkpoint(tile, query_BD, rows_CT, use_reentrant=False, preserve_rng_state=False)
        for rows_CT in catalogue_VT.split(tile_rows)
    ]
    return torch.logsumexp(torch.stack(parts), dim=0) - target_scores(query_BD, target_rows_BD)
