"""Users -> their nearest exemplars, also for users who arrive after the clustering.

Shapes:  U users, E exemplars, D text width, K exemplars asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_mi.exemplars.similarity import Similarity, row_blocks


def assign(vectors_UD: Tensor, exemplar_vectors_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest exemplar of each user, in blocks: memory does not grow with U x E.

    Args:
        vectors_UD: float32, on the scale of the exemplars' vectors.
        exemplar_vectors_ED: float32, at least one.

    Returns:
        labels_U int64, positions in E (the first among equals), and similarity_U float32: minus the squared distance.

    Raises:
        ValueError: no exemplars, or widths that differ.
    """
    if len(exemplar_vectors_ED) == 0:
        raise ValueError("assign needs at least one exemplar")
    if vectors_UD.shape[1] != exemplar_vectors_ED.shape[1]:
        raise ValueError(
            f"users have vectors of width {vectors_UD.shape[1]}, exemplars of width {exemplar_vectors_ED.shape[1]}"
        )
    similarity = Similarity(exemplar_vectors_ED)
    labels = torch.empty(len(vectors_UD), dtype=torch.int64, device=vectors_UD.device)
    nearest = torch.empty(len(vectors_UD), dtype=torch.float32, device=vectors_UD.device)
    width = max(exemplar_vectors_ED.shape)
    for low, high in row_blocks(len(vectors_UD), 8 * width):
        block = similarity.rows(vectors_UD[low:high])
        labels[low:high] = block.argmax(dim=1)
        nearest[low:high] = block.gather(1, labels[low:high, None]).flatten()
    return labels, nearest


def assign_top(
    vectors_UD: Tensor, exemplar_vectors_ED: Tensor, count: int, *, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The nearest `count` exemplars of each user, out of one shard of the exemplars.

    Args:
        vectors_UD: float32, on the scale of the exemplars' vectors.
        exemplar_vectors_ED: float32 vectors of the shard.
        count: K; a smaller shard gives all it has.
        first: position of the shard's first exemplar among all.

    Returns:
        labels `[U, K]` int64, positions among all exemplars, nearest first (the lower position among equals), and
        similarities `[U, K]` float32.

    Raises:
        ValueError: no exemplars, widths that differ, or `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if len(exemplar_vectors_ED) == 0 or vectors_UD.shape[1] != exemplar_vectors_ED.shape[1]:
        assign(vectors_UD[:0], exemplar_vectors_ED)  # raises
    count = min(count, len(exemplar_vectors_ED))
    # shards must round alike, so no shard is centred on its own mean
    similarity = Similarity(exemplar_vectors_ED, torch.zeros(vectors_UD.shape[1], dtype=torch.float64))
    labels, values = [], []
    for low, high in row_blocks(len(vectors_UD), 8 * max(exemplar_vectors_ED.shape)):
        block = similarity.rows(vectors_UD[low:high])
        order = block.sort(dim=1, descending=True, stable=True)
        labels.append(order.indices[:, :count] + first)
        values.append(order.values[:, :count])
    return torch.cat(labels), torch.cat(values)


def merge_top(parts: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """The nearest `count` exemplars out of what `assign_top` found in each shard.

    Args:
        parts: labels and similarities of the same users, shards in order of their exemplars' positions.
        count: K.
    """
    labels = torch.cat([p[0] for p in parts], dim=1)
    values = torch.cat([p[1] for p in parts], dim=1)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return labels.gather(1, order), values.gather(1, order)
