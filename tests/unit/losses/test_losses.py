"""Invariants of the losses and their edges; tests/parity/test_losses.py has the second implementations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed_mi.losses.full_softmax import full_softmax
from distributed_mi.losses.hard_negatives import hard_negative_softmax, log_weights
from distributed_mi.losses.read_out import hard_read_out, soft_read_out
from distributed_mi.losses.sampled_softmax import MASKED, sampled_softmax


def problem(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "query_BD": torch.randn(5, 4, generator=generator),
        "target_rows_BD": torch.randn(5, 4, generator=generator),
        "negative_rows_ND": torch.randn(9, 4, generator=generator),
        "target_ids_B": torch.tensor([1, 2, 3, 4, 5]),
        "negative_ids_N": torch.tensor([1, 1, 7, 8, 9, 2, 10, 11, 12]),
    }


@pytest.mark.parametrize("mask", [True, False])
def test_beta_zero_is_sampled_softmax(mask: bool) -> None:
    values = problem()
    hard = hard_negative_softmax(**values, beta=0.0, mask_accidental_hits=mask)
    assert torch.equal(hard, sampled_softmax(**values, mask_accidental_hits=mask))
    # And continuously so: no jump between "off" and a very small beta.
    near = hard_negative_softmax(**values, beta=1e-6, mask_accidental_hits=mask)
    torch.testing.assert_close(near, hard, rtol=1e-4, atol=1e-5)


@given(beta=st.floats(0.01, 50), shift=st.floats(-20, 20), seed=st.integers(0, 50))
def test_weights_have_mean_one_and_ignore_a_common_shift(beta: float, shift: float, seed: int) -> None:
    scores = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[0, :3] = MASKED
    weights = log_weights(scores, beta).exp()
    assert weights[0, :3].tolist() == [0.0] * 3
    assert weights[0, 3:].mean().item() == pytest.approx(1.0)
    assert weights[1:].mean(dim=1).tolist() == pytest.approx([1.0, 1.0])
    torch.testing.assert_close(log_weights(scores[1:] + shift, beta).exp(), weights[1:])


def test_a_large_beta_puts_all_weight_on_the_hardest_negative() -> None:
    weights = log_weights(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), beta=1e4).exp()
    assert weights.tolist() == [[0.0, 4.0, 0.0, 0.0]]


@pytest.mark.parametrize("beta", [0.0, 1.0, 10.0])
def test_huge_scores_stay_finite_with_finite_gradients(beta: float) -> None:
    values = problem()
    query = (values.pop("query_BD") * 1e4).requires_grad_()
    loss = hard_negative_softmax(query, **values, beta=beta)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()


def catalogue_problem() -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear]:
    """Users, a catalogue of 23 rows whose rows 0 and 9 are empty, and a projection."""
    torch.manual_seed(0)
    catalogue = torch.randn(23, 6)
    catalogue[[0, 9]] = 0.0
    return torch.randn(5, 4, requires_grad=True), catalogue, torch.nn.Linear(6, 4)


@pytest.mark.parametrize("tile_rows", [1, 7, 23, 100])
def test_full_softmax_in_tiles_is_the_dense_one_with_its_gradients(tile_rows: int) -> None:
    query, catalogue, project = catalogue_problem()
    targets = torch.tensor([1, 2, 2, 22, 5])
    losses = full_softmax(query, project(catalogue[targets]), catalogue, project=project, tile_rows=tile_rows)
    filled = catalogue.any(dim=1)
    logits = (query @ project(catalogue).T)[:, filled]
    place = filled.cumsum(0)[targets] - 1
    dense = torch.nn.functional.cross_entropy(logits, place, reduction="none")
    torch.testing.assert_close(losses, dense)
    inputs = (query, project.weight, project.bias)
    weights = torch.arange(1.0, 6.0)
    found = torch.autograd.grad((losses * weights).sum(), inputs)
    torch.testing.assert_close(
        found, torch.autograd.grad((dense * weights).sum(), inputs), atol=1e-5, rtol=1e-5
    )


def test_full_softmax_keeps_no_scores_for_the_backward_pass() -> None:
    """50 users and tiles of 6 items: a tile's scores are 300 numbers, inputs and sums per tile 200 at most."""
    _, catalogue, project = catalogue_problem()
    query, rows = torch.randn(50, 4, requires_grad=True), torch.randn(50, 4)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        full_softmax(query, rows, catalogue, project=project, tile_rows=6)
    assert max(kept) == 200


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_user_whose_negatives_are_all_accidental_costs_nothing_and_has_no_nan(beta: float) -> None:
    values = problem()
    values["negative_ids_N"] = torch.full((9,), 3)
    query = values.pop("query_BD").requires_grad_()
    loss = hard_negative_softmax(query, **values, beta=beta)
    loss.sum().backward()
    assert loss[2].item() == 0.0
    assert query.grad is not None
    assert query.grad[2].tolist() == [0.0] * 4
    assert torch.isfinite(query.grad).all()


def test_values_do_not_depend_on_the_other_users() -> None:
    values = problem()
    whole = hard_negative_softmax(**values, beta=1.0)
    shared = {k: v if "negative" in k else v[1:3] for k, v in values.items()}
    torch.testing.assert_close(hard_negative_softmax(**shared, beta=1.0), whole[1:3])


def test_hard_read_out_takes_the_closest_interest_and_gives_gradient_to_it_only() -> None:
    interests = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 2.0]]], requires_grad=True)
    target = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    read = hard_read_out(interests, target)
    assert read.tolist() == [[0.0, 2.0], [3.0, 0.0]]
    read.sum().backward()
    assert interests.grad is not None
    assert interests.grad.sum(dim=2).tolist() == [[0.0, 2.0], [2.0, 0.0]]


def test_soft_read_out_is_a_masked_softmax_and_the_identity_for_one_interest() -> None:
    query = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    values = torch.tensor([[[1.0, 0, 0, 0], [0.0, 1, 0, 0], [9.0, 9, 9, 9]]])
    mask = torch.tensor([[True, True, False]])
    # Scores (2, 0) / sqrt(4) = (1, 0).
    first = torch.tensor(1.0).exp() / (torch.tensor(1.0).exp() + 1)
    read = soft_read_out(query, values, mask)
    torch.testing.assert_close(read, torch.stack([first, 1 - first, first * 0, first * 0])[None])
    assert torch.equal(soft_read_out(query, values[:, :1]), values[:, 0])
    # Not scaled: scores (2, 0).
    first = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 1)
    read = soft_read_out(query, values, mask, scale=False)
    torch.testing.assert_close(read, torch.stack([first, 1 - first, first * 0, first * 0])[None])
