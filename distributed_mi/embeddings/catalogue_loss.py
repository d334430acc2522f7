"""Softmax over every item of a table, in tiles, with the choice among a user's interests inside.

    loss_b = log sum_v exp(z_bv) - z_b+         s_bkv = q_bk . e_v, v runs over all items, padding left out
    argmax        z_bv = max_k s_bkv                               what serving ranks by
    label_aware   z_bv = sum_k softmax_k(p s_bkv) s_bkv            MIND's attention, each item in the label's place
    target        z_bv = s_bcv, c = argmax_k s_bk+                 ComiRec: one interest scores all items

The choice of `argmax` and of `target` is not differentiated; ties go to the first interest. With one interest all three
are the plain softmax.

Scores exist for one tile (some users by some rows) at a time. The forward pass keeps one number per user, the log of
the sum; the backward pass makes the tiles again and adds the gradients of the rows to one buffer of the table's size,
which every exact method needs. Of B K V D multiply-adds a step makes four, the least without kept scores being three.

In a group, workers gather each other's interests, score the rows that they hold, and combine maxima and sums. The
gradient of a row comes from the users of all workers and stays where the row is; that of an interest is summed over
workers. Users are gathered in rounds, so a worker holds `USERS_PER_ROUND` of them at most.

Shapes:  B users of this worker, G users of a round, U users of a tile, K interests, D width, R rows held here, C rows
of a tile, W workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distributed_mi.core.errors import InputError
from distributed_mi.core.precision import product_dtype
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.storage import RowStore

InterestChoice = Literal["target", "argmax", "label_aware"]
"""Which of a user's interests scores an item; see the module docstring."""

TILE_SIDE = {"cpu": 512, "cuda": 8_192}
"""Rows of a tile, and interests of a tile over all its users: 1 MiB of scores stay in a CPU's cache (half and twice the
side are slower), 256 MiB are enough for a GPU."""
USERS_PER_ROUND = 8_192
"""Users of all workers that are gathered at once."""


@dataclass(frozen=True)
class Scoring:
    """How interests score an item.

    Args:
        choice: `argmax` or `label_aware`; without meaning for one interest.
        power: p of `label_aware`.
        dtype: of the matrix products; sums are float32 always.
    """

    choice: InterestChoice
    power: float
    dtype: torch.dtype

    def combine(self, scores_KUC: Tensor) -> Tensor:
        """Scores of the items, z `[U, C]`."""
        if len(scores_KUC) == 1:
            return scores_KUC[0]
        if self.choice == "argmax":
            return scores_KUC.amax(dim=0)
        return (torch.softmax(self.power * scores_KUC, dim=0) * scores_KUC).sum(dim=0)

    def spread_(self, scores_KUC: Tensor, z_UC: Tensor, grad_UC: Tensor) -> Tensor:
        """Gradient of the scores from that of z; overwrites the scores and, for `argmax`, `grad_UC`."""
        if len(scores_KUC) == 1:
            return grad_UC[None]
        if self.choice == "label_aware":
            weights_KUC = torch.softmax(self.power * scores_KUC, dim=0)
            slope_KUC = scores_KUC.sub_(z_UC).mul_(self.power).add_(1.0)
            return slope_KUC.mul_(weights_KUC).mul_(grad_UC)
        for scores_UC in scores_KUC:
            scores_UC.eq_(z_UC).mul_(grad_UC)
            grad_UC.sub_(scores_UC)  # an equal score of a later interest gets nothing
        return scores_KUC


def full_catalogue_loss(
    interests_BKD: Tensor,
    target_rows_BD: Tensor,
    *,
    store: RowStore,
    group: WorkerGroup,
    anchor: Tensor,
    choice: InterestChoice,
    power: float,
) -> Tensor:
    """Loss of each user, `[B]`; arguments that are not named here as in `ItemTable.full_catalogue_loss`.

    Args:
        interests_BKD: see there.
        target_rows_BD: see there.
        store: the rows that this worker scores.
        group: the workers that hold the table together.
        anchor: a scalar that requires a gradient.
        choice: see there.
        power: see there.

    Raises:
        InputError: an unknown choice, or interests of another width.
    """
    if choice not in get_args(InterestChoice):
        raise InputError(f"full softmax: choice {choice!r} is none of {', '.join(get_args(InterestChoice))}")
    if interests_BKD.ndim != 3 or interests_BKD.shape[2] != store.dim:
        raise InputError(
            f"full softmax: interests of shape {tuple(interests_BKD.shape)}, must be [B, K, {store.dim}]"
        )
    scoring = Scoring(choice, power, product_dtype(interests_BKD.device.type) or torch.float32)
    interests_BKD = interests_BKD.float()
    closest_B1D = _closest(interests_BKD, target_rows_BD)
    candidates_BKD = closest_B1D if choice == "target" else interests_BKD
    # The largest score of the target is that of the interest closest to it.
    own_BKD = closest_B1D if choice == "argmax" else candidates_BKD
    target_KB1 = (own_BKD @ target_rows_BD[:, :, None]).float().transpose(0, 1)
    lse_B: Tensor = _LogSumExp.apply(anchor, candidates_BKD, store, group, scoring)
    return lse_B - scoring.combine(target_KB1).squeeze(1)


def _closest(interests_BKD: Tensor, target_rows_BD: Tensor) -> Tensor:
    """The interest with the largest inner product with the target, `[B, 1, D]`."""
    if interests_BKD.shape[1] == 1:
        return interests_BKD
    scores_BK = (interests_BKD.detach() @ target_rows_BD.detach()[:, :, None]).squeeze(2)
    best_B = scores_BK.argmax(dim=1)
    return interests_BKD[torch.arange(len(best_B), device=best_B.device), best_B][:, None]


class _LogSumExp(torch.autograd.Function):
    """`log sum_v exp(z_bv)` of this worker's users over the rows of all workers."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        interests_BKD: Tensor,
        store: RowStore,
        group: WorkerGroup,
        scoring: Scoring,
    ) -> Tensor:
        ctx.store, ctx.group, ctx.scoring = store, group, scoring
        lse_B = interests_BKD.new_empty(len(interests_BKD))
        with torch.autocast(interests_BKD.device.type, enabled=False):
            for mine in _rounds(len(interests_BKD), group):
                parts = group.all_gather_rows(interests_BKD[mine])
                here_G = _log_sums(torch.cat(parts), store, scoring)
                largest_G = group.all_reduce_max(here_G)
                lse_G = largest_G + group.all_reduce_sum((here_G - largest_G).exp_()).log_()
                start = sum(len(part) for part in parts[: group.rank])
                lse_B[mine] = lse_G[start : start + len(parts[group.rank])]
        ctx.save_for_backward(interests_BKD, lse_B)
        return lse_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        interests_BKD, lse_B = ctx.saved_tensors
        group: WorkerGroup = ctx.group
        grad_BKD = torch.empty_like(interests_BKD)
        sums_B2 = torch.stack([lse_B, grads[0]], dim=1)
        for mine in _rounds(len(interests_BKD), group):
            interests = interests_BKD[mine]
            packed = group.all_gather_rows(torch.cat([interests.flatten(1), sums_B2[mine]], dim=1))
            everyone = torch.cat(packed)
            grad_GKD = _gradients(
                everyone[:, :-2].unflatten(1, interests.shape[1:]),
                everyone[:, -2],
                everyone[:, -1],
                ctx.store,
                ctx.scoring,
            )
            # Parts of my users from every worker, added up in rank order.
            received = group.exchange_rows(grad_GKD, [len(p) for p in packed], [len(interests)] * group.size)
            grad_BKD[mine] = received.unflatten(0, (group.size, len(interests))).sum(dim=0)
        return None, grad_BKD, None, None, None


def _rounds(num_users: int, group: WorkerGroup) -> Iterator[slice]:
    """This worker's users of each round; as many rounds on every worker, the last ones may be empty."""
    size = max(1, USERS_PER_ROUND // group.size)
    most = group.all_reduce_max(torch.tensor([num_users], device=group.device))
    for at in range(0, int(most), size):
        yield slice(min(at, num_users), min(at + size, num_users))


def _blocks(interests_GKD: Tensor) -> list[Tensor]:
    """Interests of the users of each tile, `[K, U, D]` contiguous."""
    side = TILE_SIDE[interests_GKD.device.type]
    users = max(1, side // interests_GKD.shape[1])
    return [block.transpose(0, 1).contiguous() for block in interests_GKD.split(users)]


def _row_tiles(store: RowStore, device_type: str) -> Iterator[slice]:
    """Rows held here, padding left out, cut into tiles."""
    side = TILE_SIDE[device_type]
    for at in range(1 if store.holds_padding else 0, len(store.weight_RD), side):
        yield slice(at, at + side)


def _scores(block_KUD: Tensor, rows_CD: Tensor) -> Tensor:
    """`[K, U, C]` float32; the product of one matrix."""
    scores = block_KUD.flatten(0, 1) @ rows_CD.T
    return scores.float().view(*block_KUD.shape[:2], len(rows_CD))


def _log_sums(interests_GKD: Tensor, store: RowStore, scoring: Scoring) -> Tensor:
    """Log of the sum over the rows held here, `[G]`; minus infinity where none are."""
    blocks = [block.to(scoring.dtype) for block in _blocks(interests_GKD)]
    sums = [block.new_full(block.shape[1:2], float("-inf"), dtype=torch.float32) for block in blocks]
    for tile in _row_tiles(store, interests_GKD.device.type):
        rows_CD = store.weight_RD[tile].to(scoring.dtype)
        for i, block in enumerate(blocks):
            z_UC = scoring.combine(_scores(block, rows_CD))
            sums[i] = torch.logaddexp(sums[i], z_UC.logsumexp(dim=1))
    return torch.cat(sums)


def _gradients(
    interests_GKD: Tensor, lse_G: Tensor, grad_G: Tensor, store: RowStore, scoring: Scoring
) -> Tensor:
    """Gradient of the interests `[G, K, D]` through the rows held here; that of the rows goes into their store."""
    blocks = [block.to(scoring.dtype) for block in _blocks(interests_GKD)]
    grads = [torch.zeros_like(block, dtype=torch.float32) for block in blocks]
    cuts = [block.shape[1] for block in blocks]
    lses, uppers = lse_G.split(cuts), grad_G.split(cuts)
    grad_RD = store.collect_all()
    for tile in _row_tiles(store, interests_GKD.device.type):
        rows_CD = store.weight_RD[tile].to(scoring.dtype)
        for block, grad_KUD, lse_U, upper_U in zip(blocks, grads, lses, uppers, strict=True):
            scores_KUC = _scores(block, rows_CD)
            z_UC = scoring.combine(scores_KUC)
            weight_UC = torch.sub(z_UC, lse_U[:, None]).exp_().mul_(upper_U[:, None])
            slope_IC = scoring.spread_(scores_KUC, z_UC, weight_UC).flatten(0, 1).to(scoring.dtype)
            _add_product_(grad_KUD.flatten(0, 1), slope_IC, rows_CD)
            _add_product_(grad_RD[tile], slope_IC.T, block.flatten(0, 1))
    return torch.cat([grad.transpose(0, 1) for grad in grads])


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` with a float32 total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
