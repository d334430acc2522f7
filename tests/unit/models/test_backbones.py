"""Models beyond the common contract: hand calculations, options, read-out."""

import pytest
import torch
from pydantic import ValidationError

from distributed_mi.core.errors import ConfigError, InputError
from distributed_mi.core.registry import resolve
from distributed_mi.embeddings.table import LocalItemTable
from distributed_mi.models.base import HistoryBatch, SemanticBatch
from distributed_mi.models.comirec_sa import ComiRecSA
from distributed_mi.models.layers import RecencyPositions, SelfAttention, masked_mean
from distributed_mi.models.most_popular import MostPopular
from distributed_mi.models.youtube_dnn import YouTubeDNN
from tests.model_batches import DIM, MAX_HISTORY, NUM_ROWS, make_batch, make_history, make_model, make_table


def one_hot_table() -> LocalItemTable:
    """Item 1 is (1, 0), item 2 is (0, 1)."""
    items = LocalItemTable(3, 2)
    items.assign(torch.arange(3), {"weight": torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])})
    return items


@pytest.mark.parametrize("bias", [True, False])
def test_comirec_sa_by_hand(bias: bool) -> None:
    """Two items, two interests, one hidden unit.

    Hidden: W1 = (1, 2), b1 = 0.5 -> tanh(1.5), tanh(2.5), or tanh(1), tanh(2) without bias. W2 = (1, -1): interest 0
    has scores (h1, h2), interest 1 their negatives, so the attentions are (p, 1 - p) and (1 - p, p) with
    p = sigmoid(h1 - h2). Items are unit vectors, so interests are the attention rows.
    """
    config = ComiRecSA.Config(num_interests=2, attention_dim=1, bias=bias, positions=False)
    model = ComiRecSA(config, items=one_hot_table(), max_history=3)
    model.pooling.inner_DA.data = torch.tensor([[1.0], [2.0]])
    model.pooling.outer_AK.data = torch.tensor([[1.0, -1.0]])
    if model.pooling.inner_bias_A is not None:
        model.pooling.inner_bias_A.data = torch.tensor([0.5])
    shift = 0.5 if bias else 0.0
    p = torch.sigmoid(torch.tanh(torch.tensor(1.0 + shift)) - torch.tanh(torch.tensor(2.0 + shift))).item()
    history = HistoryBatch(torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]]))
    state = model.encode(history)
    expected = torch.tensor([[[p, 1 - p], [1 - p, p]]])
    torch.testing.assert_close(state.interests_BKD, expected)
    assert state.attention_BKL is not None
    torch.testing.assert_close(state.attention_BKL[:, :, 1:], expected)


def test_positions_steer_the_attention_and_are_not_summed_in() -> None:
    config = ComiRecSA.Config(num_interests=1, attention_dim=2, bias=False)
    model = ComiRecSA(config, items=one_hot_table(), max_history=2)
    model.pooling.inner_DA.data = torch.eye(2)
    model.pooling.outer_AK.data = torch.tensor([[50.0], [50.0]])
    assert model.pooling.positions is not None
    model.pooling.positions.by_distance_LD.data = torch.tensor(
        [[9.0, 9.0], [-9.0, -9.0]]
    )  # newest, then older
    history = HistoryBatch(torch.tensor([[1, 2]]), torch.tensor([[True, True]]))
    # All attention on the newest item, whose row comes out without the position.
    torch.testing.assert_close(model.encode(history).interests_BKD, torch.tensor([[[0.0, 1.0]]]))


def test_recency_positions_count_from_the_newest_item() -> None:
    positions = RecencyPositions(3, 1)
    positions.by_distance_LD.data = torch.tensor([[0.0], [1.0], [2.0]])
    assert positions(3).flatten().tolist() == [2.0, 1.0, 0.0]
    assert positions(1).flatten().tolist() == [0.0]
    assert positions(5).flatten().tolist() == [2.0, 2.0, 2.0, 1.0, 0.0]


def test_only_the_closest_interest_receives_gradient() -> None:
    model, batch = make_model("comirec_sa"), make_batch()
    rows = model.step_rows(batch)
    state, terms = model.loss_from_rows(batch, rows)
    state.interests_BKD.retain_grad()
    terms.total(7).backward()
    touched = state.interests_BKD.grad.abs().sum(2) > 0
    closest = (state.interests_BKD @ rows.target_BD[:, :, None]).squeeze(2).argmax(1)
    assert touched.sum(1).tolist() == [1] * 7
    assert touched.int().argmax(1).tolist() == closest.tolist()


def test_youtube_dnn_by_hand() -> None:
    model = YouTubeDNN(YouTubeDNN.Config(), items=one_hot_table(), max_history=4)
    model.weight_DD.data = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    assert model.bias_D is not None
    model.bias_D.data = torch.tensor([1.0, -1.0])
    history = HistoryBatch(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[False, True, True, True]]))
    # Mean (2/3, 1/3), times (2, 4), plus (1, -1).
    torch.testing.assert_close(model.encode(history).interests_BKD, torch.tensor([[[7 / 3, 1 / 3]]]))


def test_masked_mean_ignores_what_stands_at_padding() -> None:
    rows = torch.tensor([[[100.0], [2.0], [4.0]]])
    assert masked_mean(rows, torch.tensor([[False, True, True]])).tolist() == [[3.0]]


def test_remi_without_its_two_terms_is_comirec_sa_exactly() -> None:
    plain = make_model("comirec_sa").loss(make_batch())
    remi = make_model("remi", rr_weight=0.0, ihn_beta=0.0).loss(make_batch())
    assert torch.equal(remi.mean["recommendation"], plain.mean["recommendation"])
    assert remi.sum == {}


def test_remi_adds_its_penalty_as_a_sum_over_users() -> None:
    terms = make_model("remi", rr_weight=2.0).loss(make_batch())
    by_one = make_model("remi", rr_weight=1.0).loss(make_batch())
    assert list(terms.sum) == ["routing"]
    torch.testing.assert_close(terms.sum["routing"], 2 * by_one.sum["routing"])
    expected = terms.mean["recommendation"].mean() + terms.sum["routing"].sum()
    torch.testing.assert_close(terms.total(7), expected)


@pytest.mark.parametrize("name", ["youtube_dnn", "comirec_sa", "remi"])
def test_accidental_hits_are_masked_unless_switched_off(name: str) -> None:
    masked = make_model(name).loss(make_batch()).mean["recommendation"]
    kept = make_model(name, mask_accidental_hits=False).loss(make_batch()).mean["recommendation"]
    hit = torch.isin(make_batch().target_ids_B, make_batch().negative_ids_N)
    assert hit.any()
    assert ((kept > masked) == hit).all()


def test_log_q_reaches_the_loss() -> None:
    model, batch = make_model("comirec_sa"), make_batch()
    log_q = torch.randn(NUM_ROWS, generator=torch.Generator().manual_seed(0))
    corrected = type(batch)(
        **{
            **vars(batch),
            "target_log_q_B": log_q[batch.target_ids_B],
            "negative_log_q_N": log_q[batch.negative_ids_N],
        }
    )
    uniform = type(batch)(
        **{
            **vars(batch),
            "target_log_q_B": torch.full((7,), -3.0),
            "negative_log_q_N": torch.full((12,), -3.0),
        }
    )
    plain = model.loss(batch).mean["recommendation"]
    torch.testing.assert_close(model.loss(uniform).mean["recommendation"], plain)
    assert not torch.allclose(model.loss(corrected).mean["recommendation"], plain)


def test_a_step_is_one_lookup() -> None:
    for name in ("youtube_dnn", "comirec_sa", "remi", "eimf"):
        items = make_table()
        calls = []
        original = items.lookup
        items.lookup = lambda *ids, calls=calls, original=original: calls.append(len(ids)) or original(*ids)
        make_model(name, items).loss(make_batch())
        assert calls == [3], name


def test_kaiming_first_values() -> None:
    model = make_model("comirec_sa", num_interests=64, attention_dim=512)
    # Standard deviations sqrt(2 / fan_in), to 5%: 8 x 512 and 512 x 64 numbers.
    assert model.pooling.inner_DA.std().item() == pytest.approx((2 / DIM) ** 0.5, rel=0.05)
    assert model.pooling.outer_AK.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert model.pooling.positions.by_distance_LD.std().item() == pytest.approx(
        (2 / (MAX_HISTORY * DIM)) ** 0.5, rel=0.5
    )


def test_parameter_count_of_remi() -> None:
    """model-facts 9.5: L d + 4 d^2 + 4 d K without biases; d 64, L 20, K 4 give 18,688."""
    owner = resolve("model", "remi")
    model = owner(owner.Config(bias=False), items=LocalItemTable(5, 64), max_history=20)
    assert sum(p.numel() for p in model.parameters()) == 1_280 + 16_384 + 1_024


def test_self_attention_does_not_read_padding() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(4, num_heads=2, residual=True)
    values, mask = torch.randn(1, 3, 4), torch.tensor([[True, True, False]])
    changed = values.clone()
    changed[0, 2] = 99.0
    torch.testing.assert_close(attention(values, mask)[:, :2], attention(changed, mask)[:, :2])
    torch.testing.assert_close(attention(values, mask)[:, :2], attention(values[:, :2], mask[:, :2]))


def test_most_popular_ignores_the_history_and_refuses_other_counts() -> None:
    model = MostPopular(MostPopular.Config(), items=make_table(), max_history=4)
    with pytest.raises(InputError, match="counts for 41 item rows"):
        model.fit_counts(torch.ones(3))
    interests = model.encode(make_history()).interests_BKD
    assert torch.equal(interests, interests[:1].expand_as(interests))


def test_zero_interests_is_refused_and_the_message_names_the_field() -> None:
    with pytest.raises(ValidationError, match="num_interests"):
        ComiRecSA.Config(num_interests=0)


def test_an_unknown_field_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean rr_weight"):
        make_model("remi", rr_weigth=1.0)


def test_a_user_without_semantic_interests_is_named() -> None:
    with pytest.raises(InputError, match="row 1 has no semantic interest"):
        SemanticBatch(
            torch.zeros(2, 1, 3), torch.tensor([[True], [False]]), torch.zeros(2, 3), torch.zeros(4, 3)
        )
