"""Compiled arithmetic of the losses against numpy in float64 and against the form for other devices."""

import numpy as np
import pytest
import torch
from numba import njit

from distributed_mi.core import cpu
from distributed_mi.core.precision import product
from distributed_mi.core.vector_math import exp32, largest32
from distributed_mi.losses import sampled_softmax as module
from distributed_mi.losses.sampled_softmax import sampled_softmax


@njit(fastmath={"contract"}, error_model="numpy")
def exponentials(values_N):
    out_N = np.empty_like(values_N)
    for n in range(len(values_N)):
        out_N[n] = exp32(values_N[n])
    return out_N


def test_exp_is_within_one_part_in_ten_million() -> None:
    values = np.linspace(-87, 88, 1_000_003).astype(np.float32)
    exact = np.exp(values.astype(np.float64))
    assert np.abs(exponentials(values) / exact - 1).max() < 1.2e-7


def test_exp_of_the_extremes() -> None:
    values = np.array([0, -np.inf, np.inf, -1e30, 1e30, -88, 89], np.float32)
    assert exponentials(values).tolist() == [1, 0, np.inf, 0, np.inf, 0, np.inf]
    assert np.isnan(exponentials(np.array([np.nan], np.float32)))[0]


def test_the_largest_of_numbers_of_both_signs_and_of_none() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 7, 16, 33, 1_000):
        for shift in (-5, 0, 5):
            values = (generator.standard_normal(size) + shift).astype(np.float32)
            assert largest32(values) == values.max()
    assert largest32(np.array([-np.inf, -3e38, -1e-40], np.float32)) == np.float32(-1e-40)
    assert largest32(np.empty(0, np.float32)) == -np.inf
    assert np.isnan(largest32(np.array([1, np.nan, np.inf], np.float32)))


def problem(users: int = 37, negatives: int = 151) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "query_BD": torch.randn(users, 8, generator=generator, requires_grad=True),
        "target_rows_BD": torch.randn(users, 8, generator=generator, requires_grad=True),
        "negative_rows_ND": torch.randn(negatives, 8, generator=generator, requires_grad=True),
        "target_ids_B": torch.randint(1, 30, (users,), generator=generator),
        "negative_ids_N": torch.randint(1, 30, (negatives,), generator=generator),
        "target_log_q_B": torch.randn(users, generator=generator),
    }


def losses_and_gradients(values: dict[str, torch.Tensor], **options: object) -> list[torch.Tensor]:
    losses = sampled_softmax(**values, **options)  # type: ignore[arg-type]
    weights = torch.linspace(-1, 2, len(losses))
    leaves = [values[n] for n in ("query_BD", "target_rows_BD", "negative_rows_ND")]
    return [losses, *torch.autograd.grad((losses * weights).sum(), leaves)]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("hits", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_compiled_and_torch_forms_agree(
    beta: float, hits: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = problem() | {"negative_log_q_N": torch.linspace(-3, -1, 151)}
    options = {"beta": beta, "mask_accidental_hits": hits}
    if masked:
        options["negative_mask_N"] = torch.arange(151) % 3 != 1
    compiled = losses_and_gradients(values, **options)
    monkeypatch.setattr(module, "_on_cpu", lambda *tensors: False)
    torch.testing.assert_close(compiled, losses_and_gradients(values, **options), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_products_are_rounded_under_autocast_and_nothing_else_is(beta: float) -> None:
    """Eight bits of mantissa: losses and gradients are other ones, within two percent, and stay float32."""
    values = problem()
    exact = losses_and_gradients(values, beta=beta)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses_and_gradients(values, beta=beta)
    for one, other in zip(rounded, exact, strict=True):
        assert one.dtype == torch.float32
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.02 * other.norm()


def test_every_product_is_taken_in_the_precision_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores forward, queries and negatives backward."""
    asked: list[tuple[torch.dtype | None, tuple[int, ...]]] = []

    def watched(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        found = product(one, other, dtype)
        asked.append((dtype, tuple(found.shape)))
        return found

    monkeypatch.setattr(module, "product", watched)
    with torch.autocast("cpu", torch.bfloat16):
        losses_and_gradients(problem(), beta=1.0)
    assert asked == [(torch.bfloat16, shape) for shape in ((37, 151), (37, 8), (151, 8))]


def test_a_worker_without_users_gives_the_negatives_no_gradient() -> None:
    values = problem(users=0)
    losses = sampled_softmax(**values, beta=1.0)
    assert losses.shape == (0,)
    assert not torch.autograd.grad(losses.sum(), values["negative_rows_ND"])[0].any()


def test_a_gradient_may_be_taken_twice() -> None:
    values = problem()
    losses = sampled_softmax(**values, beta=1.0)
    query = values["query_BD"]
    first = torch.autograd.grad(losses.sum(), query, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(losses.sum(), query)[0])


def test_a_score_that_is_no_number_makes_a_loss_that_is_none() -> None:
    values = problem()
    query = values["query_BD"].detach().clone()
    query[2, 0] = torch.nan
    values["query_BD"] = query
    losses = sampled_softmax(**values, beta=1.0)
    assert losses.isnan().nonzero().flatten().tolist() == [2]


def test_a_batch_shared_by_threads_has_the_losses_and_gradients_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums over users are added up thread by thread, so the last bits differ."""
    values = problem(users=64, negatives=500)
    one = losses_and_gradients(values, beta=1.0)
    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1_000)
    monkeypatch.setattr(cpu, "_num_cores", lambda: 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with cpu.threads_for_kernels():
            shared = losses_and_gradients(values, beta=1.0)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(shared, one, rtol=1e-5, atol=1e-6)
