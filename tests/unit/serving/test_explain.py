import json

import numpy as np
import pytest
import torch

from distributed_mi.core.artifacts import StageKey
from distributed_mi.serving import explain as explaining
from distributed_mi.serving import retriever as retrieving
from distributed_mi.serving.semantics import Semantics, cosine, naming_vector
from tests.unit.evaluation import tiny


@pytest.fixture
def with_language(workspace, retriever):
    tiny.language(workspace)
    return retriever


ODD_AND_EVEN = ["item-2", "item-4", "item-1", "item-3", "item-8", "item-5"]


def test_items_belong_to_the_interest_that_attends_to_them(with_language) -> None:
    # TwoInterests reads even items with interest 0 and odd items with interest 1, in equal parts.
    explanation = explaining.explain(with_language, item_ids=ODD_AND_EVEN, top=8)
    even, odd = explanation.interests
    assert sorted(h.item.item_index for h in even.history) == [2, 4, 8]
    assert sorted(h.item.item_index for h in odd.history) == [1, 3, 5]
    assert [h.attention for h in odd.history] == pytest.approx([1 / 3] * 3)
    assert even.share + odd.share == pytest.approx(1.0)
    for interest in explanation.interests:
        listed = [i.item_index for i in explanation.answer.items if i.interest == interest.number]
        assert [i.item_index for i in interest.recommended] == listed
        assert interest.share == pytest.approx(len(listed) / 8)


def test_names_are_the_nearest_semantic_interests_of_all_and_of_the_own_exemplar(
    with_language, monkeypatch
) -> None:
    # Without recommended items only the history counts: even items are nearest to "even things", odd to "odd things".
    monkeypatch.setattr(with_language, "rank", lambda history, top, exclude_seen: [])
    even, odd = explaining.explain(with_language, item_ids=ODD_AND_EVEN).interests
    assert [n.text for n in even.names] == ["even things [bold]", "even things", "odd things"]
    assert odd.names[0].text == "odd things"
    assert [n.text for n in even.own_names] == ["even things [bold]", "odd things"]
    assert [n.text for n in odd.own_names] == ["odd things", "even things [bold]"]
    for interest in (even, odd):
        similarities = [n.similarity for n in interest.names]
        assert similarities == sorted(similarities, reverse=True)
        assert similarities[0] >= interest.own_names[0].similarity
    # Odd items 1, 3, 5: mean (1, 0, 0.03, 0), the interest's vector (1, 0, 0.01, 0).
    expected = (1 + 0.03 * 0.01) / np.sqrt((1 + 0.03**2) * (1 + 0.01**2))
    assert odd.names[0].similarity == pytest.approx(expected, abs=1e-6)


def test_naming_vector_by_hand() -> None:
    history = np.array([[2.0, 0.0], [0.0, 2.0]], np.float32)
    weights = np.array([1.0, 0.0], np.float32)
    none = np.zeros((0, 2), np.float32)
    assert naming_vector(history, weights, none).tolist() == [1.0, 0.0]
    recommended = np.array([[0.0, 5.0], [0.0, 1.0]], np.float32)
    assert naming_vector(history, weights, recommended).tolist() == [1.0, 1.0]
    assert cosine(np.array([[0.0, 0.0]], np.float32), history).tolist() == [[0.0, 0.0]]


def test_a_training_user_has_the_exemplar_of_its_cluster(with_language) -> None:
    for user_id, exemplar, cluster in [("train-2", "train-2", 0), ("train-7", "train-5", 1)]:
        chain = explaining.explain(with_language, user_id=user_id).chain
        assert chain is not None
        assert (chain.exemplar_user_id, chain.cluster, chain.assigned_by) == (exemplar, cluster, "clustering")


def test_another_user_has_the_nearest_exemplar_by_text(with_language) -> None:
    only_even = explaining.explain(with_language, item_ids=["item-2", "item-4", "item-6"]).chain
    both = explaining.explain(with_language, item_ids=["item-2", "item-1", "item-3", "item-4"]).chain
    assert only_even is not None
    assert both is not None
    assert (only_even.exemplar_user_id, only_even.assigned_by) == ("train-2", "nearest exemplar")
    assert both.exemplar_user_id == "train-5"
    # Text vectors: mean (0, 1, 0.04), exemplar (0, 1, 0.02): squared distance 0.0004.
    assert only_even.similarity == pytest.approx(-0.0004, abs=1e-7)


def test_chain_leads_to_prompt_answer_and_evidence(with_language) -> None:
    explanation = explaining.explain(with_language, user_id="train-7")
    chain = explanation.chain
    assert chain is not None
    assert chain.prompt_hash == "b" * 64
    assert [i["text"] for i in json.loads(chain.answer)["interests"]] == ["odd things", "even things [bold]"]
    assert [[i.item_index for i in e.items] for e in chain.evidence] == [[1, 3], [6]]
    text = explaining.render(explanation)
    assert "user train-7 -> cluster 1 (11 training users, by clustering" in text
    assert "exemplar user train-5 -> prompt bbbbbbbbbbbbbbbb (backend keyphrase, model none" in text
    assert "Title 1; Title 3" in text


def test_markup_in_texts_is_literal(with_language) -> None:
    text = explaining.render(explaining.explain(with_language, user_id="train-7"))
    assert "even things [bold]" in text


def test_json_holds_everything(with_language) -> None:
    explanation = explaining.explain(with_language, user_id="test-1", top=4)
    content = json.loads(explaining.render(explanation, as_json=True))
    assert content["answer"]["user_id"] == "test-1"
    assert len(content["interests"]) == 2
    assert content["chain"]["evidence"][0]["items"]


def test_without_the_language_side_interests_are_unnamed(retriever) -> None:
    explanation = explaining.explain(retriever, user_id="test-1", top=4)
    assert explanation.chain is None
    assert "distributed-mi embed" in explanation.note
    assert all(i.names == [] and i.history for i in explanation.interests)
    text = explaining.render(explanation)
    assert "Interest 1: unnamed" in text
    assert explanation.note in text


def test_a_stale_language_side_is_not_used(workspace, with_language) -> None:
    manifest = workspace.stage("exemplars").require()
    run = workspace.stage("exemplars").open(StageKey("exemplars", manifest.inputs, {"preference": -5.0}))
    run.commit(rows={})
    semantics, note = Semantics.open(workspace)
    assert semantics is None
    assert note == "no semantic interests: stage interests is older than exemplars, run it again"


def test_a_model_without_attention_counts_the_history_in_equal_parts(with_language) -> None:
    with_language.model.with_attention = False
    explanation = explaining.explain(with_language, item_ids=ODD_AND_EVEN)
    assert not explanation.has_attention
    assert [h.attention for h in explanation.interests[0].history] == pytest.approx([1 / 6] * 6)
    assert "equal parts" in explaining.render(explanation)


def test_nothing_to_explain(with_language) -> None:
    explanation = explaining.explain(with_language, item_ids=["nonsense"])
    assert (explanation.interests, explanation.chain) == ([], None)
    assert "nothing to explain" in explaining.render(explanation)


def open_real_model(workspace, name: str):
    from distributed_mi.core.registry import resolve

    owner = resolve("model", name)
    model = owner(owner.Config(), items=tiny.make_table(), max_history=tiny.MAX_HISTORY)
    if not model.personal:
        model.fit_counts(torch.arange(tiny.NUM_ITEMS + 1))
    return retrieving.Retriever.open(workspace, "two", lambda fs, path: model), model


def test_popularity_has_no_interests_to_name(workspace) -> None:
    tiny.language(workspace)
    opened, _ = open_real_model(workspace, "most_popular")
    explanation = explaining.explain(opened, item_ids=["item-30", "item-1"], top=3)
    assert explanation.answer.source == "popularity"
    assert [(i.item_index, i.score, i.interest) for i in explanation.answer.items] == [
        (29, 29.0, None),
        (28, 28.0, None),
        (27, 27.0, None),
    ]
    assert (explanation.interests, explanation.chain) == ([], None)
    text = explaining.render(explanation)
    assert "this is the popularity list" in text
    assert "Interest 1" not in text
    assert "no known item" not in text
    assert "even things" not in text
    shown = retrieving.render(opened.recommend(user_id="test-1", top=3))
    assert "this is the popularity list" in shown


@pytest.mark.parametrize("name", ["youtube_dnn", "comirec_sa"])
def test_real_models_can_be_explained(workspace, name: str) -> None:
    tiny.language(workspace)
    opened, model = open_real_model(workspace, name)
    explanation = explaining.explain(opened, user_id="test-1", top=5)
    assert len(explanation.interests) == model.num_interests
    assert sum(i.share for i in explanation.interests) == pytest.approx(1.0)
    assert explanation.interests[0].names
    assert explaining.render(explanation)
