"""Softmax over the targets of the step: each user's target against those of all other users, on whatever worker.

    loss_b = log sum_{j: i_j != i_b or j = b} exp(s_bj) - s_bb        s_bj = q_b . e_{i_j} - log q_{i_j}

Targets are drawn as often as they occur, so popular items are negatives more often than others. The correction by
log q takes that out (Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations",
RecSys 2019); q is the popularity of items, given where it is wanted. No item is looked up beside the targets.

Shapes:  B users of this worker, G users of the step, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from distributed_mi.losses.sampled_softmax import MASKED


def in_batch_softmax(
    query_BD: Tensor,
    candidate_rows_GD: Tensor,
    *,
    offset: int,
    target_ids_B: Tensor,
    candidate_ids_G: Tensor,
    mask_accidental_hits: bool = True,
    candidate_log_q_G: Tensor | None = None,
) -> Tensor:
    """Loss of each user, `[B]`, not averaged.

    Args:
        query_BD: what is compared with the items.
        candidate_rows_GD: rows of the targets of all users of the step, gathered with gradients; row `offset + b` is
            the target of user b.
        offset: where this worker's users begin among those of the step.
        target_ids_B: int64.
        candidate_ids_G: int64, the targets of all users of the step.
        mask_accidental_hits: leave out other users whose target equals the user's own.
        candidate_log_q_G: log probability of each target among targets; None: no correction.
    """
    scores_BG = query_BD @ candidate_rows_GD.T
    if candidate_log_q_G is not None:
        scores_BG = scores_BG - candidate_log_q_G
    rows_B = torch.arange(len(query_BD), device=query_BD.device)
    if mask_accidental_hits:
        same_BG = target_ids_B[:, None] == candidate_ids_G
        same_BG[rows_B, rows_B + offset] = False
        scores_BG = scores_BG.masked_fill(same_BG, MASKED)
    return functional.cross_entropy(scores_BG, rows_B + offset, reduction="none")
