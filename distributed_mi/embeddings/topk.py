"""Exact top-k of the rows of an item table, alone or over the shards of a group.

Shapes:  R rows held here, D width, Q queries, W workers, t rows of a tile.
"""

import torch
from torch import Tensor

from distributed_mi.core.errors import InputError
from distributed_mi.embeddings.group import WorkerGroup

TILE_ROWS = 16_384
"""Rows scored at once by a top-k."""
TILE_QUERIES = 512
"""Queries scored at once by a top-k; the tile of scores is 32 MiB."""
QUERIES_PER_ROUND = 4_096
"""Queries of one worker that a collective top-k handles at once; bounds what every worker gathers."""

_LOW_32 = 0xFFFFFFFF
NO_CANDIDATE = torch.iinfo(torch.int64).min
"""Key below that of every row: fills up a top-k of a shard with fewer than k rows."""


@torch.no_grad()
def local_topk(weight_RD: Tensor, ids_R: Tensor, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `ItemTable.topk`; never holds more scores than one tile (`TILE_ROWS` by `TILE_QUERIES`).

    Args:
        weight_RD: all rows of the table.
        ids_R: their ids, ascending.
        queries_QD: float32.
        k: at most the number of items.
    """
    return split_keys(_topk_keys(weight_RD, ids_R, queries_QD.detach().float(), k))


@torch.no_grad()
def sharded_topk(
    weight_RD: Tensor, ids_R: Tensor, queries_QD: Tensor, k: int, group: WorkerGroup
) -> tuple[Tensor, Tensor]:
    """See `ItemTable.topk`. Every worker scores the queries of all; k candidates per query and shard travel back.

    Args:
        weight_RD: rows held by this worker.
        ids_R: their ids, ascending.
        queries_QD: float32, this worker's.
        k: at most the number of items in all shards.
        group: the workers.
    """
    queries_QD = queries_QD.detach().float()
    mine = -(-len(queries_QD) // QUERIES_PER_ROUND)
    rounds = max(int(n) for n in group.all_gather_json(mine))
    parts = [queries_QD[i * QUERIES_PER_ROUND : (i + 1) * QUERIES_PER_ROUND] for i in range(rounds)]
    keys = [_round(weight_RD, ids_R, part, k, group) for part in parts]
    return split_keys(torch.cat(keys) if keys else ids_R.new_empty((0, k)))


def _round(weight_RD: Tensor, ids_R: Tensor, queries_QD: Tensor, k: int, group: WorkerGroup) -> Tensor:
    everyone = group.all_gather_rows(queries_QD)
    candidates = _topk_keys(weight_RD, ids_R, torch.cat(everyone), k)
    received, _ = group.all_to_all_rows(candidates, [len(q) for q in everyone])
    by_shard_WQk = received.view(group.size, len(queries_QD), k)
    return by_shard_WQk.transpose(0, 1).reshape(len(queries_QD), group.size * k).topk(k, dim=1).values


def _topk_keys(weight_RD: Tensor, ids_R: Tensor, queries_QD: Tensor, k: int) -> Tensor:
    """Keys `[Q, k]` of the best rows held here, descending; `NO_CANDIDATE` where there are fewer than k."""
    blocks = [_block_keys(weight_RD, ids_R, block, k) for block in queries_QD.split(TILE_QUERIES)]
    return torch.cat(blocks) if blocks else ids_R.new_empty((0, k))


def _block_keys(weight_RD: Tensor, ids_R: Tensor, queries_QD: Tensor, k: int) -> Tensor:
    best_Qk = ids_R.new_full((len(queries_QD), k), NO_CANDIDATE)
    start = 1 if len(ids_R) and int(ids_R[0]) == 0 else 0
    for at in range(start, len(ids_R), TILE_ROWS):
        scores_Qt = queries_QD @ weight_RD[at : at + TILE_ROWS].T
        found = _tile_topk(scores_Qt, ids_R[at : at + TILE_ROWS], k)
        best_Qk = torch.cat([best_Qk, found], dim=1).topk(k, dim=1).values
    return best_Qk


def _tile_topk(scores_Qt: Tensor, ids_t: Tensor, k: int) -> Tensor:
    """Keys of the k best of a tile.

    `torch.topk` breaks ties as it likes, so where the k-th and the next score are equal (rare in trained tables,
    common in counts) that query is done again on keys, which have no ties.
    """
    width = scores_Qt.shape[1]
    if width <= k:
        return order_keys(scores_Qt, ids_t.expand_as(scores_Qt))
    values, places = scores_Qt.topk(k + 1, dim=1)
    keys_Qk = order_keys(values[:, :k], ids_t[places[:, :k]])
    tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
    if tied.numel():
        part = scores_Qt.index_select(0, tied)
        keys_Qk[tied] = order_keys(part, ids_t.expand_as(part)).topk(k, dim=1).values
    return keys_Qk


def order_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """One int64 per candidate that sorts by score, then by smaller id.

    The order-preserving bits of the float32 score stand above, the complement of the id below.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW_32 - ids)


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores float32 and ids int64 of `order_keys`."""
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW_32 - (keys & _LOW_32)


def check_topk(queries_QD: Tensor, k: int, num_rows: int, dim: int) -> None:
    """Refuse a top-k that has no answer.

    Raises:
        InputError: k is not in 1 .. V - 1, or queries of another width.
    """
    if not 1 <= k < num_rows:
        raise InputError(
            f"item table: top-{k} of {num_rows - 1} items; k must be between 1 and {num_rows - 1}"
        )
    if queries_QD.ndim != 2 or queries_QD.shape[1] != dim:
        raise InputError(f"item table: queries of shape {tuple(queries_QD.shape)}, must be [Q, {dim}]")
