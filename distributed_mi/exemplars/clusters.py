"""Exemplars -> labels, and the most central member of each cluster.

Shapes:  U users, E exemplars, B rows of a block.
"""

import numpy as np
import torch
from torch import Tensor

from distributed_mi.exemplars import kernels
from distributed_mi.exemplars.lists import NeighbourLists
from distributed_mi.exemplars.similarity import Similarities, row_blocks


def label(
    similarities: Similarities, exemplars_E: Tensor, lists: NeighbourLists | None = None
) -> tuple[Tensor, Tensor]:
    """Most similar exemplar of every user (the first among equals; an exemplar has itself) and that similarity.

    Args:
        similarities: of all users.
        exemplars_E: ascending.
        lists: neighbour lists of all users; where one holds an exemplar that nobody outside can beat, the similarities
            to all exemplars need not be computed.

    Returns:
        labels_U int64, positions in E; similarity_U float32, 0 for an exemplar.
    """
    users, device = similarities.users, similarities.device
    labels = torch.full((users,), -1, dtype=torch.int64, device=device)
    nearest = torch.zeros(users, dtype=torch.float32, device=device)
    if lists is not None:
        position = np.full(users, -1, dtype=np.int64)
        position[exemplars_E.numpy()] = np.arange(len(exemplars_E))
        kernels.nearest_listed(
            0,
            users,
            lists.starts_R,
            lists.columns_M,
            lists.similarities_M,
            position,
            lists.bound_R,
            labels.numpy(),
            nearest.numpy(),
        )
    labels[exemplars_E] = torch.arange(len(exemplars_E), device=device)
    nearest[exemplars_E] = 0.0
    left = (labels < 0).nonzero().flatten()
    for low, high in row_blocks(len(left), 8 * len(exemplars_E)):
        ids = left[low:high]
        block = similarities.to(ids, exemplars_E)
        labels[ids] = block.argmax(dim=1)
        nearest[ids] = block.gather(1, labels[ids, None]).flatten()
    return labels, nearest


def most_central(similarities: Similarities, labels_U: Tensor, count: int, preferences_U: Tensor) -> Tensor:
    """The most central member of each of `count` clusters, ascending; for squared distances, nearest to the mean.

    That is scikit-learn's last step, and EIMF's rule for a cluster without its centre. Ties go to the lowest index.
    """
    order = torch.argsort(labels_U, stable=True)
    clusters = order.split(torch.bincount(labels_U, minlength=count).tolist())
    central = [members[similarities.central(members, preferences_U[members])] for members in clusters]
    return torch.stack(central).sort().values


def net_similarity(nearest_U: Tensor, exemplars_E: Tensor, preferences_U: Tensor) -> float:
    """Similarities of users to their exemplars plus the exemplars' preferences."""
    own = nearest_U.to(torch.float64)
    own[exemplars_E] = preferences_U[exemplars_E]
    return float(own.sum())


def refine(
    similarities: Similarities,
    exemplars_E: Tensor,
    preferences_U: Tensor,
    lists: NeighbourLists | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Make the most central member of each cluster its exemplar, then label again (scikit-learn's last step).

    Args:
        similarities: of all users.
        exemplars_E: at least one position in U, ascending.
        preferences_U: float64.
        lists: see `label`.

    Returns:
        exemplars_E ascending, labels_U, net similarity.
    """
    labels, _ = label(similarities, exemplars_E, lists)
    exemplars_E = most_central(similarities, labels, len(exemplars_E), preferences_U)
    labels, nearest = label(similarities, exemplars_E, lists)
    return exemplars_E, labels, net_similarity(nearest, exemplars_E, preferences_U)


def is_fixed_point(
    similarities: Similarities, exemplars_E: Tensor, labels_U: Tensor, preferences_U: Tensor
) -> bool:
    """Whether every exemplar is the most central member of the cluster that the labels give it."""
    return torch.equal(most_central(similarities, labels_U, len(exemplars_E), preferences_U), exemplars_E)
