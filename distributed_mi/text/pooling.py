"""Token states -> one vector per text.

Shapes:  B texts, T tokens (padded), D width.
"""

import torch
from torch import Tensor


def pool(states_BTD: Tensor, mask_BT: Tensor, pooling: str, pooler_BD: Tensor | None = None) -> Tensor:
    """One un-normalised vector per text; what stands on padding changes nothing.

    Args:
        states_BTD: last hidden states, float32.
        mask_BT: True or 1 on real tokens; at least one in each row.
        pooling: `mean` over real tokens, `cls` (first real token) or `pooler` (the model's own output).
        pooler_BD: the model's pooler output, for `pooler`.

    Returns:
        `[B, D]` float32.

    Raises:
        ValueError: an unknown pooling, or `pooler` for a model that has none.
    """
    if pooling == "mean":
        weights = mask_BT.to(states_BTD.dtype).unsqueeze(-1)
        return (states_BTD * weights).sum(dim=1) / weights.sum(dim=1)
    if pooling == "cls":
        first = mask_BT.to(torch.int64).argmax(dim=1)
        return states_BTD[torch.arange(len(states_BTD), device=states_BTD.device), first]
    if pooling == "pooler":
        if pooler_BD is None:
            raise ValueError('this model has no pooler output; use pooling "mean" or "cls"')
        return pooler_BD
    raise ValueError(f'unknown pooling "{pooling}". Known: mean, cls, pooler')
