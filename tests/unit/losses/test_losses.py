"""Invariants of the losses and their edges; tests/parity/test_losses.py has the second implementations."""

import numpy as np
import pytest
import torch

from distributed_mi.losses.full_softmax import full_softmax
from distributed_mi.losses.read_out import hard_read_out, soft_read_out
from distributed_mi.losses.sampled_softmax import accidental_hits, sampled_softmax


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
    hard = sampled_softmax(**values, beta=0.0, mask_accidental_hits=mask)
    assert torch.equal(hard, sampled_softmax(**values, mask_accidental_hits=mask))
    # And continuously so: no jump between "off" and a very small beta.
    near = sampled_softmax(**values, beta=1e-6, mask_accidental_hits=mask)
    torch.testing.assert_close(near, hard, rtol=1e-4, atol=1e-5)


def by_autograd(
    values: dict[str, torch.Tensor], beta: float, mask_N: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition, on explicit weights."""
    scores = values["query_BD"] @ values["negative_rows_ND"].T - values["negative_log_q_N"]
    out = values["target_ids_B"][:, None] == values["negative_ids_N"]
    out = out if mask_N is None else out | ~mask_N
    scores = scores.masked_fill(out, -torch.inf)
    sharp = torch.softmax(beta * scores, dim=1).masked_fill(out, 0.0)
    weights = sharp * (~out).sum(dim=1, keepdim=True) if beta else (~out).to(scores.dtype)
    target = (values["query_BD"] * values["target_rows_BD"]).sum(dim=1) - values["target_log_q_B"]
    return -torch.log(target.exp() / (target.exp() + (weights * scores.exp()).sum(dim=1)))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_the_definition(beta: float, masked: bool) -> None:
    values = problem()
    for name in ("query_BD", "target_rows_BD", "negative_rows_ND"):
        values[name] = values[name].double().requires_grad_()
    values["negative_log_q_N"] = torch.linspace(-3, -1, 9).double()
    values["target_log_q_B"] = torch.linspace(-2, -1, 5).double()
    mask_N = torch.arange(9) % 4 != 1 if masked else None
    leaves = [values[n] for n in ("query_BD", "target_rows_BD", "negative_rows_ND")]
    found = sampled_softmax(**values, beta=beta, negative_mask_N=mask_N)
    expected = by_autograd(values, beta, mask_N)
    torch.testing.assert_close(found, expected)
    weight = torch.arange(1.0, 6.0).double()
    ours = torch.autograd.grad((found * weight).sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weight).sum(), leaves))


def test_accidental_hits_are_all_pairs_of_equal_ids() -> None:
    targets, negatives = torch.tensor([3, 9, 3, 5]), torch.tensor([5, 3, 1, 3, 2, 5])
    rows, columns = accidental_hits(targets, negatives)
    expected = (targets[:, None] == negatives).nonzero()
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [tuple(p) for p in expected.tolist()]
    assert accidental_hits(torch.tensor([4]), negatives)[0].numel() == 0


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_a_user_whose_negatives_are_all_masked_has_no_loss_and_no_gradient(beta: float) -> None:
    query = torch.tensor([[1.0, 2.0], [0.5, 0.0]], requires_grad=True)
    loss = sampled_softmax(
        query,
        torch.ones(2, 2),
        torch.ones(3, 2),
        beta=beta,
        target_ids_B=torch.tensor([4, 5]),
        negative_ids_N=torch.tensor([4, 4, 4]),
    )
    loss.sum().backward()
    assert loss[0].item() == 0.0
    assert loss[1].item() > 0.1
    assert query.grad is not None
    assert query.grad[0].tolist() == [0.0, 0.0]
    assert torch.isfinite(query.grad).all()


def test_a_large_beta_compares_with_the_hardest_negative_alone() -> None:
    ids = {"target_ids_B": torch.tensor([9]), "negative_ids_N": torch.arange(1, 5)}
    query, negatives = torch.tensor([[1.0]]), torch.tensor([[0.0], [3.0], [1.0], [2.0]])
    loss = sampled_softmax(query, torch.tensor([[2.5]]), negatives, beta=1e4, **ids)
    # All weight, which is the number of negatives, lies on the score 3.
    assert loss.item() == pytest.approx(np.log1p(4 * np.exp(3.0 - 2.5)), rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 10.0])
def test_huge_scores_stay_finite_with_finite_gradients(beta: float) -> None:
    values = problem()
    query = (values.pop("query_BD") * 1e4).requires_grad_()
    loss = sampled_softmax(query, **values, beta=beta)
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
    loss = sampled_softmax(query, **values, beta=beta)
    loss.sum().backward()
    assert loss[2].item() == 0.0
    assert query.grad is not None
    assert query.grad[2].tolist() == [0.0] * 4
    assert torch.isfinite(query.grad).all()


def test_values_do_not_depend_on_the_other_users() -> None:
    values = problem()
    whole = sampled_softmax(**values, beta=1.0)
    shared = {k: v if "negative" in k else v[1:3] for k, v in values.items()}
    torch.testing.assert_close(sampled_softmax(**shared, beta=1.0), whole[1:3])


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
