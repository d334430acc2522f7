"""Exact top-k of the rows that one worker holds.

A user's score of an item is the largest inner product over the interests: float32 numbers multiplied and added in
float64 (`score`: four sums over d mod 4, in order) and rounded to float32. It depends on these two vectors alone. A
matrix product does not have that property: its bits change with the shape of the tile, the number of threads and the
library. So matrix products only choose: they are wrong by at most

    n u / (1 - n u) |q| |e|,   n = D + 8,  u = 2^-24 for float32 (Higham, Accuracy and Stability, 2002, section 3.1;
                               8 more for the roundings of what is compared), and underflow

for any order of summation, with or without fused multiply-add. On a CPU with instructions for bfloat16 they are taken
of rounded vectors, at half the cost, which adds |q - q'| |e| + |q'| |e - e'|, and rounded themselves, which keeps their
order. Items within twice that of the k-th best stay candidates and are scored again.

Shapes:  R rows held here, D width, B users, K interests, t rows of a tile, n candidates, M seen pairs.
"""

from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.cpu import map_single_threaded

TILE_ROWS = 2_048
"""Rows scored at once by a thread."""
TILE_QUERIES = 512
"""Interests scored at once by a thread; the tile of scores is 4 MiB, or half of it in bfloat16."""
BUFFER_BYTES = 1 << 23
"""Candidates that a thread holds at once."""
DEVICE_TILE_ROWS = 65_536
"""Rows scored at once on a device other than the CPU."""
DEVICE_TILE_QUERIES = 512
"""Interests scored at once there; the tile of scores is 128 MiB."""
_ROOM = 192
"""Places of a candidate buffer beyond 2 k; at least 2."""
_SPARE = 64
"""Candidates that are kept beyond k on a device; a user with more ties than that is scored exactly all over."""
_TINY = 2.0**-126
"""Smallest normal float32: what a product may lose by underflow."""
_LOW_32 = 0xFFFFFFFF
NO_CANDIDATE = torch.iinfo(torch.int64).min
"""Key below that of every row: fills up a top-k of a shard with fewer than k rows."""


def shard_topk(
    weight_RD: Tensor, ids_R: Tensor, interests_BKD: Tensor, k: int, seen_M2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact top-k of the rows held here, as what the shards of a group exchange.

    Args:
        weight_RD: float32 rows.
        ids_R: their ids; id 0 is left out.
        interests_BKD: float32.
        k: length of the lists.
        seen_M2: int64 pairs (place in B, id) to leave out.

    Returns:
        Keys `[B, k]` (`order_keys`), descending, `NO_CANDIDATE` where the shard has fewer than k items to offer, and
        the interests that give the scores.
    """
    users = len(interests_BKD)
    keys_Bk = ids_R.new_full((users, k), NO_CANDIDATE)
    chosen_Bk = ids_R.new_full((users, k), -1)
    if users == 0 or len(ids_R) == 0:
        return keys_Bk, chosen_Bk
    compiled = _is_compiled(weight_RD)
    norm, rest = _largest_norms(weight_RD, compiled)
    own_B, rest_B = _norms(interests_BKD, compiled)
    dtype = _approximate_dtype() if compiled else torch.float32
    margins = partial(_margins, own_B, norm, ids_R, interests_BKD)
    margins_B = margins((rest_B, rest) if dtype == torch.bfloat16 else None)
    bad = torch.isnan(margins_B)
    if not bool(bad.all()):
        work = _torch_topk
        if compiled:
            fine_B = margins_B if dtype == torch.float32 else margins()
            work = partial(_compiled_topk, dtype=dtype, fine_margins_B=fine_B.masked_fill(bad, 0.0))
        calm_BKD = interests_BKD.masked_fill(bad[:, None, None], 0.0)
        work(weight_RD, ids_R, calm_BKD, k, margins_B.masked_fill(bad, 0.0), seen_M2, keys_Bk, chosen_Bk)
    keys_Bk[bad] = order_keys(weight_RD.new_full((k,), torch.nan), torch.ones_like(ids_R[:1]).expand(k))
    return keys_Bk, chosen_Bk


def _is_compiled(weight_RD: Tensor) -> bool:
    return weight_RD.device.type == "cpu" and weight_RD.dtype == torch.float32


@cache
def _approximate_dtype() -> torch.dtype:
    """What scores are approximated in on this CPU: bfloat16 where it has instructions for it, which double the rate."""
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def _largest_norms(weight_RD: Tensor, compiled: bool) -> tuple[float, float]:
    """Largest norm of a row, and of what rounding to bfloat16 takes from one; NaN when a row is not finite."""
    if compiled:
        from distributed_mi.embeddings import topk_kernels

        norm, rest = topk_kernels.largest_norms(weight_RD.numpy())
        return float(norm), float(rest)
    parts = weight_RD.split(DEVICE_TILE_ROWS)
    largest = torch.stack([part.double().square().sum(dim=1).amax() for part in parts]).amax().sqrt()
    return (float(largest) if bool(largest.isfinite()) else float("nan")), 0.0


def _norms(interests_BKD: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
    """Largest norm of each user's interests, and of what rounding to bfloat16 takes from one, float64.

    Not finite where an interest is not.
    """
    if compiled:
        from distributed_mi.embeddings import topk_kernels

        norms_2B = interests_BKD.new_empty((2, len(interests_BKD)), dtype=torch.float64)
        topk_kernels.norms_of_users(interests_BKD.contiguous().numpy(), *norms_2B.numpy())
        own_B, rest_B = norms_2B
        return own_B, rest_B
    own_B = interests_BKD.double().square().sum(dim=2).amax(dim=1).sqrt()
    return own_B, torch.zeros_like(own_B)


def _margins(
    own_B: Tensor,
    norm: float,
    ids_R: Tensor,
    interests_BKD: Tensor,
    rests: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Twice the largest error of an approximate score of each user, float32.

    NaN where a score is not finite whatever the approximation; infinite where the approximation may overflow; 0 where
    every score is 0 (a user without interests, a table of zeros) and the ids ascend.

    Args:
        own_B: largest norm of each user's interests.
        norm: largest norm of a row.
        ids_R: ids of the rows.
        interests_BKD: for their width and device.
        rests: norms of what rounding takes from interests and rows, for products of bfloat16 vectors.
    """
    width = interests_BKD.shape[2]
    own_B = own_B.masked_fill(own_B.isinf(), torch.nan)
    gamma = _relative_error(interests_BKD.device.type, width)
    underflow = _TINY * (width + width**0.5 * (own_B + norm))
    error_B = gamma * own_B * norm + underflow
    if rests is not None:
        error_B = error_B + rests[0] * norm + own_B * rests[1]
        error_B = error_B * (1.0 + 2.0**-7)  # the rounded vectors' norms
    error_B = error_B.masked_fill(own_B * norm >= 2.0**126, torch.inf)
    if bool((ids_R[1:] > ids_R[:-1]).all()):
        error_B = error_B.masked_fill(own_B * norm == 0.0, 0.0)
    return (2.02 * error_B).float()


def _relative_error(device: str, width: int) -> float:
    """Error of an inner product of this width by a matrix product, relative to the product of the norms."""
    steps = (width + 8) * 2.0**-24
    if steps >= 0.5:
        return float("inf")
    error = steps / (1.0 - steps)
    if device not in ("cpu", "cuda") or torch.get_float32_matmul_precision() != "highest":
        error += 2.0**-6  # bfloat16 inside: two inputs, and a reserve
    return error


def _compiled_topk(
    weight_RD: Tensor,
    ids_R: Tensor,
    interests_BKD: Tensor,
    k: int,
    margins_B: Tensor,
    seen_M2: Tensor | None,
    keys_Bk: Tensor,
    chosen_Bk: Tensor,
    *,
    dtype: torch.dtype,
    fine_margins_B: Tensor,
) -> None:
    """Blocks of users, each of them scored and selected by one thread."""
    from distributed_mi.embeddings import topk_kernels

    users, interests, _ = interests_BKD.shape
    places = 2 * k + _ROOM
    share = -(-users // torch.get_num_threads())
    block = max(1, min(TILE_QUERIES // interests, BUFFER_BYTES // (20 * places), share))
    starts_B1, seen_M = _seen_lists(seen_M2, users)
    weight, ids = weight_RD.contiguous().numpy(), ids_R.numpy()

    @torch.inference_mode()
    def work(low: int) -> None:
        part_BKD = interests_BKD[low : low + block].contiguous()
        size = len(part_BKD)
        queries, queries_ND = part_BKD.numpy(), part_BKD.view(size * interests, -1).to(dtype)
        out = queries_ND.new_empty(size * interests * min(TILE_ROWS, len(ids)))
        margins, fine = margins_B[low : low + block].numpy(), fine_margins_B[low : low + block].numpy()
        starts = starts_B1[low : low + block + 1]
        thresholds = np.full(size, -np.inf, dtype=np.float32)
        slots, scores = np.empty((size, places), dtype=np.int64), np.empty((size, places), dtype=np.float32)
        marks, counts = np.empty((size, places), dtype=np.int64), np.zeros(size, dtype=np.int64)
        for at in range(0, len(ids), TILE_ROWS):
            rows_tD = weight_RD[at : at + TILE_ROWS]
            tile = out[: size * interests * len(rows_tD)].view(size * interests, len(rows_tD))
            torch.mm(queries_ND, rows_tD.to(dtype).T, out=tile)
            bits = tile.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
            topk_kernels.scan_tile(
                bits.view(size, interests, -1).numpy(), at, weight, ids, queries, margins, starts, seen_M, k,
                thresholds, slots, scores, marks, counts,
            )  # fmt: skip
        best, found = np.zeros((size, k), dtype=np.float32), np.zeros((size, k), dtype=np.int64)
        chosen = np.full((size, k), -1, dtype=np.int64)
        topk_kernels.finish(
            weight,
            ids,
            queries,
            margins,
            fine,
            dtype == torch.bfloat16,
            slots,
            scores,
            marks,
            counts,
            best,
            found,
            chosen,
        )
        keys = order_keys(torch.from_numpy(best), torch.from_numpy(found))
        keys_Bk[low : low + size] = keys.masked_fill(torch.from_numpy(found) == 0, NO_CANDIDATE)
        chosen_Bk[low : low + size] = torch.from_numpy(chosen)

    map_single_threaded(work, range(0, users, block))


def _seen_lists(seen_M2: Tensor | None, users: int) -> tuple[np.ndarray, np.ndarray]:
    """Seen ids in ascending order for each user, and where each user's begin `[B + 1]`."""
    if seen_M2 is None:
        return np.zeros(users + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    rows, items = seen_M2.cpu().numpy().T
    order = np.lexsort((items, rows))
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=users))])
    return starts, np.ascontiguousarray(items[order])


def _torch_topk(
    weight_RD: Tensor,
    ids_R: Tensor,
    interests_BKD: Tensor,
    k: int,
    margins_B: Tensor,
    seen_M2: Tensor | None,
    keys_Bk: Tensor,
    chosen_Bk: Tensor,
) -> None:
    """The same lists by operations of torch alone, for any device."""
    block = max(1, DEVICE_TILE_QUERIES // interests_BKD.shape[1])
    for low in range(0, len(interests_BKD), block):
        part_BKD, margins = interests_BKD[low : low + block], margins_B[low : low + block]
        seen = None if seen_M2 is None else cut_seen(seen_M2, low, low + block)
        keys, chosen, sure = _by_candidates(weight_RD, ids_R, part_BKD, k, margins, seen)
        for user in (~sure).nonzero().flatten().tolist():
            mine = None if seen is None else cut_seen(seen, user, user + 1)
            keys[user], chosen[user] = _by_all(weight_RD, ids_R, part_BKD[user : user + 1], k, mine)
        keys_Bk[low : low + block], chosen_Bk[low : low + block] = keys, chosen


def _by_candidates(
    weight_RD: Tensor,
    ids_R: Tensor,
    interests_BKD: Tensor,
    k: int,
    margins_B: Tensor,
    seen_M2: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, interests, and for whom the approximation left no doubt."""
    users, interests, width = interests_BKD.shape
    places = min(k + _SPARE, len(ids_R))
    best_Bn = weight_RD.new_full((users, places), -torch.inf, dtype=torch.float32)
    slots_Bn = ids_R.new_zeros((users, places))
    for at in range(0, len(ids_R), DEVICE_TILE_ROWS):
        rows_tD = weight_RD[at : at + DEVICE_TILE_ROWS].float()
        with torch.autocast(weight_RD.device.type, enabled=False):
            scores_Bt = (interests_BKD.reshape(-1, width) @ rows_tD.T).view(users, interests, -1).amax(dim=1)
        _hide(scores_Bt, ids_R[at : at + DEVICE_TILE_ROWS], seen_M2)
        top = scores_Bt.topk(min(places, scores_Bt.shape[1]), dim=1)
        both = torch.cat([best_Bn, top.values], dim=1).topk(places, dim=1)
        slots_Bn = torch.cat([slots_Bn, top.indices + at], dim=1).gather(1, both.indices)
        best_Bn = both.values
    last = best_Bn[:, -1]
    sure = torch.isneginf(last) | (last < best_Bn[:, min(k, places) - 1] - margins_B)
    if places == len(ids_R):
        sure = torch.ones_like(sure)
    sure &= torch.isfinite(margins_B)
    scores, chosen = score(interests_BKD[:, :, None, :], weight_RD[slots_Bn].float()[:, None])
    keys = order_keys(scores, ids_R[slots_Bn]).masked_fill(torch.isneginf(best_Bn), NO_CANDIDATE)
    return *best_keys(keys, chosen, k), sure


def _by_all(
    weight_RD: Tensor, ids_R: Tensor, interests_1KD: Tensor, k: int, seen_M2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys and interests of one user from exact scores of all rows."""
    keys, chosen = ids_R.new_full((1, k), NO_CANDIDATE), ids_R.new_full((1, k), -1)
    for at in range(0, len(ids_R), DEVICE_TILE_ROWS):
        scores, interests = score(
            interests_1KD[:, :, None, :], weight_RD[None, None, at : at + DEVICE_TILE_ROWS]
        )
        ids_t = ids_R[at : at + DEVICE_TILE_ROWS]
        shown = _hide(torch.zeros_like(scores), ids_t, seen_M2)
        found = order_keys(scores, ids_t.expand_as(scores)).masked_fill(torch.isneginf(shown), NO_CANDIDATE)
        keys, chosen = best_keys(torch.cat([keys, found], dim=1), torch.cat([chosen, interests], dim=1), k)
    return keys[0], chosen[0]


def best_keys(keys_Bn: Tensor, chosen_Bn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest keys `[B, k]` and their interests; filled up where there are fewer."""
    missing = max(0, k - keys_Bn.shape[1])
    keys_Bn = torch.nn.functional.pad(keys_Bn, (0, missing), value=NO_CANDIDATE)
    best = keys_Bn.topk(k, dim=1)
    return best.values, torch.nn.functional.pad(chosen_Bn, (0, missing), value=-1).gather(1, best.indices)


def _hide(scores_Bt: Tensor, ids_t: Tensor, seen_M2: Tensor | None) -> Tensor:
    """Put -inf in the place of padding and of what a user has seen."""
    scores_Bt.masked_fill_(ids_t == 0, -torch.inf)
    if seen_M2 is not None and len(seen_M2):
        ordered, places = ids_t.sort()
        rows, items = seen_M2.unbind(1)
        at = torch.searchsorted(ordered, items.contiguous()).clamp_max(len(ids_t) - 1)
        here = ordered[at] == items
        scores_Bt[rows[here], places[at[here]]] = -torch.inf
    return scores_Bt


def score(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The score that lists are made of, from elementwise operations in a fixed order, on any device.

    Args:
        queries: `[..., K, ..., D]` float32, K the second axis.
        rows: float32, broadcast against them.

    Returns:
        Largest inner product over the second axis, float32, and its place, the first of equals.
    """
    missing = -queries.shape[-1] % 4
    queries, rows = (torch.nn.functional.pad(x, (0, missing)) for x in (queries, rows))
    total: Tensor | float = 0.0
    for d in range(0, queries.shape[-1], 4):
        total = total + queries[..., d : d + 4].double() * rows[..., d : d + 4].double()
    assert isinstance(total, Tensor)
    a, b, c, e = total.unbind(-1)
    scores = ((a + b) + (c + e)).float() + 0.0
    best = scores.amax(dim=1)
    return best, (scores == best.unsqueeze(1)).to(torch.uint8).argmax(dim=1)


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


def cut_seen(seen_M2: Tensor, low: int, high: int) -> Tensor:
    """Pairs of the users from `low` to `high`, counted from `low`."""
    inside = (seen_M2[:, 0] >= low) & (seen_M2[:, 0] < high)
    return seen_M2[inside] - torch.tensor([low, 0], device=seen_M2.device)
