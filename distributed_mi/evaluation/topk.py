"""Lists of this worker's share of the users, best items of the whole catalogue first.

The lists do not depend, in any bit, on `users_per_batch`, the number of workers or the placement of the rows. The item
table promises that for given interests (`embeddings.topk`). For the interests to be given, too, users are encoded in
chunks of `CHUNK_USERS` that are the same for everybody: the first chunk holds users 0 to 63, and so on; workers and
batches take whole chunks, and the last one is filled up with stand-ins. A matrix product may add up a row of its
result in another order when it has more rows or the row stands elsewhere; so a user always stands at the same place
of a product of the same shape.

On a CPU each chunk is encoded on one thread, and chunks run beside each other, because a product may also change with
the number of threads (MKL at width 128 with 3 threads does). What no order can fix are workers with processors of
different kinds.

Shapes:  B users, L history, N list length.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.cpu import map_single_threaded
from distributed_mi.core.errors import StageError
from distributed_mi.core.progress import Bar
from distributed_mi.data.batches import share_bounds
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.topk import TopK
from distributed_mi.evaluation.metrics.base import Ints
from distributed_mi.evaluation.protocol import Cases
from distributed_mi.models.base import HistoryBatch, Recommender

CHUNK_USERS = 64
"""Users that are encoded at once, everywhere."""


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
    """Lists of this worker's share of the users: whole chunks, in user order.

    Every worker makes the same number of collective calls: one that has run out of users encodes stand-ins instead.

    Args:
        model: its mode is left as it was. Collective when its table is sharded.
        cases: the users of all workers.
        group: the workers.
        length: N.
        users_per_batch: users ranked at once, rounded up to whole chunks.
        exclude_seen: leave out everything in a user's history.
        max_history: newest events that the model reads; None: the model's own.
        bar: advances by users.

    Returns:
        int64 `[users of the share, N]`, 0-filled.

    Raises:
        StageError: the model's scores are not finite.
    """
    max_history = max_history or model.max_history
    lists = [np.zeros((0, length), dtype=np.int64)]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for chunks in _batches(cases.num_users, group, users_per_batch):
                users = _users(chunks[chunks >= 0], cases.num_users)
                interests_BKD = _encode(model, cases, chunks, max_history, group.device)[: len(users)]
                seen_M2 = _seen(cases, users, group.device) if exclude_seen else None
                top = model.items.topk(interests_BKD, min(length, model.items.num_rows - 1), seen_M2=seen_M2)
                lists.append(_checked(top, length))
                if bar is not None:
                    bar.advance(len(users))
    finally:
        model.train(was_training)
    return np.concatenate(lists)


def share(num_users: int, group: WorkerGroup) -> tuple[int, int]:
    """First and one past the last user that a worker ranks: whole chunks, shares differ by at most one chunk."""
    first, last = share_bounds(_num_chunks(num_users), group.rank, group.size)
    return min(first * CHUNK_USERS, num_users), min(last * CHUNK_USERS, num_users)


def _num_chunks(num_users: int) -> int:
    return -(-num_users // CHUNK_USERS)


def _batches(num_users: int, group: WorkerGroup, users_per_batch: int) -> Iterator[Ints]:
    """Chunks of this worker, some at a time; as many on every worker, -1 where there is none left."""
    first, last = share_bounds(_num_chunks(num_users), group.rank, group.size)
    largest = -(-_num_chunks(num_users) // group.size)
    mine = np.full(largest, -1, dtype=np.int64)
    mine[: last - first] = np.arange(first, last)
    step = _num_chunks(users_per_batch)
    yield from (mine[start : start + step] for start in range(0, largest, step))


def _users(chunks: Ints, num_users: int) -> Ints:
    """Users of chunks, in order."""
    users = (chunks[:, None] * CHUNK_USERS + np.arange(CHUNK_USERS)).reshape(-1)
    return users[users < num_users]


def _encode(model: Recommender, cases: Cases, chunks: Ints, max_history: int, device: torch.device) -> Tensor:
    """Interests `[len(chunks) * CHUNK_USERS, K, D]`, float32; user 0 stands in where there is no user.

    One lookup for all chunks (a row is the same in any company), one pass of the model for each.
    """
    real = _users(chunks[chunks >= 0], cases.num_users)
    users = np.zeros(len(chunks) * CHUNK_USERS, dtype=np.int64)
    users[: len(real)] = real
    histories, mask = cases.histories(users, max_history)
    history = HistoryBatch(torch.from_numpy(histories).to(device), torch.from_numpy(mask).to(device))
    rows_BLD = model.items.rows(history.item_ids_BL)
    parts = zip(
        history.item_ids_BL.split(CHUNK_USERS),
        history.mask_BL.split(CHUNK_USERS),
        rows_BLD.split(CHUNK_USERS),
        strict=True,
    )

    @torch.no_grad()
    def encode(part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, rows = part
        return model.encode_rows(HistoryBatch(ids, mask), rows).interests_BKD.float()

    return torch.cat(
        map_single_threaded(encode, parts) if device.type == "cpu" else [encode(p) for p in parts]
    )


def _seen(cases: Cases, users: Ints, device: torch.device) -> Tensor:
    """What the users have in their histories, as (place in `users`, item) pairs."""
    if len(users) == 0:
        return torch.empty((0, 2), dtype=torch.int64, device=device)
    return torch.from_numpy(np.stack(cases.seen(users), axis=1)).to(device)


def _checked(top: TopK, length: int) -> Ints:
    """Ids `[B, N]` of lists whose scores are numbers.

    Raises:
        StageError: they are not.
    """
    if bool((~torch.isfinite(top.scores_Bk) & (top.ids_Bk > 0)).any()):
        raise StageError(
            "the model gave a score that is not a number: training diverged; lower the learning rate"
        )
    ids_Bk = top.ids_Bk.cpu().numpy()
    return np.pad(ids_Bk, ((0, 0), (0, length - ids_Bk.shape[1])))
