"""Pulling two views of the same user, or of the same item, together (EIMF, equations 10 to 12).

    CL(a, b)_k  = -log [ exp(cos(a_k, b_k) / tau) / sum_j exp(cos(a_k, b_j) / tau) ]
    Cos(a, b)_k = 1 - cos(a_k, b_k)

The contrast has one direction, a against all b. j runs over all users of the global step: a worker passes its own a
and the gathered b.

Shapes:  B users of this worker, G users of the step, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_mi.losses.sampled_softmax import MASKED


def info_nce(
    anchors_BD: Tensor,
    candidates_GD: Tensor,
    *,
    offset: int,
    temperature: float,
    anchor_keys_B: Tensor | None = None,
    candidate_keys_G: Tensor | None = None,
) -> Tensor:
    """Contrastive loss of each anchor, `[B]`.

    Args:
        anchors_BD: this worker's vectors; the match of row b is candidate `offset + b`.
        candidates_GD: the other view of all users of the step.
        offset: where this worker's users begin among the candidates.
        temperature: tau.
        anchor_keys_B: what an anchor stands for (its target id). With `candidate_keys_G`, other candidates with the
            same key are left out: they are no negatives. None: all count.
        candidate_keys_G: the same of the candidates.
    """
    scores_BG = F.normalize(anchors_BD, dim=1) @ F.normalize(candidates_GD, dim=1).T / temperature
    own_B = torch.arange(len(anchors_BD), device=anchors_BD.device) + offset
    if anchor_keys_B is not None and candidate_keys_G is not None:
        same_BG = anchor_keys_B[:, None] == candidate_keys_G
        same_BG[torch.arange(len(own_B), device=own_B.device), own_B] = False
        scores_BG = scores_BG.masked_fill(same_BG, MASKED)
    return F.cross_entropy(scores_BG, own_B, reduction="none")


def cosine_distance(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """`1 - cos` of each pair, `[B]`; 1 where a vector is zero."""
    return 1.0 - F.cosine_similarity(a_BD, b_BD, dim=1)
