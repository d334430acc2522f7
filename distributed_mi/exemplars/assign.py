"""Users -> their nearest exemplar, also for users who arrive after the clustering.

Shapes:  U users, E exemplars, D text width.
"""

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
