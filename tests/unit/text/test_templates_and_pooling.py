"""Item texts, pooling, distances and means against hand calculations."""

import numpy as np
import pytest
import torch

from distributed_mi.text import stage
from distributed_mi.text.distances import median_squared_distance, scale_factor, squared_nn_distances
from distributed_mi.text.pooling import pool
from distributed_mi.text.templates import ItemText, clean, item_text, user_text


def test_fields_are_joined_in_order() -> None:
    item = ("B1", "Red  Lipstick\n", "Acme", ["Makeup", " ", "Lips"])
    assert item_text(*item) == ItemText("Red Lipstick", "fields")
    assert item_text(*item, ("brand", "title", "categories")).text == "Acme. Red Lipstick. Makeup, Lips"


@pytest.mark.parametrize(
    ("item", "fields", "wanted"),
    [
        (("B1", None, "Acme", ["Makeup"]), ("title",), ItemText("Acme", "brand")),
        (("B1", "  ", None, ["Makeup", "Lips"]), ("title",), ItemText("Makeup, Lips", "categories")),
        (("B1", "", "", []), ("title", "brand"), ItemText("item B1", "id")),
        (("B1", None, None, None), ("categories",), ItemText("item B1", "id")),
        (("B1", "Soap", None, None), ("brand",), ItemText("Soap", "title")),
        (("B1", None, "Acme", None), ("title", "brand"), ItemText("Acme", "fields")),
    ],
)
def test_an_item_without_title_falls_back(item: tuple, fields: tuple[str, ...], wanted: ItemText) -> None:
    assert item_text(*item, fields) == wanted


def test_texts_are_one_clean_line() -> None:
    assert clean("a\x00b\tc\r\n d\u2028e ") == "a b c d e"
    assert clean(None) == ""
    assert user_text(["Soap", "Red Lipstick"]) == "Soap. Red Lipstick"


def test_mean_pooling_by_hand() -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[7.0, 8.0], [9.0, 9.0], [2.0, 1.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(states, mask, "mean").tolist() == [[2.0, 4.0], [6.0, 6.0]]


def test_cls_pooling_takes_the_first_real_token_on_either_padding_side() -> None:
    states = torch.arange(12.0).reshape(2, 3, 2)
    assert pool(states, torch.tensor([[1, 1, 0], [0, 1, 1]]), "cls").tolist() == [[0.0, 1.0], [8.0, 9.0]]


def test_pooler_and_unknown_pooling() -> None:
    states, mask = torch.zeros(1, 2, 3), torch.ones(1, 2)
    assert pool(states, mask, "pooler", torch.ones(1, 3)).tolist() == [[1.0, 1.0, 1.0]]
    with pytest.raises(ValueError, match="no pooler output"):
        pool(states, mask, "pooler")
    with pytest.raises(ValueError, match="Known: mean, cls, pooler"):
        pool(states, mask, "max")


def test_nearest_neighbour_distances_by_hand(rng: np.random.Generator) -> None:
    line = np.array([[0.0], [1.0], [3.0], [3.0]], dtype=np.float32)
    assert squared_nn_distances(line).tolist() == [1.0, 1.0, 0.0, 0.0]
    points = rng.normal(size=(60, 4)).astype(np.float32)
    all_pairs = ((points[:, None] - points[None]) ** 2).sum(axis=2) + np.diag(np.full(60, np.inf))
    np.testing.assert_allclose(squared_nn_distances(points), all_pairs.min(axis=1), rtol=1e-4)
    sample = squared_nn_distances(points, queries=10)
    assert len(sample) == 10
    assert np.isclose(sample[:, None], all_pairs.min(axis=1)[None], rtol=1e-4).any(axis=1).all()


def test_median_distance_is_that_of_all_pairs(rng: np.random.Generator) -> None:
    points = rng.normal(size=(40, 3)).astype(np.float32)
    pairs = ((points[:, None] - points[None]) ** 2).sum(axis=2)[np.triu_indices(40, 1)]
    assert median_squared_distance(points) == pytest.approx(np.median(pairs), rel=0.02)
    assert median_squared_distance(points[:1]) is None
    assert squared_nn_distances(points[:1]).tolist() == []


def test_scaling_brings_the_median_to_three(rng: np.random.Generator) -> None:
    points = rng.normal(size=(200, 5)).astype(np.float32)
    scaled = points * np.float32(scale_factor(squared_nn_distances(points)))
    assert np.median(squared_nn_distances(scaled)) == pytest.approx(3.0, rel=1e-4)


def test_scale_of_twins_and_of_one_user() -> None:
    # three users in four have a twin: the median of the others (12) counts
    assert scale_factor(np.array([0.0, 0.0, 0.0, 12.0])) == pytest.approx(0.5)
    assert scale_factor(np.zeros(3)) == 1.0
    assert scale_factor(np.empty(0)) == 1.0


def test_mean_vectors_by_hand_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    items = np.array([[0.0, 2.0], [4.0, 4.0], [8.0, 0.0]], dtype=np.float32)
    offsets, events = np.array([0, 1, 4, 6]), np.array([3, 1, 2, 2, 1, 3])
    wanted = [[8.0, 0.0], [8.0 / 3, 10.0 / 3], [4.0, 1.0]]
    np.testing.assert_allclose(stage.mean_vectors(items, offsets, events), wanted, rtol=1e-6)
    for events_at_once in (1, 3, 4):
        monkeypatch.setattr(stage, "_MEAN_EVENTS", events_at_once)
        np.testing.assert_allclose(stage.mean_vectors(items, offsets, events), wanted, rtol=1e-6)
