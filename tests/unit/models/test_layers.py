"""Layers that have one form for a CPU and one for everything else: both say the same."""

import pytest
import torch

from distributed_mi.core import cpu
from distributed_mi.core.precision import product
from distributed_mi.models import layers
from distributed_mi.models.layers import AttentivePooling


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("num_interests", [1, 3, 4])
@pytest.mark.parametrize("max_history", [5, 3])  # 3: the two oldest share the last position
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_packed_attention_has_values_and_gradients_of_the_padded_one(
    bias: bool,
    positions: bool,
    num_interests: int,
    max_history: int,
    used: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    pooling = AttentivePooling(
        6, num_interests, attention_dim=11, max_history=max_history, bias=bias, positions=positions
    )
    lengths = torch.tensor([1, 5, 2, 4])
    mask = torch.arange(5) >= 5 - lengths[:, None]
    rows = torch.randn(4, 5, 6, requires_grad=True)
    leaves = [rows, *pooling.parameters()]
    weights = torch.randn(4, num_interests, 6), torch.randn(4, num_interests, 5)

    def run() -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        found = pooling(rows, mask)
        total = sum((x * w).sum() for x, w, u in zip(found, weights, used, strict=True) if u)
        return list(found), torch.autograd.grad(total, leaves)

    packed = run()
    monkeypatch.setattr(AttentivePooling, "_can_be_packed", lambda self, rows: False)
    padded = run()
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=2e-6)
    attention = packed[0][1]
    assert attention.masked_select(~mask[:, None, :].expand_as(attention)).abs().max() == 0


@pytest.mark.parametrize("bias", [False, True])
def test_packed_attention_rounds_the_factors_of_its_large_products_under_autocast(bias: bool) -> None:
    """Eight bits of mantissa: values and gradients are other ones, within a percent, and stay float32."""
    torch.manual_seed(0)
    pooling = AttentivePooling(16, 3, attention_dim=64, max_history=9, bias=bias, positions=True)
    mask = torch.arange(9) >= 9 - torch.randint(1, 10, (40, 1))
    rows = torch.randn(40, 9, 16, requires_grad=True)
    weight = torch.randn(40, 3, 16)

    def gradients(precision: torch.dtype | None) -> list[torch.Tensor]:
        with torch.autocast("cpu", precision, enabled=precision is not None):
            interests, attention = pooling(rows, mask)
        assert interests.dtype == attention.dtype == torch.float32
        torch.testing.assert_close(attention.sum(2), torch.ones(40, 3))
        found = torch.autograd.grad((interests * weight).sum(), [rows, *pooling.parameters()])
        return [interests, *found]

    exact, rounded = gradients(None), gradients(torch.bfloat16)
    for one, other in zip(rounded, exact, strict=True):
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.01 * other.norm()


def test_every_large_product_is_taken_in_the_precision_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden layer forward, keys and W1 backward; rows are filled up to 64."""
    asked: list[tuple[torch.dtype | None, tuple[int, ...]]] = []

    def watched(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        found = product(one, other, dtype)
        asked.append((dtype, tuple(found.shape)))
        return found

    monkeypatch.setattr(layers, "product", watched)
    pooling = AttentivePooling(16, 3, attention_dim=32, max_history=9, bias=True, positions=True)
    with torch.autocast("cpu", torch.bfloat16):
        interests, _ = pooling(torch.randn(4, 9, 16), torch.ones(4, 9, dtype=torch.bool))
    interests.sum().backward()
    assert asked == [(torch.bfloat16, shape) for shape in ((64, 32), (64, 16), (16, 32))]


@pytest.mark.parametrize("users", [1, 2, 7])
def test_a_batch_shared_by_threads_has_the_values_and_gradients_of_one(
    users: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the weights are added up thread by thread, so their last bits differ."""
    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(cpu, "_num_cores", lambda: 3)
    torch.manual_seed(0)
    pooling = AttentivePooling(6, 3, attention_dim=11, max_history=5, bias=True, positions=True)
    mask = torch.arange(5) >= 5 - torch.randint(1, 6, (users, 1))
    rows = torch.randn(users, 5, 6, requires_grad=True)
    weight = torch.randn(users, 3, 6)

    def run() -> list[torch.Tensor]:
        interests, attention = pooling(rows, mask)
        total = (interests * weight).sum() + attention.square().sum()
        return [interests, attention, *torch.autograd.grad(total, [rows, *pooling.parameters()])]

    one, before = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with cpu.threads_for_kernels():
            shared = run()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(shared, one, rtol=1e-5, atol=1e-6)


def test_a_gradient_may_be_taken_twice() -> None:
    pooling = AttentivePooling(6, 3, attention_dim=11, max_history=5, bias=True, positions=True)
    rows = torch.randn(4, 5, 6, requires_grad=True)
    total = pooling(rows, torch.ones(4, 5, dtype=torch.bool))[0].square().sum()
    leaves = [rows, *pooling.parameters()]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(total, leaves), strict=True))


def test_a_worker_without_users_has_no_interests() -> None:
    pooling = AttentivePooling(6, 3, attention_dim=11, max_history=5, bias=True, positions=True)
    rows = torch.zeros(0, 5, 6, requires_grad=True)
    interests, attention = pooling(rows, torch.zeros(0, 5, dtype=torch.bool))
    assert interests.shape == (0, 3, 6)
    assert attention.shape == (0, 3, 5)
    (interests.sum() + attention.sum()).backward()
    assert rows.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in pooling.parameters())


def test_a_graph_of_packed_attention_can_be_gone_through_twice() -> None:
    torch.manual_seed(0)
    pooling = AttentivePooling(6, 2, attention_dim=11, max_history=5, bias=True, positions=True)
    rows, mask = (
        torch.randn(4, 5, 6, requires_grad=True),
        torch.arange(5) >= torch.tensor([[0], [4], [2], [1]]),
    )
    total = (pooling(rows, mask)[0] * torch.randn(4, 2, 6)).sum()
    first = torch.autograd.grad(total, [rows, *pooling.parameters()], retain_graph=True)
    second = torch.autograd.grad(total, [rows, *pooling.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
