"""Losses against second implementations: full cross-entropy, the public REMI formulas, hand calculations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_mi.losses.contrastive import cosine_distance, info_nce
from distributed_mi.losses.regularizers import routing_penalty
from distributed_mi.losses.sampled_softmax import sampled_softmax

B, V, D, N = 6, 30, 8, 12


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def test_all_items_as_negatives_give_the_full_cross_entropy(generator: torch.Generator) -> None:
    """model-facts 19.5, values and gradients."""
    rows = torch.randn(V, D, generator=generator, requires_grad=True)
    query = torch.randn(B, D, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 3, 3, 7, 29, 11])
    ours = sampled_softmax(query, rows[targets], rows, target_ids_B=targets, negative_ids_N=torch.arange(V))
    full = F.cross_entropy(query @ rows.T, targets, reduction="none")
    torch.testing.assert_close(ours, full)
    ours_grads = torch.autograd.grad(ours.sum(), (rows, query))
    full_grads = torch.autograd.grad(full.sum(), (rows, query))
    for a, b in zip(ours_grads, full_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_accidental_hit_costs_log_two_when_it_is_kept() -> None:
    # One negative which is the target: exp(s) / (exp(s) + exp(s)) = 1/2. Masked, nothing competes: 0.
    row, ids = torch.ones(1, D), torch.tensor([4])
    kept = sampled_softmax(row, row, row, target_ids_B=ids, negative_ids_N=ids, mask_accidental_hits=False)
    masked = sampled_softmax(row, row, row, target_ids_B=ids, negative_ids_N=ids)
    assert kept.item() == pytest.approx(math.log(2))
    assert masked.item() == 0.0


def test_log_q_makes_an_unbiased_softmax_estimate(generator: torch.Generator) -> None:
    """With N draws from q, exp(s - log q) / N averages to the full partition sum."""
    rows, query = torch.randn(V, D, generator=generator) * 0.3, torch.randn(1, D, generator=generator)
    q = torch.softmax(torch.randn(V, generator=generator), dim=0)
    drawn = torch.multinomial(q, 200_000, replacement=True, generator=generator)
    loss = sampled_softmax(
        query,
        rows[:1],
        rows[drawn],
        target_ids_B=torch.tensor([-1]),
        negative_ids_N=drawn,
        target_log_q_B=torch.zeros(1),
        negative_log_q_N=q.log()[drawn],
    )
    target = (query @ rows[0]).item()
    partition = (loss.exp().item() - 1) * math.exp(target) / len(drawn)
    assert partition == pytest.approx((query @ rows.T).exp().sum().item(), rel=0.02)


def public_ihn(query: Tensor, target: Tensor, negatives: Tensor, beta: float) -> Tensor:
    """Loss as written in `Tokkiu/REMI:src/BasicModel.py` (both shifts, no masking), from the formulas of its paper."""
    positive = (query * target).sum(1, keepdim=True)
    negative = query @ negatives.T
    shift = torch.cat([positive, negative], dim=1).max(dim=1, keepdim=True).values
    weight = torch.exp(beta * negative - (beta * negative).max(dim=1, keepdim=True).values)
    weight = weight / weight.mean(dim=1, keepdim=True)
    hardest = (weight * torch.exp(negative - shift)).sum(dim=1, keepdim=True)
    positive = torch.exp(positive - shift)
    return -torch.log(positive / (positive + hardest)).squeeze(1)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_hard_negatives_equal_the_public_formula_with_gradients(
    generator: torch.Generator, beta: float
) -> None:
    query, target = torch.randn(2, B, D, generator=generator, requires_grad=True)
    negatives = torch.randn(N, D, generator=generator, requires_grad=True)
    ours = sampled_softmax(
        query,
        target,
        negatives,
        beta=beta,
        target_ids_B=torch.arange(B),
        negative_ids_N=torch.arange(N),
        mask_accidental_hits=False,
    )
    public = public_ihn(query, target, negatives, beta)
    torch.testing.assert_close(ours, public, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (query, negatives)),
        torch.autograd.grad(public.sum(), (query, negatives)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hard_negatives_by_hand() -> None:
    """s+ = 1, s = (0, log 3), beta = 1: weights 1/2 and 3/2; loss = log((e + 1/2 + 9/2) / e)."""
    query, target = torch.tensor([[1.0]]), torch.tensor([[1.0]])
    negatives = torch.tensor([[0.0], [math.log(3)]])
    ids = torch.tensor([5, 6])
    loss = sampled_softmax(
        query, target, negatives, beta=1.0, target_ids_B=torch.tensor([9]), negative_ids_N=ids
    )
    assert loss.item() == pytest.approx(math.log((math.e + 5) / math.e), rel=1e-6)


def test_routing_penalty_of_one_hot_and_of_uniform_attention() -> None:
    """model-facts 19.7: K 4, L 20, d 64. One-hot: sum of squares 0.95, C = 0.95 / 64, four times C^2 = 8.8e-4."""
    one_hot = torch.zeros(1, 4, 20)
    one_hot[:, :, 3] = 1.0
    assert routing_penalty(one_hot, dim=64).item() == pytest.approx(4 * (0.95 / 64) ** 2, rel=1e-5)
    assert routing_penalty(one_hot, dim=64).item() == pytest.approx(8.8e-4, rel=0.01)
    assert routing_penalty(torch.full((1, 4, 20), 1 / 20), dim=64).item() == pytest.approx(0.0, abs=1e-12)


def test_routing_penalty_of_a_short_history_and_its_gradient(generator: torch.Generator) -> None:
    # Uniform on 5 of 20 positions: 1/5 - 1/20 = 0.15.
    short = torch.zeros(1, 1, 20)
    short[:, :, 15:] = 0.2
    assert routing_penalty(short, dim=2).item() == pytest.approx((0.15 / 2) ** 2, rel=1e-5)
    # As printed: Gram matrix of centred attention, its diagonal, squared; values and gradients through the softmax.
    scores = torch.randn(3, 4, 10, generator=generator, requires_grad=True)
    attention = scores.softmax(dim=2)
    centred = attention - attention.mean(dim=2, keepdim=True)
    gram = centred @ centred.transpose(1, 2) / 8
    printed = gram.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    ours = routing_penalty(attention, dim=8)
    torch.testing.assert_close(ours, printed)
    (a,) = torch.autograd.grad(ours.sum(), scores, retain_graph=True)
    (b,) = torch.autograd.grad(printed.sum(), scores)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_routing_penalty_ignores_how_far_a_batch_was_padded(generator: torch.Generator) -> None:
    attention = torch.randn(2, 3, 6, generator=generator).softmax(dim=2)
    expected = routing_penalty(F.pad(attention, (14, 0)), dim=8)
    torch.testing.assert_close(routing_penalty(attention, dim=8, num_positions=20), expected)
    torch.testing.assert_close(routing_penalty(F.pad(attention, (19, 0)), dim=8, num_positions=20), expected)


def test_info_nce_by_hand() -> None:
    # Anchors e1, e2 against e1, e2, e1: cosines (1, 0, 1) and (0, 1, 0), temperature 1/2.
    anchors = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    candidates = torch.tensor([[1.0, 0.0], [0.0, 5.0], [4.0, 0.0]])
    e2 = math.exp(2)
    plain = info_nce(anchors, candidates, offset=0, temperature=0.5)
    assert plain.tolist() == pytest.approx([math.log((2 * e2 + 1) / e2), math.log((e2 + 2) / e2)])
    # Candidate 2 stands for the same item as anchor 0, so it is no negative of it.
    masked = info_nce(
        anchors,
        candidates,
        offset=0,
        temperature=0.5,
        anchor_keys_B=torch.tensor([7, 8]),
        candidate_keys_G=torch.tensor([7, 8, 7]),
    )
    assert masked.tolist() == pytest.approx([math.log((e2 + 1) / e2), math.log((e2 + 2) / e2)])


def test_info_nce_of_a_share_equals_its_part_of_the_whole(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 7, 4, generator=generator)
    keys = torch.tensor([1, 2, 1, 3, 4, 5, 3])
    whole = info_nce(a, b, offset=0, temperature=0.2, anchor_keys_B=keys, candidate_keys_G=keys)
    share = info_nce(a[3:], b, offset=3, temperature=0.2, anchor_keys_B=keys[3:], candidate_keys_G=keys)
    torch.testing.assert_close(share, whole[3:])


def test_cosine_distance_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-2.0, 0.0], [1.0, 0.0]])
    assert cosine_distance(a, b).tolist() == pytest.approx([0.0, 1 - 0.5**0.5, 2.0, 1.0])
