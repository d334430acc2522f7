"""Softmax over the targets of a step."""

import math

import pytest
import torch
import torch.nn.functional as F

from distributed_mi.losses.in_batch import in_batch_softmax

TARGETS = torch.tensor([3, 9, 3, 4])


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    query, rows = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    return query, rows[[0, 1, 0, 3]]


def test_by_hand() -> None:
    """Scores 1 with the own target, 0 with another; the third user has the same target and is no negative."""
    query = torch.tensor([[1.0, 0.0]])
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    ids = torch.tensor([7, 8, 7])
    loss = in_batch_softmax(query, rows, offset=0, target_ids_B=ids[:1], candidate_ids_G=ids)
    assert loss.item() == pytest.approx(math.log((math.e + 1) / math.e))
    kept = in_batch_softmax(
        query, rows, offset=0, target_ids_B=ids[:1], candidate_ids_G=ids, mask_accidental_hits=False
    )
    assert kept.item() == pytest.approx(math.log((2 * math.e + 1) / math.e))


def test_without_mask_it_is_torch_cross_entropy_on_the_diagonal() -> None:
    query, rows = problem()
    ours = in_batch_softmax(
        query, rows, offset=0, target_ids_B=TARGETS, candidate_ids_G=TARGETS, mask_accidental_hits=False
    )
    torch.testing.assert_close(ours, F.cross_entropy(query @ rows.T, torch.arange(4), reduction="none"))


def test_log_q_is_taken_from_targets_and_negatives() -> None:
    query, rows = problem()
    log_q = torch.tensor([-1.0, -2.0, -1.0, -5.0])
    ours = in_batch_softmax(
        query, rows, offset=0, target_ids_B=TARGETS, candidate_ids_G=TARGETS, candidate_log_q_G=log_q
    )
    scores = query @ rows.T - log_q
    scores[0, 2] = scores[2, 0] = -math.inf
    torch.testing.assert_close(ours, F.cross_entropy(scores, torch.arange(4), reduction="none"))


def test_a_share_is_its_part_of_the_whole_and_may_be_empty() -> None:
    query, rows = problem()
    whole = in_batch_softmax(query, rows, offset=0, target_ids_B=TARGETS, candidate_ids_G=TARGETS)
    for start, stop in ((0, 1), (1, 4), (4, 4)):
        part = in_batch_softmax(
            query[start:stop],
            rows,
            offset=start,
            target_ids_B=TARGETS[start:stop],
            candidate_ids_G=TARGETS,
        )
        torch.testing.assert_close(part, whole[start:stop])


def test_a_step_of_one_target_costs_nothing() -> None:
    query, rows = problem()
    same = torch.full((4,), 5)
    loss = in_batch_softmax(query.requires_grad_(), rows, offset=0, target_ids_B=same, candidate_ids_G=same)
    loss.sum().backward()
    assert loss.tolist() == [0.0] * 4
    assert query.grad is not None
    assert query.grad.abs().max() == 0
