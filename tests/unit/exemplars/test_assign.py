"""Users who arrive later go to the nearest exemplar."""

import numpy as np
import pytest
import torch

from distributed_mi.exemplars import assign as module
from distributed_mi.exemplars.affinity import affinity_propagation
from distributed_mi.exemplars.assign import assign
from distributed_mi.exemplars.similarity import row_blocks


def test_nearest_exemplar_by_hand() -> None:
    labels, similarity = assign(
        torch.tensor([[0.0, 0.0], [9.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.0, 1.0], [10.0, 0.0]])
    )
    assert labels.tolist() == [0, 1, 1]
    torch.testing.assert_close(similarity, torch.tensor([-1.0, -1.0, -25.0]))


def test_ties_go_to_the_first_and_blocks_change_nothing(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    exemplars = torch.from_numpy(rng.integers(0, 2, size=(6, 2))).float()
    users = torch.from_numpy(rng.integers(0, 3, size=(50, 2))).float()
    distances = (users[:, None] - exemplars[None]).square().sum(dim=2).numpy()
    whole, similarity = assign(users, exemplars)
    assert whole.tolist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(similarity.numpy(), -distances.min(axis=1), atol=1e-6)
    monkeypatch.setattr(module, "row_blocks", lambda rows, width: row_blocks(rows, width, 3 * width))
    assert assign(users, exemplars)[0].tolist() == whole.tolist()


def test_agrees_with_the_clustering_on_its_own_users(rng: np.random.Generator) -> None:
    vectors = torch.from_numpy(rng.normal(size=(60, 4))).float()
    result = affinity_propagation(vectors, -8.0)
    assert assign(vectors, vectors[result.exemplars_E])[0].tolist() == result.labels_U.tolist()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one exemplar"):
        assign(torch.zeros(2, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="width 3, exemplars of width 2"):
        assign(torch.zeros(2, 3), torch.zeros(1, 2))
