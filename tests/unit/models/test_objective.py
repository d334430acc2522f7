"""The choice of the recommendation loss: what is looked up, what is read, who decides."""

from typing import Any

import pytest
import torch

from distributed_mi.core.errors import ConfigError
from distributed_mi.losses.in_batch import in_batch_softmax
from distributed_mi.losses.pairwise import bpr, gbce
from distributed_mi.models.base import Recommender
from tests.model_batches import LEARNED, LOSSES, NUM_ROWS, make_batch, make_model, with_loss

WITHOUT_NEGATIVES = {"in_batch", "full_softmax", "argmax", "label_aware"}


def rows_asked(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> int:
    asked: list[int] = []
    lookup = model.items.lookup

    def counting(*ids: torch.Tensor) -> list[torch.Tensor]:
        asked.append(sum(i.numel() for i in ids))
        return lookup(*ids)

    monkeypatch.setattr(model.items, "lookup", counting)
    model.loss(make_batch())
    assert len(asked) == 1  # one exchange for everything
    return asked[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LEARNED)
def test_negatives_are_looked_up_where_the_loss_reads_them(
    monkeypatch: pytest.MonkeyPatch, name: str, loss: str
) -> None:
    batch = make_batch()
    expected = batch.history.item_ids_BL.numel() + batch.target_ids_B.numel()
    if loss not in WITHOUT_NEGATIVES:
        expected += batch.negative_ids_N.numel()
    model = make_model(name, **with_loss(name, LOSSES[loss]))
    assert rows_asked(model, monkeypatch) == expected


@pytest.mark.parametrize("loss", LOSSES)
def test_the_named_loss_is_computed(loss: str) -> None:
    model, batch = (
        make_model("comirec_sa", loss=LOSSES[loss], mask_accidental_hits=loss in WITHOUT_NEGATIVES),
        make_batch(),
    )
    rows = model.step_rows(batch)
    interests = model.encode_rows(batch.history, rows.history_BLD).interests_BKD
    values = model.loss_from_rows(batch, rows)[1].mean["recommendation"]
    nearest = (interests @ rows.target_BD[:, :, None]).squeeze(2).argmax(1)
    query = interests[torch.arange(7), nearest]
    shared: dict[str, Any] = {
        "target_ids_B": batch.target_ids_B,
        "negative_ids_N": batch.negative_ids_N,
        "mask_accidental_hits": False,
    }
    catalogue = model.items.state()[1]["weight"]
    scores_BKV = interests @ catalogue[1:].T
    negative_BN = query @ rows.negative_ND.T
    target_B = (query * rows.target_BD).sum(1)
    weights_BN = torch.softmax(negative_BN, 1) * negative_BN.shape[1] if loss == "hard_negatives" else 1.0

    def full(scores_BV: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores_BV, batch.target_ids_B - 1, reduction="none")

    expected = {
        "sampled_softmax": lambda: torch.log(1 + (negative_BN - target_B[:, None]).exp().sum(1)),
        "hard_negatives": lambda: torch.log(
            1 + (weights_BN * (negative_BN - target_B[:, None]).exp()).sum(1)
        ),
        "in_batch": lambda: in_batch_softmax(
            query,
            rows.target_BD,
            offset=0,
            target_ids_B=batch.target_ids_B,
            candidate_ids_G=batch.target_ids_B,
        ),
        "bpr": lambda: bpr(query, rows.target_BD, rows.negative_ND, **shared),
        "gbce": lambda: gbce(
            query, rows.target_BD, rows.negative_ND, calibration=0.75, num_rows=NUM_ROWS, **shared
        ),
        "full_softmax": lambda: full(query @ catalogue[1:].T),
        "argmax": lambda: full(scores_BKV.amax(1)),
        "label_aware": lambda: full((torch.softmax(2 * scores_BKV, 1) * scores_BKV).sum(1)),
    }[loss]()
    torch.testing.assert_close(values, expected)


def test_remi_reads_its_own_beta() -> None:
    batch = make_batch()
    plain = make_model("comirec_sa", loss={"name": "hard_negatives", "beta": 3.0}).loss(batch)
    remi = make_model("remi", ihn_beta=3.0).loss(batch)
    assert torch.equal(remi.mean["recommendation"], plain.mean["recommendation"])
    assert set(remi.sum) == {"routing"}


def test_eimf_replaces_the_read_out_of_a_loss_that_has_one() -> None:
    chosen = {"name": "comirec_sa", "loss": {"name": "full_softmax"}}
    hard = make_model("eimf", backbone=chosen).loss(make_batch()).mean["recommendation"]
    soft = make_model("eimf", backbone=chosen, recommendation_read_out="soft").loss(make_batch())
    assert (soft.mean["recommendation"] - hard).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="no read_out to replace"):
        make_model(
            "eimf",
            backbone={"name": "comirec_sa", "loss": LOSSES["argmax"]},
            recommendation_read_out="soft",
        )


def test_who_corrects_by_log_q() -> None:
    reads = {loss: make_model("comirec_sa", loss=LOSSES[loss]).reads_log_q for loss in LOSSES}
    assert {loss for loss, value in reads.items() if value} == {
        "sampled_softmax",
        "hard_negatives",
        "in_batch",
    }
    backbone = {"name": "remi", "loss": {"name": "bpr"}}
    assert make_model("eimf", backbone=backbone).reads_log_q
    assert not make_model("eimf", backbone=backbone, prediction=False).reads_log_q
    assert not make_model("eimf", backbone=backbone, gamma=0.0).reads_log_q
