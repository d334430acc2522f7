"""EIMF beyond the common contract: the backbone inside, what the auxiliary tasks reach, every switch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from distributed_mi.core.errors import ConfigError, InputError
from distributed_mi.embeddings.optimizer import SGD
from distributed_mi.models.base import Recommender, TrainBatch
from distributed_mi.models.comirec_sa import ComiRecSA
from distributed_mi.models.eimf import EIMF
from tests.model_batches import (
    MAX_HISTORY,
    TEXT_DIM,
    make_batch,
    make_history,
    make_model,
    make_table,
    table_gradient,
)

BACKBONES = ["remi", "comirec_sa", "youtube_dnn"]


def train(model: Recommender, steps: int = 8) -> Recommender:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        model.loss(make_batch(seed=step)).total(7).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.items.step(0.01)
    return model


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gamma_zero_trains_the_backbone_bit_for_bit(backbone: str) -> None:
    eimf = train(make_model("eimf", gamma=0.0, backbone={"name": backbone}))
    plain = train(make_model(backbone))
    for name, value in plain.state_dict().items():
        assert torch.equal(eimf.state_dict()[f"backbone.{name}"], value), name
    assert torch.equal(eimf.items.state()[1]["weight"], plain.items.state()[1]["weight"])
    # The auxiliary parameters are frozen at their first values.
    untouched = make_model("eimf", gamma=0.0, backbone={"name": backbone}).state_dict()
    assert all(
        torch.equal(eimf.state_dict()[n], v) for n, v in untouched.items() if n.startswith("semantic.")
    )


def test_gamma_changes_training_and_the_backbone_starts_the_same() -> None:
    eimf, plain = make_model("eimf"), make_model("remi")
    for name, value in plain.state_dict().items():
        assert torch.equal(eimf.state_dict()[f"backbone.{name}"], value)
    train(eimf), train(plain)
    assert not torch.equal(eimf.items.state()[1]["weight"], plain.items.state()[1]["weight"])


def test_serving_reads_no_text() -> None:
    eimf, remi = make_model("eimf"), make_model("remi")
    before = eimf.encode(make_history()).interests_BKD
    assert torch.equal(before, remi.encode(make_history()).interests_BKD)
    for parameter in eimf.semantic.parameters():
        parameter.data.fill_(float("nan"))
    assert torch.equal(eimf.encode(make_history()).interests_BKD, before)


@pytest.mark.parametrize("text_width", ["item", "text"])
def test_prediction_alone_sends_no_gradient_to_table_or_backbone(text_width: str) -> None:
    """model-facts 19.10."""
    items = make_table(optimizer=SGD())
    model = make_model("eimf", items, text_width=text_width)
    model.loss(make_batch()).mean["semantic"].sum().backward()
    assert not table_gradient(items).any()
    assert all(p.grad is None or not p.grad.any() for p in model.backbone.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.semantic.parameters())


def test_alignment_reaches_targets_histories_and_the_backbone() -> None:
    items, batch = make_table(optimizer=SGD()), make_batch()
    model = make_model("eimf", items)
    model.loss(batch).mean["alignment"].sum().backward()
    touched = table_gradient(items).any(dim=1)
    assert touched[batch.target_ids_B].all()
    assert touched[batch.history.item_ids_BL[batch.history.mask_BL]].all()
    assert not touched[0]
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.parameters())


def one_user(text_row: list[float]) -> TrainBatch:
    batch = make_batch(num_users=1)
    assert batch.semantics is not None
    return replace(batch, semantics=replace(batch.semantics, target_text_BT=torch.tensor([text_row])))


def test_losses_of_one_user_by_second_implementation() -> None:
    """Equations 6 to 12 written out for a batch of one, with text as wide as items and identity projections."""
    batch = one_user([0.5] * TEXT_DIM)
    assert batch.semantics is not None
    from distributed_mi.embeddings.table import LocalItemTable

    items = LocalItemTable(41, TEXT_DIM, seed=1)
    torch.manual_seed(0)
    model = EIMF(
        EIMF.Config(gamma=1.0, alpha=0.3, beta=0.2), items=items, max_history=MAX_HISTORY, text_dim=TEXT_DIM
    )
    model.semantic.interest_projection.weight.data = torch.eye(TEXT_DIM)
    model.semantic.interest_projection.bias.data.zero_()
    model.semantic.attention.output.weight.data.zero_()  # self-attention becomes its residual
    model.semantic.attention.output.bias.data.zero_()
    terms = model.loss(batch)

    interests = batch.semantics.interests_BMT[0][batch.semantics.interests_mask_BM[0]]
    text = batch.semantics.target_text_BT[0]
    pooled = torch.softmax(interests @ text / TEXT_DIM**0.5, dim=0) @ interests
    negatives = batch.semantics.negative_text_NT[batch.negative_ids_N != batch.target_ids_B[0]]
    logits = torch.cat([(pooled @ text)[None], negatives @ pooled])
    torch.testing.assert_close(terms.mean["semantic"], -torch.log_softmax(logits, dim=0)[:1])

    row = items.rows(batch.target_ids_B)[0]
    behaviour = model.encode(batch.history).interests_BKD[0]
    read = torch.softmax(behaviour @ row / TEXT_DIM**0.5, dim=0) @ behaviour
    cosine = torch.nn.functional.cosine_similarity
    # Alone in the step, the contrast is log 1 = 0.
    expected = 0.2 * ((1 - cosine(pooled, read, dim=0)) + (1 - cosine(text, row, dim=0)))
    torch.testing.assert_close(terms.mean["alignment"][0], expected)


def test_items_without_text_take_no_part_in_prediction_and_item_alignment() -> None:
    terms = make_model("eimf", alpha=0.0).loss(one_user([0.0] * TEXT_DIM))
    assert terms.mean["semantic"].item() == 0.0
    with_text = make_model("eimf", alpha=0.0).loss(one_user([1.0] * TEXT_DIM))
    assert with_text.mean["semantic"].item() > 0.0


@pytest.mark.parametrize("text_width", ["item", "text"])
def test_a_negative_without_text_is_no_negative(text_width: str) -> None:
    """As if it had not been drawn; a zero vector would still count exp(0), or the bias of the projection."""
    model, batch = make_model("eimf", text_width=text_width), make_batch()
    s = batch.semantics
    assert s is not None
    texts = s.negative_text_NT.clone()
    texts[5] = 0.0
    silent = replace(batch, semantics=replace(s, negative_text_NT=texts))
    left = [n for n in range(len(texts)) if n != 5]
    without = replace(
        batch,
        negative_ids_N=batch.negative_ids_N[left],
        semantics=replace(s, negative_text_NT=texts[left]),
    )
    found, expected = (model.loss(b).mean["semantic"] for b in (silent, without))
    torch.testing.assert_close(found, expected)


NEEDED_BY: dict[str, dict[str, Any]] = {
    "num_heads": {"text_width": "text"},
    "alignment_space": {"text_width": "text"},
}
"""Switch -> what it cannot do without, which is set on both sides of the comparison."""


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"text_width": "text"}, {"semantic", "alignment"}),
        ({"num_heads": 3}, {"semantic", "alignment"}),
        ({"projection": "separate"}, {"semantic", "alignment"}),
        ({"alignment_space": "text"}, {"alignment"}),
        ({"residual": False}, {"semantic", "alignment"}),
        ({"attention_projections": False}, {"semantic", "alignment"}),
        ({"attention_scale": False}, {"semantic", "alignment"}),
        ({"prediction_candidates": "all"}, {"semantic"}),
        ({"alignment_read_out": "hard"}, {"alignment"}),
        ({"recommendation_read_out": "soft"}, {"recommendation"}),
        ({"both_directions": True}, {"alignment"}),
        ({"mask_equal_targets": False}, {"alignment"}),
        ({"mask_accidental_hits": False}, {"semantic"}),
        ({"temperature": 1.0}, {"alignment"}),
        ({"backbone": {"name": "comirec_sa", "num_interests": 2}}, {"recommendation", "alignment"}),
        ({"backbone": {"name": "youtube_dnn"}}, {"recommendation", "alignment"}),
    ],
    ids=str,
)
def test_every_switch_changes_the_loss_and_trains(settings: dict[str, Any], changed: set[str]) -> None:
    needed = {k: v for name in settings for k, v in NEEDED_BY.get(name, {}).items()}
    model, plain = make_model("eimf", **needed, **settings), make_model("eimf", **needed)
    # The same first values on both sides, as far as both have them, so that only the switch makes a difference.
    own = model.state_dict()
    shared = {n: v for n, v in plain.state_dict().items() if n in own and own[n].shape == v.shape}
    model.load_state_dict(own | shared)
    terms, default = model.loss(make_batch()), plain.loss(make_batch())
    names = ("recommendation", "semantic", "alignment")
    different = {n for n in names if not torch.equal(terms.mean[n], default.mean[n])}
    assert different >= changed
    if not {"backbone", "text_width"} & settings.keys():
        assert different == changed
    assert all(torch.isfinite(v).all() for v in terms.mean.values())
    terms.total(7).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    before = terms.total(7).item()
    assert train_on_one_batch(model).loss(make_batch()).total(7).item() < before


def train_on_one_batch(model: Recommender, steps: int = 15) -> Recommender:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(make_batch()).total(7).backward()
        optimizer.step()
        model.items.step(0.01)
    return model


def test_every_field_is_a_weight_a_task_or_a_tested_switch() -> None:
    """A new choice in `Config` must be added to the test above."""
    marks = test_every_switch_changes_the_loss_and_trains.pytestmark  # type: ignore[attr-defined]
    cases = next(m.args[1] for m in marks if m.name == "parametrize")
    tested = {name for settings, _ in cases for name in settings}
    assert tested | {"gamma", "alpha", "beta", "prediction", "alignment"} == set(EIMF.Config.model_fields)


def test_prediction_over_all_items_by_second_implementation() -> None:
    """Equation 9 with k over every item that has a text; padding and the item without text are no candidates."""
    model, batch = make_model("eimf", gamma=1.0, prediction_candidates="all"), make_batch()
    s = batch.semantics
    assert s is not None
    assert s.catalogue_text_VT is not None
    assert model.reads_catalogue_text
    view = model.semantic(s)
    has_text = s.catalogue_text_VT.any(dim=1)
    assert int((~has_text).sum()) == 2
    logits = view.interest_BS @ model.semantic.interest_projection(s.catalogue_text_VT).T
    logits = logits.masked_fill(~has_text, float("-inf"))
    expected = torch.nn.functional.cross_entropy(logits, batch.target_ids_B, reduction="none")
    expected = torch.where(s.target_text_BT.any(dim=1), expected, 0.0)
    torch.testing.assert_close(model.loss(batch).mean["semantic"], expected)


def test_text_of_the_catalogue_is_asked_for_only_where_it_is_read() -> None:
    assert not make_model("eimf").reads_catalogue_text
    for off in ({"gamma": 0.0}, {"prediction": False}):
        assert not make_model("eimf", prediction_candidates="all", **off).reads_catalogue_text
    batch = make_batch()
    assert batch.semantics is not None
    without = replace(batch, semantics=replace(batch.semantics, catalogue_text_VT=None))
    with pytest.raises(InputError, match="no text of the catalogue"):
        make_model("eimf", prediction_candidates="all").loss(without)


def test_alignment_in_text_space_compares_at_text_width() -> None:
    """beta alone: 1 - cos of the raw text vectors with projected behaviour vectors."""
    model = make_model("eimf", gamma=1.0, alpha=0.0, beta=1.0, text_width="text", alignment_space="text")
    batch = make_batch()
    assert batch.semantics is not None
    assert model.semantic.interest_projection.weight.shape == (TEXT_DIM, 8)
    row = model.items.rows(batch.target_ids_B)
    behaviour = model.encode(batch.history).interests_BKD
    weights = torch.softmax((behaviour @ row[:, :, None]).squeeze(2) / 8**0.5, dim=1)
    read = (weights[:, :, None] * behaviour).sum(dim=1)
    lift, cosine = model.semantic.interest_projection, torch.nn.functional.cosine_similarity
    view, text = model.semantic(batch.semantics), batch.semantics.target_text_BT
    items = (1 - cosine(text, lift(row))) * text.any(dim=1)
    expected = (1 - cosine(view.interest_BS, lift(read))) + items
    torch.testing.assert_close(model.loss(batch).mean["alignment"], expected)


def test_soft_recommendation_compares_the_attended_vector_with_the_items() -> None:
    """Equation 13 with h_im for h_ex, over ComiRec-SA, whose loss is a plain sampled softmax."""
    settings = {"gamma": 0.0, "backbone": {"name": "comirec_sa"}}
    model = make_model("eimf", recommendation_read_out="soft", **settings)
    batch = make_batch()
    rows, negatives = model.items.rows(batch.target_ids_B), model.items.rows(batch.negative_ids_N)
    behaviour = model.encode(batch.history).interests_BKD
    weights = torch.softmax((behaviour @ rows[:, :, None]).squeeze(2) / 8**0.5, dim=1)
    read = (weights[:, :, None] * behaviour).sum(dim=1)
    scores = (read @ negatives.T).masked_fill(batch.target_ids_B[:, None] == batch.negative_ids_N, -1e30)
    own = (read * rows).sum(dim=1, keepdim=True)
    expected = torch.logsumexp(torch.cat([own, scores], dim=1), dim=1) - own[:, 0]
    torch.testing.assert_close(model.loss(batch).mean["recommendation"], expected)
    # Serving still reads the backbone's interests.
    assert torch.equal(behaviour, make_model("eimf", **settings).encode(batch.history).interests_BKD)


class OwnReadOut(ComiRecSA):
    """A backbone of somebody else, whose loss does not ask `read_out`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read_out = None


def test_each_task_can_be_left_out() -> None:
    batch = make_batch()
    assert set(make_model("eimf").loss(batch).mean) == {"recommendation", "semantic", "alignment"}
    assert set(make_model("eimf", prediction=False).loss(batch).mean) == {"recommendation", "alignment"}
    assert set(make_model("eimf", alignment=False).loss(batch).mean) == {"recommendation", "semantic"}
    assert set(make_model("eimf").loss(batch).sum) == {"routing"}


def test_gamma_scales_the_auxiliary_terms() -> None:
    once, twice = (make_model("eimf", gamma=g).loss(make_batch()).mean for g in (0.1, 0.2))
    for name in ("semantic", "alignment"):
        torch.testing.assert_close(twice[name], 2 * once[name])
    assert torch.equal(twice["recommendation"], once["recommendation"])


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="most_popular cannot be the backbone"):
        make_model("eimf", backbone={"name": "most_popular"})
    with pytest.raises(ConfigError, match="eimf cannot be the backbone"):
        make_model("eimf", backbone={"name": "eimf"})
    with pytest.raises(ConfigError, match=r"model\.backbone\.ihn_bta"):
        make_model("eimf", backbone={"name": "remi", "ihn_bta": 1})
    with pytest.raises(ConfigError, match="num_heads 3 does not divide the width 8"):
        make_model("eimf", num_heads=3)
    with pytest.raises(ConfigError, match='needs text_width = "text"'):
        make_model("eimf", alignment_space="text")
    with pytest.raises(ConfigError, match="nothing is trained by L_S"):
        make_model("eimf", text_width="text", attention_projections=False)
    make_model("eimf", text_width="text", attention_projections=False, prediction=False)
    own = {"name": f"{__name__}:OwnReadOut"}
    make_model("eimf", backbone=own)
    with pytest.raises(ConfigError, match="no read_out to replace"):
        make_model("eimf", backbone=own, recommendation_read_out="soft")
    with pytest.raises(ConfigError, match="no width"):
        EIMF(EIMF.Config(), items=make_table(), max_history=4)
    with pytest.raises(InputError, match="no semantic interests"):
        make_model("eimf").loss(replace(make_batch(), semantics=None))


def test_gamma_zero_needs_no_semantics() -> None:
    terms = make_model("eimf", gamma=0.0).loss(replace(make_batch(), semantics=None))
    assert set(terms.mean) == {"recommendation"}
