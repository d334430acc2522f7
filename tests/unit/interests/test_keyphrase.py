"""The backend without a model: groups, phrases, and what it does when there is little to work with."""

import json
import math

import pytest

from distributed_mi.interests.backends.base import BackendContext, Request
from distributed_mi.interests.backends.keyphrase import DocumentFrequencies, KeyphraseBackend, title_phrases
from distributed_mi.interests.history import Exemplar, HistoryItem


def item(index: int, title: str, *categories: str) -> HistoryItem:
    return HistoryItem(index, title, categories)


CATALOGUE = [
    item(1, "Miles Davis jazz trumpet", "Shop", "Music", "Jazz"),
    item(2, "Coltrane jazz saxophone", "Shop", "Music", "Jazz"),
    item(3, "Garlic press", "Shop", "Kitchen"),
    item(4, "Garlic grater, steel", "Shop", "Kitchen"),
    item(5, "Steel pan", "Shop", "Kitchen"),
    item(6, "Mystery", "Shop"),
    item(7, "Plain thing"),
    item(8, "Steel guitar", "Shop", "Music"),
]


def answer(
    history: list[HistoryItem], *, max_interests: int = 20, chars: int = 120, phrases: int = 3
) -> list[dict]:
    context = BackendContext({}, max_interests, chars, CATALOGUE)
    backend = KeyphraseBackend(KeyphraseBackend.Config(phrases_per_interest=phrases), context)
    response = backend.generate([Request(Exemplar(5, tuple(history)), "unused", 10)])[0]
    assert (response.user_index, response.finish_reason, response.error) == (5, "stop", None)
    return json.loads(response.text)["interests"]


def test_phrases_of_a_title() -> None:
    assert title_phrases("The Steel-Pan, 12 oz for GARLIC Bread") == {
        "steel-pan",
        "garlic",
        "bread",
        "garlic bread",
    }
    assert title_phrases("12 x 3") == set()


def test_weights_by_hand() -> None:
    frequencies = DocumentFrequencies(CATALOGUE)
    # "steel" stands in 3 of 8 titles, "garlic press" in 1, "unheard" in none (counted as 1).
    assert frequencies.phrase_weight("steel") == pytest.approx(math.log(1 + 8 / 3))
    assert frequencies.phrase_weight("garlic press") == pytest.approx(math.log(9))
    assert frequencies.phrase_weight("unheard") == pytest.approx(math.log(9))
    # 7 of 8 items are in "Shop", 3 in "Kitchen".
    assert frequencies.category_weight("Shop") == pytest.approx(math.log(8 / 7))
    assert frequencies.category_weight("Kitchen") == pytest.approx(math.log(8 / 3))


def test_one_interest_a_category_with_its_items_as_support() -> None:
    found = answer([CATALOGUE[i - 1] for i in (3, 1, 4, 2, 5)])
    # Kitchen: 3 items * log(8/3) = 2.94; Jazz: 2 * log(8/2) = 2.77; Music: 2 * log(8/3) = 1.96; Shop: 5 * log(8/7).
    assert [f["item_ids"] for f in found] == [[3, 4, 5], [1, 2]]
    # In Kitchen "garlic" scores 2 log(1 + 8/2) = 3.22, "garlic press" and the other pairs log 9 = 2.20, "steel"
    # 2 log(1 + 8/3) = 2.60; longer phrases first among equals.
    assert found[0]["text"] == "Shop / Kitchen: garlic, steel, garlic grater"
    assert found[1]["text"].startswith("Music / Jazz: ")


def test_items_without_category_make_the_last_group() -> None:
    found = answer([CATALOGUE[6], CATALOGUE[2]])
    assert [f["item_ids"] for f in found] == [[3], [7]]
    assert found[1]["text"] == "plain thing"


def test_everything_in_one_category_still_gives_an_interest() -> None:
    found = answer([CATALOGUE[5]])
    assert found == [{"text": "Shop: mystery", "item_ids": [6]}]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_never_more_interests_than_allowed(limit: int) -> None:
    assert len(answer(CATALOGUE, max_interests=limit)) == limit


def test_text_ends_at_a_whole_phrase_within_the_limit() -> None:
    history = [CATALOGUE[i - 1] for i in (3, 4, 5)]
    assert answer(history, chars=23)[0]["text"] == "Shop / Kitchen: garlic"
    assert answer(history, phrases=1)[0]["text"] == "Shop / Kitchen: garlic"


def test_titles_without_words_give_the_title() -> None:
    assert answer([item(9, "12-34"), item(10, "item 4")]) == [{"text": "12-34, item 4", "item_ids": [9, 10]}]


def untitled(index: int, *categories: str) -> HistoryItem:
    return HistoryItem(index, f"item B{index}XYZ", categories, has_title=False)


def test_the_id_of_an_item_without_title_names_no_interest() -> None:
    found = answer([untitled(9, "Shop", "Kitchen"), CATALOGUE[2], untitled(10), untitled(11, "Toys")])
    assert {tuple(f["item_ids"]): f["text"] for f in found} == {
        (9, 3): "Shop / Kitchen: garlic press",
        (11,): "Toys",
        (10,): "items without title or category",
    }


def test_ids_do_not_count_in_the_catalogue() -> None:
    frequencies = DocumentFrequencies([untitled(1), untitled(2), item(3, "jazz")])
    assert frequencies.phrase_weight("b1xyz") == frequencies.phrase_weight("unheard")
    assert frequencies.num_items == 3


def test_same_history_same_answer() -> None:
    history = CATALOGUE[:5]
    assert answer(history) == answer(history)
    as_sets = [{(f["text"], frozenset(f["item_ids"])) for f in answer(h)} for h in (history, history[::-1])]
    assert as_sets[0] == as_sets[1]
