"""REMI's interest-aware hard negatives.

Xie et al., "Rethinking Multi-Interest Learning for Candidate Matching in Recommender Systems", RecSys 2023.

Negatives should be drawn with q(j) proportional to exp(beta s_j). They are drawn uniformly and weighted instead:

    w_j  = exp(beta s_j) / mean_j exp(beta s_j)
    loss = -log [ exp(s+) / ( exp(s+) + sum_j w_j exp(s_j) ) ]

beta = 0 is sampled softmax; a large beta puts all weight N on the hardest negative. The gradient flows through the
weights, as in the public code. Scores are shifted by their maximum before any exponential, so no beta overflows.

Differences from the public code: accidental hits are masked by default (they would carry the largest weights of
all), and padding is never a negative.

Shapes:  B users, N shared negatives, D width.
"""

from torch import Tensor

from distributed_mi.losses.shared_negatives import shared_negative_softmax


def hard_negative_softmax(
    query_BD: Tensor,
    target_rows_BD: Tensor,
    negative_rows_ND: Tensor,
    *,
    beta: float,
    target_ids_B: Tensor,
    negative_ids_N: Tensor,
    mask_accidental_hits: bool = True,
    target_log_q_B: Tensor | None = None,
    negative_log_q_N: Tensor | None = None,
) -> Tensor:
    """Loss of each user, `[B]`; see `sampled_softmax` for the other arguments.

    Args:
        query_BD: the selected interest of each user.
        target_rows_BD: row of each user's target.
        negative_rows_ND: rows of the shared negatives.
        beta: concentration of the weights on hard negatives; 0 weighs all alike.
        target_ids_B: int64.
        negative_ids_N: int64.
        mask_accidental_hits: leave out negatives that equal the user's target.
        target_log_q_B: correction of the targets' scores; the weights are taken from corrected scores too.
        negative_log_q_N: correction of the negatives' scores.
    """
    return shared_negative_softmax(
        query_BD,
        target_rows_BD,
        negative_rows_ND,
        beta=beta,
        target_ids_B=target_ids_B if mask_accidental_hits else None,
        negative_ids_N=negative_ids_N,
        target_log_q_B=target_log_q_B,
        negative_log_q_N=negative_log_q_N,
    )
