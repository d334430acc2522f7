"""Losses of a target against each shared negative by itself: BPR and gBCE.

BPR (Rendle et al., UAI 2009), averaged over a user's negatives:

    loss_b = mean_j -log sigmoid(s_b+ - s_bj)

ReChorus' loss of this name weighs sigmoid(s_b+ - s_bj) by softmax_j(s_bj), sums, and takes the log of the sum:
BPR-max without its regulariser (Hidasi and Karatzoglou, CIKM 2018). The two agree at one negative only. It draws
negatives for each user, outside the user's history; here all users share theirs.

gBCE (Petrov and Macdonald, "gSASRec", RecSys 2023): binary cross-entropy on one target and n negatives, with the
probability of the target raised to the power beta, which undoes the overconfidence that comes with few negatives:

    loss_b = -1 / (n_b + 1) [ beta log sigmoid(s_b+) + sum_j log(1 - sigmoid(s_bj)) ]
    beta   = alpha (t (1 - 1 / alpha) + 1 / alpha) = 1 - t (1 - alpha)
    alpha  = N / (V - 2), at most 1: the share of a user's V - 2 negatives (V - 1 items but the target) that is drawn

t = 0 is plain binary cross-entropy (beta = 1); at t = 1 (beta = alpha) the sigmoid of a score estimates the probability
that the item is the target, as it would with all negatives. N counts the draws of a step; n_b those of them that are no
accidental hits of the user. The sigmoid needs scores that are negative for almost every item, which a user vector that
is a mean of item vectors cannot give: comirec_sa and remi learn little from it, youtube_dnn with its layer does.

Shapes:  B users, N shared negatives, V items with padding, D width.
"""

from torch import Tensor
from torch.nn import functional

from distributed_mi.losses.sampled_softmax import target_scores


def bpr(
    query_BD: Tensor,
    target_rows_BD: Tensor,
    negative_rows_ND: Tensor,
    *,
    target_ids_B: Tensor,
    negative_ids_N: Tensor,
    mask_accidental_hits: bool = True,
) -> Tensor:
    """Loss of each user, `[B]`; 0 where every negative is an accidental hit.

    Args:
        query_BD: what is compared with the items.
        target_rows_BD: row of each user's target.
        negative_rows_ND: rows of the shared negatives.
        target_ids_B: int64, to find accidental hits.
        negative_ids_N: int64.
        mask_accidental_hits: leave out negatives that equal the user's target.
    """
    hits_BN = _hits(target_ids_B, negative_ids_N, mask_accidental_hits)
    margins_BN = query_BD @ negative_rows_ND.T - target_scores(query_BD, target_rows_BD)[:, None]
    losses_BN = functional.softplus(margins_BN)
    return _sum(losses_BN, hits_BN) / _count(losses_BN, hits_BN).clamp(min=1)


def gbce(
    query_BD: Tensor,
    target_rows_BD: Tensor,
    negative_rows_ND: Tensor,
    *,
    calibration: float,
    num_rows: int,
    target_ids_B: Tensor,
    negative_ids_N: Tensor,
    mask_accidental_hits: bool = True,
) -> Tensor:
    """Loss of each user, `[B]`; see `bpr` for the other arguments.

    Args:
        query_BD: what is compared with the items.
        target_rows_BD: row of each user's target.
        negative_rows_ND: rows of the shared negatives.
        calibration: t, from 0 (binary cross-entropy) to 1.
        num_rows: V.
        target_ids_B: int64.
        negative_ids_N: int64.
        mask_accidental_hits: leave out negatives that equal the user's target.
    """
    alpha = min(1.0, len(negative_ids_N) / max(num_rows - 2, 1))
    beta = 1.0 - calibration * (1.0 - alpha)
    hits_BN = _hits(target_ids_B, negative_ids_N, mask_accidental_hits)
    losses_BN = functional.softplus(query_BD @ negative_rows_ND.T)
    positive_B = -beta * functional.logsigmoid(target_scores(query_BD, target_rows_BD))
    return (positive_B + _sum(losses_BN, hits_BN)) / (_count(losses_BN, hits_BN) + 1)


def _hits(target_ids_B: Tensor, negative_ids_N: Tensor, mask: bool) -> Tensor | None:
    return target_ids_B[:, None] == negative_ids_N if mask else None


def _sum(losses_BN: Tensor, hits_BN: Tensor | None) -> Tensor:
    """Over the negatives that count, `[B]`."""
    return (losses_BN if hits_BN is None else losses_BN.masked_fill(hits_BN, 0.0)).sum(dim=1)


def _count(losses_BN: Tensor, hits_BN: Tensor | None) -> Tensor:
    """Negatives that count, `[B]`."""
    if hits_BN is None:
        return losses_BN.new_full((len(losses_BN),), losses_BN.shape[1])
    return (~hits_BN).sum(dim=1).to(losses_BN.dtype)
