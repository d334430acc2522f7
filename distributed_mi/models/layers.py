"""Parts that several models are built from.

Shapes:  B users, L history (left-padded, newest item last), K interests, D width, M semantic interests.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


def kaiming_normal(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter with values from N(0, 2 / fan_in), as REMI's code starts every tensor."""
    return nn.Parameter(torch.randn(*shape) * math.sqrt(2.0 / fan_in))


def masked_mean(rows_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean over the real items, `[B, D]`; every user has at least one."""
    weight_BL = mask_BL.to(rows_BLD.dtype)
    return (weight_BL[:, None, :] @ rows_BLD).squeeze(1) / weight_BL.sum(dim=1, keepdim=True)


class RecencyPositions(nn.Module):
    """A learned vector for each distance from the newest item, so that padding cannot shift positions."""

    def __init__(self, max_history: int, dim: int) -> None:
        super().__init__()
        self.by_distance_LD = kaiming_normal(max_history, dim, fan_in=max_history * dim)

    def forward(self, length: int) -> Tensor:
        """Vectors of a window's slots, `[length, D]`; slots older than the longest history share the last."""
        limit = self.by_distance_LD.shape[0] - 1
        distance_L = torch.arange(length - 1, -1, -1, device=self.by_distance_LD.device).clamp_(max=limit)
        return self.by_distance_LD.index_select(0, distance_L)


class AttentivePooling(nn.Module):
    """Several weighted means of a history: ComiRec's self-attentive interest extraction.

    attention = softmax_L( W2 tanh(W1 (h + p) + b1) ) over real items; interests = attention @ h.
    """

    def __init__(
        self,
        dim: int,
        num_interests: int,
        *,
        attention_dim: int,
        max_history: int,
        bias: bool,
        positions: bool,
    ) -> None:
        super().__init__()
        self.inner_DA = kaiming_normal(dim, attention_dim, fan_in=dim)
        self.outer_AK = kaiming_normal(attention_dim, num_interests, fan_in=attention_dim)
        self.inner_bias_A = nn.Parameter(torch.zeros(attention_dim)) if bias else None
        self.positions = RecencyPositions(max_history, dim) if positions else None

    def forward(self, rows_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Interests `[B, K, D]` and attention `[B, K, L]`, whose rows sum to 1 and are 0 on padding."""
        if rows_BLD.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            scores_BLK = self._packed_scores(rows_BLD, mask_BL)
        else:
            rows_BLD = rows_BLD * mask_BL[:, :, None]
            scores_BLK = self._scores(rows_BLD, mask_BL)
        attention_BKL = torch.softmax(scores_BLK, dim=1).transpose(1, 2)
        return (attention_BKL @ rows_BLD), attention_BKL

    def _scores(self, rows_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Attention before the softmax, -inf on padding."""
        keys_BLD = rows_BLD if self.positions is None else rows_BLD + self.positions(rows_BLD.shape[1])
        hidden_BLA = keys_BLD @ self.inner_DA
        if self.inner_bias_A is not None:
            hidden_BLA = hidden_BLA + self.inner_bias_A
        scores_BLK = (torch.tanh(hidden_BLA) @ self.outer_AK).float()
        return scores_BLK.masked_fill(~mask_BL[:, :, None], float("-inf"))

    def _packed_scores(self, rows_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """The same from the real places alone: most places of a batch are padding (Beauty: 70% at L = 20).

        For a CPU; elsewhere the host would wait for the device to find them.
        """
        batch, length, dim = rows_BLD.shape
        places_P = mask_BL.reshape(-1).nonzero().flatten()
        positions_LD = None if self.positions is None else self.positions(length)
        scores_SK = _PackedScores.apply(
            rows_BLD.reshape(batch * length, dim),
            places_P,
            places_P.remainder(length),
            positions_LD,
            self.inner_DA,
            self.inner_bias_A,
            self.outer_AK,
        )
        return scores_SK.view(batch, length, self.outer_AK.shape[1])


class _PackedScores(torch.autograd.Function):
    """`tanh((rows + positions) W1 + b) W2` at some places and -inf elsewhere, `[S, K]`, written out for a CPU.

    Products with the K columns of W2 are taken transposed, which is four times faster for a K of a few; tanh comes from
    the logistic function, which is three times faster and within 2e-7.

    Shapes:  S places of a batch, P real ones, A inner width.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_SD: Tensor,
        places_P: Tensor,
        slots_P: Tensor,
        positions_LD: Tensor | None,
        inner_DA: Tensor,
        bias_A: Tensor | None,
        outer_AK: Tensor,
    ) -> Tensor:
        keys_PD = rows_SD.index_select(0, places_P)
        if positions_LD is not None:
            keys_PD += positions_LD.index_select(0, slots_P)
        hidden_PA = keys_PD @ inner_DA if bias_A is None else torch.addmm(bias_A, keys_PD, inner_DA)
        hidden_PA.mul_(2).sigmoid_().mul_(2).sub_(1)
        ctx.num_places, ctx.has_bias = len(rows_SD), bias_A is not None
        ctx.window = None if positions_LD is None else len(positions_LD)
        ctx.save_for_backward(places_P, slots_P, keys_PD, inner_DA, outer_AK, hidden_PA)
        scores_SK = rows_SD.new_full((len(rows_SD), outer_AK.shape[1]), float("-inf"))
        return scores_SK.index_copy_(0, places_P, (outer_AK.T @ hidden_PA.T).T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places_P, slots_P, keys_PD, inner_DA, outer_AK, hidden_PA = ctx.saved_tensors
        grad_PK = grads[0].index_select(0, places_P)
        outer = (grad_PK.T @ hidden_PA).T
        flow_PA = torch.ops.aten.tanh_backward(grad_PK @ outer_AK.T, hidden_PA)
        bias = flow_PA.sum(dim=0) if ctx.has_bias else None
        flow_PD = flow_PA @ inner_DA.T
        rows = flow_PD.new_zeros((ctx.num_places, flow_PD.shape[1])).index_copy_(0, places_P, flow_PD)
        positions = None
        if ctx.window is not None:
            positions = flow_PD.new_zeros((ctx.window, flow_PD.shape[1])).index_add_(0, slots_P, flow_PD)
        return rows, None, None, positions, keys_PD.T @ flow_PA, bias, outer


class SelfAttention(nn.Module):
    """Multi-head self-attention over a masked set, no positions.

    Without projections queries, keys and values are the vectors themselves and nothing is trained.
    """

    def __init__(self, dim: int, *, num_heads: int, residual: bool, projections: bool = True) -> None:
        super().__init__()
        self.num_heads, self.residual = num_heads, residual
        self.inputs = nn.Linear(dim, 3 * dim) if projections else None
        self.output = nn.Linear(dim, dim) if projections else None

    def forward(self, values_BMD: Tensor, mask_BM: Tensor) -> Tensor:
        """New vectors `[B, M, D]`; each attends to the real vectors only. What stands at padding has no meaning."""
        b, m, d = values_BMD.shape
        projected = values_BMD.repeat(1, 1, 3) if self.inputs is None else self.inputs(values_BMD)
        qkv = projected.view(b, m, 3, self.num_heads, d // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_BM[:, None, None, :]
        )
        out_BMD = mixed.transpose(1, 2).reshape(b, m, d)
        if self.output is not None:
            out_BMD = self.output(out_BMD)
        return values_BMD + out_BMD if self.residual else out_BMD
