"""Sampled softmax over negatives that all users of a step share.

    loss_b = log( exp(s_b+) + sum_j exp(s_bj) ) - s_b+        s = query . row - log q

With every item as a negative and accidental hits masked this is the full softmax cross-entropy. The correction by
log q (Bengio and Senecal 2008) makes the gradient an estimate of the full one under a non-uniform sampler; for a
uniform one it cancels.

Public versions differ: TensorFlow's ComiRec draws log-uniformly without replacement, corrects and masks; REMI's
PyTorch code draws uniformly with replacement, has padding among the negatives and keeps accidental hits (at 1,280
negatives of Beauty's 12,101 items one target in ten is among its own negatives).

Shapes:  B users, N shared negatives, D width.
"""

from torch import Tensor

from distributed_mi.losses.shared_negatives import MASKED, shared_negative_softmax

__all__ = ["MASKED", "negative_scores", "sampled_softmax", "target_scores"]


def negative_scores(
    query_BD: Tensor,
    negative_rows_ND: Tensor,
    *,
    target_ids_B: Tensor | None = None,
    negative_ids_N: Tensor | None = None,
    negative_log_q_N: Tensor | None = None,
    negative_mask_N: Tensor | None = None,
) -> Tensor:
    """Inner products `[B, N]`, corrected by log q where given; accidental hits, where ids are given, at `MASKED`.

    So are negatives where `negative_mask_N` is False.
    """
    scores_BN = query_BD @ negative_rows_ND.T
    if negative_log_q_N is not None:
        scores_BN = scores_BN - negative_log_q_N
    if target_ids_B is not None and negative_ids_N is not None:
        scores_BN = scores_BN.masked_fill(target_ids_B[:, None] == negative_ids_N, MASKED)
    if negative_mask_N is not None:
        scores_BN = scores_BN.masked_fill(~negative_mask_N, MASKED)
    return scores_BN


def target_scores(query_BD: Tensor, target_rows_BD: Tensor, target_log_q_B: Tensor | None = None) -> Tensor:
    """Inner products `[B]` with each user's target, corrected by log q where given."""
    scores_B = (query_BD * target_rows_BD).sum(dim=1)
    return scores_B if target_log_q_B is None else scores_B - target_log_q_B


def sampled_softmax(
    query_BD: Tensor,
    target_rows_BD: Tensor,
    negative_rows_ND: Tensor,
    *,
    target_ids_B: Tensor,
    negative_ids_N: Tensor,
    mask_accidental_hits: bool = True,
    target_log_q_B: Tensor | None = None,
    negative_log_q_N: Tensor | None = None,
    negative_mask_N: Tensor | None = None,
) -> Tensor:
    """Loss of each user.

    Args:
        query_BD: what is compared with the items.
        target_rows_BD: row of each user's target.
        negative_rows_ND: rows of the shared negatives.
        target_ids_B: int64, to find accidental hits.
        negative_ids_N: int64.
        mask_accidental_hits: leave out negatives that equal the user's target.
        target_log_q_B: log probability of drawing each target as a negative; None: no correction.
        negative_log_q_N: the same of each negative.
        negative_mask_N: bool, False on negatives that do not count; None: all do.

    Returns:
        `[B]`, not averaged.
    """
    return shared_negative_softmax(
        query_BD,
        target_rows_BD,
        negative_rows_ND,
        target_ids_B=target_ids_B if mask_accidental_hits else None,
        negative_ids_N=negative_ids_N,
        target_log_q_B=target_log_q_B,
        negative_log_q_N=negative_log_q_N,
        negative_mask_N=negative_mask_N,
    )
