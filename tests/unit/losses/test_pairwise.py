"""BPR and gBCE against torch, hand calculations and the formula of the gSASRec paper."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_mi.losses.pairwise import bpr, gbce

NUM_ROWS = 30


def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "query_BD": torch.randn(5, 4, generator=generator),
        "target_rows_BD": torch.randn(5, 4, generator=generator),
        "negative_rows_ND": torch.randn(7, 4, generator=generator),
        "target_ids_B": torch.tensor([1, 2, 3, 4, 5]),
        "negative_ids_N": torch.tensor([1, 1, 7, 8, 9, 2, 10]),
    }


def scores(values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of targets `[B]`, of negatives `[B, N]`, and which negatives count."""
    positive = (values["query_BD"] * values["target_rows_BD"]).sum(1)
    real = values["target_ids_B"][:, None] != values["negative_ids_N"]
    return positive, values["query_BD"] @ values["negative_rows_ND"].T, real


@pytest.mark.parametrize("mask", [True, False])
def test_bpr_is_the_mean_log_sigmoid_of_margins(mask: bool) -> None:
    values = problem()
    positive, negative, real = scores(values)
    losses = -torch.log(torch.sigmoid(positive[:, None] - negative))
    keep = real if mask else torch.ones_like(real)
    expected = torch.stack([row[k].mean() for row, k in zip(losses, keep, strict=True)])
    torch.testing.assert_close(bpr(**values, mask_accidental_hits=mask), expected)


def test_bpr_with_one_negative_is_what_rechorus_computes_and_with_several_is_not() -> None:
    def rechorus(values: dict[str, Tensor]) -> Tensor:
        positive, negative, _ = scores(values)
        weights = torch.softmax(negative, dim=1)
        return -torch.log(((positive[:, None] - negative).sigmoid() * weights).sum(1))

    values = problem()
    one = {**values, "negative_rows_ND": values["negative_rows_ND"][3:4], "negative_ids_N": torch.tensor([8])}
    torch.testing.assert_close(bpr(**one), rechorus(one))
    assert (bpr(**values) - rechorus(values)).abs().max() > 0.01


@pytest.mark.parametrize("mask", [True, False])
def test_gbce_at_zero_is_torch_binary_cross_entropy(mask: bool) -> None:
    values = problem()
    positive, negative, real = scores(values)
    ours = gbce(**values, calibration=0.0, num_rows=NUM_ROWS, mask_accidental_hits=mask)
    logits = torch.cat([positive[:, None], negative], dim=1)
    truth = torch.zeros_like(logits)
    truth[:, 0] = 1.0
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    keep = torch.cat([torch.ones(5, 1, dtype=torch.bool), real if mask else torch.ones_like(real)], dim=1)
    torch.testing.assert_close(ours, torch.stack([r[k].mean() for r, k in zip(losses, keep, strict=True)]))


@pytest.mark.parametrize("t", [0.25, 0.75, 1.0])
def test_gbce_is_the_formula_of_the_paper(t: float) -> None:
    """Equations as printed: alpha = |sampled| / |negatives|, beta = alpha (t (1 - 1/alpha) + 1/alpha), sigma^beta."""
    values = {key: v.double() if v.is_floating_point() else v for key, v in problem().items()}
    positive, negative, _ = scores(values)
    alpha = 7 / 28  # of 29 items one is the target
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    printed = -(torch.log(positive.sigmoid() ** beta) + torch.log(1 - negative.sigmoid()).sum(1)) / 8
    ours = gbce(**values, calibration=t, num_rows=NUM_ROWS, mask_accidental_hits=False)
    torch.testing.assert_close(ours, printed)


def test_gbce_with_every_negative_is_binary_cross_entropy_whatever_the_calibration() -> None:
    values = problem()
    plain = gbce(**values, calibration=0.0, num_rows=9)
    assert torch.equal(gbce(**values, calibration=1.0, num_rows=9), plain)  # 7 draws for 7 negatives
    assert torch.equal(gbce(**values, calibration=1.0, num_rows=5), plain)  # more draws than negatives


@pytest.mark.parametrize("name", ["bpr", "gbce"])
def test_huge_scores_and_users_without_a_negative_stay_finite(name: str) -> None:
    values: dict[str, Any] = problem()
    values["query_BD"] = (values["query_BD"] * 1e4).requires_grad_()
    values["negative_ids_N"] = torch.full((7,), 3)
    if name == "bpr":
        loss = bpr(**values)
        assert loss[2].item() == 0.0
    else:
        loss = gbce(**values, calibration=0.5, num_rows=NUM_ROWS)
        alone = -(1 - 0.5 * (1 - 7 / 28)) * F.logsigmoid(scores(values)[0][2])
        torch.testing.assert_close(loss[2], alone)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(values["query_BD"].grad).all()
