"""Exact top-N lists over the whole catalogue for users with K interests.

An item's score is its largest inner product over a user's interests. The N best items by that score are all among the
K per-interest top-N lists (an item that beats its rank-N competitor in its best interest's list has at most N - 1 items
above it there), so merging those lists by maximum is exact, ties included: smaller ids first, as in the table's lists.

Shapes:  B users, K interests, n list depth, N list length, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from distributed_mi.core.errors import StageError
from distributed_mi.core.progress import Bar
from distributed_mi.data.batches import share_bounds
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.evaluation.metrics.base import Ints
from distributed_mi.evaluation.protocol import Cases
from distributed_mi.models.base import HistoryBatch, Recommender


@dataclass(frozen=True)
class MergedLists:
    """Recommended items of B users, best first; short lists end in id 0, score -inf, interest -1."""

    ids_BN: Ints
    scores_BN: np.ndarray
    interests_BN: Ints


def merge_interests(
    scores_BKn: np.ndarray, ids_BKn: Ints, length: int, seen: tuple[Ints, Ints] | None = None
) -> MergedLists:
    """Merge per-interest lists by maximum.

    Args:
        scores_BKn: float32, descending in each list.
        ids_BKn: int64; id 0 marks an empty place.
        length: N.
        seen: (row number, item index) pairs to leave out.

    Returns:
        Lists without repetition; of an item in several lists the best score stays, with its interest (first of equals).
    """
    num_users, _, depth = ids_BKn.shape
    ids, scores = ids_BKn.reshape(num_users, -1), scores_BKn.reshape(num_users, -1)
    by_id = np.lexsort((-scores, ids), axis=-1)  # stable: of equal scores the first interest comes first
    ids, scores = np.take_along_axis(ids, by_id, -1), np.take_along_axis(scores, by_id, -1)
    drop = ids == 0
    drop[:, 1:] |= ids[:, 1:] == ids[:, :-1]
    if seen is not None:
        drop |= _contains(seen, ids)
    scores = np.where(drop, -np.inf, scores)
    order = np.lexsort((ids, -scores, drop), axis=-1)[:, :length]
    gone = np.take_along_axis(drop, order, -1)
    merged = MergedLists(
        ids_BN=np.where(gone, 0, np.take_along_axis(ids, order, -1)),
        scores_BN=np.take_along_axis(scores, order, -1),
        interests_BN=np.where(gone, -1, np.take_along_axis(by_id, order, -1) // max(depth, 1)),
    )
    return _fill(merged, length)


def _contains(seen: tuple[Ints, Ints], ids: Ints) -> np.ndarray:
    rows, items = seen
    stride = int(max(ids.max(initial=0), items.max(initial=0))) + 1
    return np.isin(np.arange(len(ids))[:, None] * stride + ids, rows * stride + items)


def _fill(lists: MergedLists, length: int) -> MergedLists:
    missing = length - lists.ids_BN.shape[1]
    if missing <= 0:
        return lists
    pad = ((0, 0), (0, missing))
    return MergedLists(
        np.pad(lists.ids_BN, pad),
        np.pad(lists.scores_BN, pad, constant_values=-np.inf),
        np.pad(lists.interests_BN, pad, constant_values=-1),
    )


def recommend(
    model: Recommender,
    histories: Ints,
    mask: np.ndarray,
    *,
    length: int,
    depth: int,
    seen: tuple[Ints, Ints] | None = None,
    device: torch.device | str = "cpu",
) -> MergedLists:
    """Rank the catalogue for one batch of users. Collective when the model's table is sharded.

    Args:
        model: in evaluation mode.
        histories: int64 `[B, L]`, left-padded.
        mask: bool `[B, L]`.
        length: N.
        depth: items asked of the table for each interest, the same on all workers.
        seen: (row number, item index) pairs to leave out; exact when `depth` is at least N plus a user's seen items.
        device: where model and table lie.

    Raises:
        StageError: the model's scores are not finite.
    """
    history = HistoryBatch(torch.from_numpy(histories).to(device), torch.from_numpy(mask).to(device))
    interests_BKD = model.encode(history).interests_BKD
    num_users, num_interests, width = interests_BKD.shape
    scores, ids = model.items.topk(interests_BKD.reshape(-1, width).float(), depth)
    if not bool(torch.isfinite(scores).all()):
        raise StageError(
            "the model gave a score that is not a number: training diverged; lower the learning rate"
        )
    shape = (num_users, num_interests, depth)
    return merge_interests(
        scores.cpu().numpy().reshape(shape), ids.cpu().numpy().reshape(shape), length, seen
    )


def rank_share(
    model: Recommender,
    cases: Cases,
    group: WorkerGroup,
    *,
    length: int,
    users_per_batch: int,
    exclude_seen: bool = False,
    max_history: int | None = None,
    bar: Bar | None = None,
) -> Ints:
    """Lists of this worker's share of the users.

    Every worker makes the same number of collective calls: one that has run out of users encodes a stand-in instead.

    Returns:
        int64 `[users of the share, N]`, 0-filled.
    """
    first, last = share_bounds(cases.num_users, group.rank, group.size)
    depth = _depth(cases, model.items.num_rows - 1, length, exclude_seen)
    max_history = max_history or model.max_history
    lists = [np.zeros((0, length), dtype=np.int64)]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for users in _batches(first, last, cases.num_users, group.size, users_per_batch):
                stand_in = len(users) == 0
                users = np.zeros(1, dtype=np.int64) if stand_in else users
                histories, mask = cases.histories(users, max_history)
                seen = cases.seen(users) if exclude_seen else None
                merged = recommend(
                    model, histories, mask, length=length, depth=depth, seen=seen, device=group.device
                )
                if not stand_in:
                    lists.append(merged.ids_BN)
                    if bar is not None:
                        bar.advance(len(users))
    finally:
        model.train(was_training)
    return np.concatenate(lists)


def _batches(first: int, last: int, num_users: int, size: int, users_per_batch: int) -> Iterator[Ints]:
    largest_share = -(-num_users // size)
    for start in range(0, largest_share, users_per_batch):
        yield np.arange(min(first + start, last), min(first + start + users_per_batch, last))


def _depth(cases: Cases, num_items: int, length: int, exclude_seen: bool) -> int:
    """Items to ask for: N, and as many more as the longest history can take away. The same on all workers."""
    extra = int(cases.num_history.max(initial=0)) if exclude_seen else 0
    return min(length + extra, num_items)
