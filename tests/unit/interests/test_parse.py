"""Answers in every form a model gives them in, and in forms it should not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distributed_mi.interests.answer import answer_model, json_schema
from distributed_mi.interests.parse import FailureReason, ParsedAnswer, ParseFailure, parse_answer, script

HISTORY = [1, 2, 3, 10]
WHOLE = '{"interests": [{"text": "Jazz", "item_ids": [1, 2]}, {"text": "Noir, \\"dark\\"", "item_ids": [3]}]}'


def parse(text: str, **limits: int) -> ParsedAnswer | ParseFailure:
    return parse_answer(text, HISTORY, **{"max_interests": 20, "max_interest_chars": 120, **limits})


def pairs(answer: ParsedAnswer | ParseFailure) -> list[tuple[str, tuple[int, ...]]]:
    assert isinstance(answer, ParsedAnswer), answer
    return [(i.text, i.item_indices) for i in answer.interests]


BOTH = [("Jazz", (1, 2)), ('Noir, "dark"', (3,))]


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        f"```json\n{WHOLE}\n```",
        f"Here you are [as JSON]:\n\n{WHOLE}\n\nAnything else?",
        f"<think>the user [1] likes {{jazz}}</think>\n{WHOLE}",
        json.dumps(json.loads(WHOLE), indent=2),
        json.dumps(json.loads(WHOLE)["interests"]),
        '{"1": {"interest": "Jazz", "ids": [1, 2]}, "2": {"interest": "Noir, \\"dark\\"", "ids": [3]}}',
        '{"interests": {"1": {"text": "Jazz", "items": ["1", "ID 2"]}, "2": {"text": "Noir, \\"dark\\"", "items": 3}}}',
        '{"Jazz": [1, 2], "Noir, \\"dark\\"": [3.0]}',
    ],
)
def test_accepted_forms_with_ids(text: str) -> None:
    answer = parse(text)
    assert pairs(answer) == BOTH
    assert isinstance(answer, ParsedAnswer)
    assert not answer.truncated


@pytest.mark.parametrize(
    "text",
    [
        '{"1": "Jazz", "2": "Noir"}',
        '["Jazz", "Noir"]',
        '{"interests": ["Jazz", "Noir"]}',
        '[{"1": "Jazz"}, {"2": "Noir"}]',
        "1. Jazz\n2) Noir",
        "The interests are:\n- Jazz\n- Noir\n",
    ],
)
def test_accepted_forms_without_ids(text: str) -> None:
    assert pairs(parse(text)) == [("Jazz", ()), ("Noir", ())]


@pytest.mark.parametrize("cut", range(len(WHOLE)))
def test_a_truncated_answer_gives_its_complete_interests_and_never_half_of_one(cut: int) -> None:
    answer = parse(WHOLE[:cut])
    first_is_complete = cut >= WHOLE.index("]}") + 2
    second_is_complete = cut >= WHOLE.rindex("]}]}") + 2
    if second_is_complete:
        assert pairs(answer) == BOTH
    elif first_is_complete:
        assert pairs(answer) == BOTH[:1]
        assert isinstance(answer, ParsedAnswer)
        assert answer.truncated
    else:
        assert isinstance(answer, ParseFailure)
        assert answer.reason == (FailureReason.BLANK if cut == 0 else FailureReason.NOT_JSON)


def test_a_truncated_dictionary_gives_its_complete_entries() -> None:
    answer = parse('{"1": "Jazz", "2": "Noir", "3": "Spa')
    assert pairs(answer) == [("Jazz", ()), ("Noir", ())]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", FailureReason.BLANK),
        (" \n\t", FailureReason.BLANK),
        ("<think>for ever", FailureReason.BLANK),
        ("I cannot help with that.", FailureReason.NOT_JSON),
        ("- only one line", FailureReason.NOT_JSON),
        ('{"interests": [', FailureReason.NOT_JSON),
        ("[" * 100_000, FailureReason.NOT_JSON),
        ("[1, 2, 3]", FailureReason.NO_LIST),
        ('{"interests": 5, "other": null}', FailureReason.NO_LIST),
        ('{"interests": [{"text": " "}, {"text": "\\u200b"}]}', FailureReason.NO_USABLE_INTEREST),
        ('{"interests": ["!!!", ""]}', FailureReason.NO_USABLE_INTEREST),
    ],
)
def test_failures_are_typed(text: str, reason: FailureReason) -> None:
    answer = parse(text)
    assert isinstance(answer, ParseFailure)
    assert answer.reason == reason


@pytest.mark.parametrize("text", ['{"interests": []}', "[]", "{}"])
def test_a_proper_empty_list_is_an_answer(text: str) -> None:
    assert parse(text) == ParsedAnswer(())


def test_ids_outside_the_history_are_refused_and_counted() -> None:
    answer = parse('{"interests": [{"text": "Jazz", "item_ids": [1, 99, -3, "none", true, 1]}]}')
    assert pairs(answer) == [("Jazz", (1,))]
    assert isinstance(answer, ParsedAnswer)
    assert answer.refused_ids == 4


def test_duplicates_are_merged_with_their_ids() -> None:
    answer = parse(
        '[{"text": "Jazz music", "ids": [2]}, {"text": "Noir"}, {"text": " JAZZ  music!", "ids": [1, 2]}]'
    )
    assert pairs(answer) == [("Jazz music", (2, 1)), ("Noir", ())]
    assert isinstance(answer, ParsedAnswer)
    assert answer.merged == 1


def test_empty_texts_are_dropped_and_counted() -> None:
    answer = parse('["Jazz", "", "...", "Noir"]')
    assert pairs(answer) == [("Jazz", ()), ("Noir", ())]
    assert isinstance(answer, ParsedAnswer)
    assert answer.dropped == 2


@pytest.mark.parametrize("number", [19, 20, 21, 50])
def test_at_most_twenty_are_kept(number: int) -> None:
    answer = parse(json.dumps([f"interest {i}" for i in range(number)]))
    assert isinstance(answer, ParsedAnswer)
    assert len(answer.interests) == min(number, 20)
    assert answer.over_limit == max(number - 20, 0)


def test_texts_are_cleaned_and_cut() -> None:
    answer = parse(json.dumps(["a\u202eb\nc \x00 d" + " e" * 100]), max_interest_chars=12)
    assert pairs(answer) == [("ab c d e e e", ())]


@given(st.text(max_size=200))
def test_any_text_gives_an_answer_or_a_failure(text: str) -> None:
    answer = parse(text)
    assert isinstance(answer, ParsedAnswer | ParseFailure)
    if isinstance(answer, ParsedAnswer):
        assert all(i.text for i in answer.interests)


@given(
    st.lists(
        st.tuples(st.text(max_size=20), st.lists(st.integers(-5, 15), max_size=4)), min_size=1, max_size=30
    )
)
def test_supporting_ids_are_always_in_the_history(entries: list[tuple[str, list[int]]]) -> None:
    answer = parse(json.dumps({"interests": [{"text": t, "item_ids": i} for t, i in entries]}))
    if isinstance(answer, ParsedAnswer):
        assert {i for e in answer.interests for i in e.item_indices} <= set(HISTORY)
        assert len(answer.interests) <= 20
        assert len({e.text.casefold() for e in answer.interests}) == len(answer.interests)


def test_schema_limits_everything_that_can_grow() -> None:
    model = answer_model(max_interests=4, max_interest_chars=30, max_items_per_interest=2, max_item_index=99)
    schema = json_schema(model)
    interests = schema["properties"]["interests"]
    assert (interests["minItems"], interests["maxItems"]) == (1, 4)
    entry = interests["items"]
    assert entry["properties"]["text"] == {"type": "string", "minLength": 1, "maxLength": 30}
    ids = entry["properties"]["item_ids"]
    assert (ids["minItems"], ids["maxItems"]) == (1, 2)
    assert ids["items"] == {"type": "integer", "minimum": 1, "maximum": 99}
    assert schema["additionalProperties"] is False
    assert entry["additionalProperties"] is False
    assert sorted(entry["required"]) == ["item_ids", "text"]
    with pytest.raises(ValidationError):
        model.model_validate({"interests": [{"text": "x", "item_ids": [100]}]})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("jazz 1959", "LATIN"),
        ("Bücher über Jazz", "LATIN"),
        ("1959!", ""),
        ("Джаз и blues", "CYRILLIC"),
        ("爵士乐", "EAST ASIAN"),
        ("ジャズのレコード", "EAST ASIAN"),
        ("재즈 음악", "EAST ASIAN"),
        ("موسيقى الجاز", "ARABIC"),
    ],
)
def test_the_script_of_a_text(text: str, wanted: str) -> None:
    assert script(text) == wanted


def test_interests_in_a_script_that_nobody_asked_for_are_left_out_and_counted() -> None:
    text = json.dumps(
        {"interests": [{"text": "jazz", "item_ids": [1]}, {"text": "Джаз", "item_ids": [1]}]},
        ensure_ascii=False,
    )
    latin = parse_answer(text, [1], max_interests=5, max_interest_chars=50, scripts=frozenset({"LATIN", ""}))
    assert isinstance(latin, ParsedAnswer)
    assert ([i.text for i in latin.interests], latin.foreign) == (["jazz"], 1)
    both = parse_answer(text, [1], max_interests=5, max_interest_chars=50)
    assert isinstance(both, ParsedAnswer)
    assert (len(both.interests), both.foreign) == (2, 0)
    none = parse_answer(text, [1], max_interests=5, max_interest_chars=50, scripts=frozenset({"ARABIC"}))
    assert isinstance(none, ParseFailure)
    assert "2 in another script" in none.detail
