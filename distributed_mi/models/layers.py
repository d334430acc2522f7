"""Parts that several models are built from.

Shapes:  B users, L history (left-padded, newest item last), K interests, D width, M semantic interests.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distributed_mi.core.cpu import map_slices
from distributed_mi.core.precision import product, product_dtype


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
        if self._can_be_packed(rows_BLD):
            by_distance_MD = None if self.positions is None else self.positions.by_distance_LD
            packed: tuple[Tensor, Tensor] = _PackedPooling.apply(
                rows_BLD, mask_BL, by_distance_MD, self.inner_DA, self.inner_bias_A, self.outer_AK
            )
            return packed
        rows_BLD = rows_BLD * mask_BL[:, :, None]
        attention_BKL = torch.softmax(self._scores(rows_BLD, mask_BL), dim=1).transpose(1, 2)
        return attention_BKL @ rows_BLD, attention_BKL

    def _can_be_packed(self, rows_BLD: Tensor) -> bool:
        """Whether the compiled form can do it; on other devices the host would wait for the device to find places."""
        return rows_BLD.device.type == "cpu" and rows_BLD.dtype == self.inner_DA.dtype == torch.float32

    def _scores(self, rows_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Attention before the softmax, -inf on padding."""
        keys_BLD = rows_BLD if self.positions is None else rows_BLD + self.positions(rows_BLD.shape[1])
        hidden_BLA = keys_BLD @ self.inner_DA
        if self.inner_bias_A is not None:
            hidden_BLA = hidden_BLA + self.inner_bias_A
        scores_BLK = (torch.tanh(hidden_BLA) @ self.outer_AK).float()
        return scores_BLK.masked_fill(~mask_BL[:, :, None], float("-inf"))


class _PackedPooling(torch.autograd.Function):
    """`AttentivePooling` from the real places alone, for a CPU; see `kernels`.

    Under autocast the two products with W1, which are the large ones, are taken in its precision, by torch, which has
    all threads then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_BLD: Tensor,
        mask_BL: Tensor,
        by_distance_MD: Tensor | None,
        inner_DA: Tensor,
        bias_A: Tensor | None,
        outer_AK: Tensor,
    ) -> tuple[Tensor, Tensor]:
        from distributed_mi.models import kernels

        batch, length, dim = rows_BLD.shape
        inner_dim, num_interests = outer_AK.shape
        ctx.dtype = product_dtype("cpu")
        rows_BLD, inner_DA = rows_BLD.contiguous(), inner_DA.contiguous()
        rows_SD, inner = rows_BLD.view(batch * length, dim).numpy(), inner_DA.detach().numpy()
        positions = _NONE if by_distance_MD is None else by_distance_MD.detach().contiguous().numpy()
        bias = _NO_VECTOR if bias_A is None else bias_A.detach().numpy()
        outer = outer_AK.detach().T.contiguous().numpy()
        places, starts = kernels.find_places(mask_BL.contiguous().numpy())
        keys = _with_spare_rows(len(places), dim, ctx.dtype)
        rows = np.empty((len(places), dim), np.float32)
        scores = np.empty((num_interests, len(places)), np.float32)
        attention = np.zeros((batch, num_interests, length), np.float32)
        interests = np.zeros((batch, num_interests, dim), np.float32)
        if ctx.dtype is None:
            hidden = np.empty((len(places), inner_dim), np.float32)

            def work(b: slice) -> None:
                of_users = (
                    places,
                    starts[b.start : b.stop + 1],
                    rows,
                    keys,
                    hidden,
                    scores,
                    attention[b],
                    interests[b],
                )
                kernels.forward(rows_SD, places, positions, inner, bias, outer, *of_users)

            map_slices(work, batch, length * dim)
        else:
            kernels.read(rows_SD, places, positions, length, places, starts, rows, keys)
            with torch.autocast("cpu", enabled=False):
                hidden = product(torch.from_numpy(keys), inner_DA.detach(), ctx.dtype).numpy()
            kernels.score(bias, outer, starts, hidden, scores)
            kernels.pool(scores, rows, places, starts, attention, interests)
        attention_BKL = torch.from_numpy(attention)
        ctx.small = (positions, bias, outer, places, starts)
        # As tensors, so that what counts the bytes of a graph (`training.preflight`) sees them.
        ctx.save_for_backward(attention_BKL, inner_DA, *map(torch.from_numpy, (rows, keys, hidden)))
        ctx.set_materialize_grads(False)
        return torch.from_numpy(interests), attention_BKL

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from distributed_mi.models import kernels

        attention, inner, rows, keys, hidden = (tensor.numpy() for tensor in ctx.saved_tensors)
        positions, bias, outer, places, starts = ctx.small
        scores = np.empty((len(outer), len(places)), np.float32)  # room for their gradients
        batch, length, dim = len(attention), attention.shape[2], rows.shape[1]
        grad_interests = np.zeros((*attention.shape[:2], dim), np.float32)
        if grads[0] is not None:
            grad_interests = grads[0].contiguous().numpy()
        grad_attention = _NONE[None][:0] if grads[1] is None else grads[1].contiguous().numpy()
        grad_rows = np.empty_like(rows)
        flow = _with_spare_rows(len(places), hidden.shape[1], ctx.dtype)

        def room() -> tuple[np.ndarray, ...]:
            """For gradients of positions, bias and outer weights."""
            return np.zeros_like(positions), np.zeros(hidden.shape[1], np.float32), np.zeros_like(outer)

        def work(b: slice) -> tuple[np.ndarray, ...]:
            of_positions, of_bias, of_outer = room()
            of_inner = np.empty_like(inner)
            kernels.backward(
                grad_interests[b],
                grad_attention[b],
                attention[b],
                rows,
                inner,
                outer,
                places,
                starts[b.start : b.stop + 1],
                keys,
                hidden,
                scores,
                flow,
                grad_keys,
                grad_rows,
                of_positions,
                of_inner,
                of_bias,
                of_outer,
            )
            return of_positions, of_inner, of_bias, of_outer

        if ctx.dtype is None:
            grad_keys = np.empty_like(keys)
            parts = map_slices(work, batch, length * dim)
            of_positions, of_inner, of_bias, of_outer = parts[0]
            for part in parts[1:]:
                for total, value in zip(parts[0], part, strict=True):
                    total += value
        else:
            of_positions, of_bias, of_outer = room()
            kernels.score_backward(
                grad_interests, grad_attention, attention, rows, outer, places, starts, hidden, scores,
                grad_rows, flow, of_bias, of_outer,
            )  # fmt: skip
            flow_PA = torch.from_numpy(flow)
            grad_keys = product(flow_PA, torch.from_numpy(inner).T, ctx.dtype).numpy()
            kernels.add_keys(grad_keys, places, starts, length, grad_rows, of_positions)
            of_inner = product(torch.from_numpy(keys).T, flow_PA, ctx.dtype).numpy()
        grad_rows_BLD = torch.empty((batch, length, dim))
        kernels.spread(grad_rows, places, grad_rows_BLD.view(-1, dim).numpy())
        return (
            grad_rows_BLD,
            None,
            torch.from_numpy(of_positions) if len(positions) else None,
            torch.from_numpy(of_inner),
            torch.from_numpy(of_bias) if len(bias) else None,
            torch.from_numpy(of_outer).T,
        )


_SHAPE_ROWS = 64
"""Rows of which a product in bfloat16 gets a multiple."""


def _with_spare_rows(rows: int, width: int, dtype: torch.dtype | None) -> np.ndarray:
    """Room for rows as the factor of a product, filled up with zeros where its number of rows matters.

    Products in bfloat16 are compiled anew for each shape (oneDNN, a quarter of a millisecond), and each batch has
    another number of real places.
    """
    spare = 0 if dtype is None else -rows % _SHAPE_ROWS
    out = np.empty((rows + spare, width), np.float32)
    out[rows:] = 0.0
    return out


_NONE, _NO_VECTOR = np.empty((0, 0), np.float32), np.empty(0, np.float32)
"""Stand for what is not there."""


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
