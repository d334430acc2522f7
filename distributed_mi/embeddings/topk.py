"""Exact top-k of an item table for users with K interests, alone or over the shards of a group.

Lists are the same, to the last bit, for any number of users at once, number of workers, placement of the rows and
device, because the score of an item depends on nothing but its row and the user's interests (`topk_shard`), and lists
of shards are merged by score and id.

Shapes:  R rows held here, D width, B users, K interests, W workers, M seen pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.errors import InputError
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.topk_shard import NO_CANDIDATE, best_keys, cut_seen, shard_topk, split_keys

GATHERED_USERS = 16_384
"""Users of all workers that a collective top-k handles at once; bounds what every worker gathers."""


class TopK(NamedTuple):
    """The best items of B users, best first, smaller ids first where scores are equal."""

    scores_Bk: Tensor
    """float32; -inf where a list is short. NaN where the table or a user's interests hold a number that is not
    finite."""
    ids_Bk: Tensor
    """int64; 0 where a list is short."""
    interests_Bk: Tensor
    """int64, the interest that gives the score, the first of equals; -1 where a list is short."""


@torch.no_grad()
def local_topk(
    weight_RD: Tensor, ids_R: Tensor, interests: Tensor, k: int, seen_M2: Tensor | None = None
) -> TopK:
    """See `ItemTable.topk`.

    Args:
        weight_RD: all rows of the table, float32.
        ids_R: their ids; the row of id 0 is left out.
        interests: `[B, K, D]` or `[B, D]`.
        k: at most the number of items.
        seen_M2: int64 pairs (place in B, id) to leave out.
    """
    keys_Bk, chosen_Bk = shard_topk(weight_RD, ids_R, with_interests(interests), k, seen_M2)
    return _decode(keys_Bk, chosen_Bk)


@torch.no_grad()
def sharded_topk(
    weight_RD: Tensor,
    ids_R: Tensor,
    interests: Tensor,
    k: int,
    group: WorkerGroup,
    seen_M2: Tensor | None = None,
) -> TopK:
    """See `ItemTable.topk`. Every worker ranks its rows for the users of all; k candidates per user and shard return.

    Args:
        weight_RD: rows held by this worker, float32.
        ids_R: their ids.
        interests: of this worker's users; all workers have the same K.
        k: at most the number of items in all shards.
        group: the workers.
        seen_M2: as in `local_topk`, of this worker's users.
    """
    interests_BKD = with_interests(interests)
    at_once = max(1, GATHERED_USERS // group.size)
    facts = group.all_gather_json([-(-len(interests_BKD) // at_once), seen_M2 is not None])
    rounds = max(int(n) for n, _ in facts)
    if any(has_seen for _, has_seen in facts) and seen_M2 is None:
        seen_M2 = ids_R.new_empty((0, 2))
    found = []
    for low in range(0, max(rounds, 1) * at_once, at_once):
        part = interests_BKD[low : low + at_once]
        mine = None if seen_M2 is None else cut_seen(seen_M2, low, low + at_once)
        found.append(_round(weight_RD, ids_R, part, k, group, mine))
    return _decode(torch.cat([keys for keys, _ in found]), torch.cat([chosen for _, chosen in found]))


def _round(
    weight_RD: Tensor,
    ids_R: Tensor,
    interests_BKD: Tensor,
    k: int,
    group: WorkerGroup,
    seen_M2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    everyone = group.all_gather_rows(interests_BKD)
    counts = [len(q) for q in everyone]
    if seen_M2 is not None:
        starts = np.cumsum([0, *counts])
        parts = [
            seen + torch.tensor([int(start), 0], device=seen.device)
            for seen, start in zip(group.all_gather_rows(seen_M2), starts, strict=False)
        ]
        seen_M2 = torch.cat(parts)
    keys, chosen = shard_topk(weight_RD, ids_R, torch.cat(everyone), k, seen_M2)
    received, _ = group.all_to_all_rows(torch.stack([keys, chosen], dim=1), counts)
    by_shard_BW2k = received.view(group.size, len(interests_BKD), 2, k).transpose(0, 1)
    return best_keys(by_shard_BW2k[:, :, 0].flatten(1), by_shard_BW2k[:, :, 1].flatten(1), k)


def _decode(keys_Bk: Tensor, chosen_Bk: Tensor) -> TopK:
    scores_Bk, ids_Bk = split_keys(keys_Bk)
    empty = keys_Bk == NO_CANDIDATE
    return TopK(
        scores_Bk.masked_fill(empty, -torch.inf),
        ids_Bk.masked_fill(empty, 0),
        chosen_Bk.masked_fill(empty, -1),
    )


def with_interests(interests: Tensor) -> Tensor:
    """Interests of users with one interest, `[B, D]`, as `[B, 1, D]`; others unchanged; float32."""
    interests = interests.detach().float()
    return interests.unsqueeze(1) if interests.ndim == 2 else interests


def check_topk(interests: Tensor, k: int, num_rows: int, dim: int) -> None:
    """Refuse a top-k that has no answer.

    Raises:
        InputError: k is not in 1 .. V - 1, or interests of another shape.
    """
    if not 1 <= k < num_rows:
        raise InputError(
            f"item table: top-{k} of {num_rows - 1} items; k must be between 1 and {num_rows - 1}"
        )
    if interests.ndim not in (2, 3) or interests.shape[-1] != dim or 0 in interests.shape[1:]:
        raise InputError(
            f"item table: interests of shape {tuple(interests.shape)}, must be [B, K, {dim}] or [B, {dim}]"
        )
