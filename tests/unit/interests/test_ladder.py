"""Steps of the ladder, halving around bad prompts, and what a failure leaves behind."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from distributed_mi.core.errors import StageError
from distributed_mi.interests.backends.base import (
    BackendContext,
    BackendDeadError,
    Request,
    Response,
    estimate_tokens,
)
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.ladder import Climber, Ladder, Outcome, Reply, needed, play, read_answer
from distributed_mi.interests.parse import ParsedAnswer
from tests.unit.interests.fakes import SCRIPTED, ScriptedBackend

CONTEXT = BackendContext({"type": "object"}, 20, 120)


def exemplars(count: int, history: int = 6) -> list[Exemplar]:
    return [Exemplar(u, tuple(HistoryItem(i, f"t{i}") for i in range(1, history + 1))) for u in range(count)]


def ladder(*, config: dict[str, Any] | None = None, backend: str = SCRIPTED, **script: Any) -> Climber:
    settings = InterestsConfig(backend={"name": backend, **script}, **{"short_history": 3, **(config or {})})
    choice = settings.backend
    made = choice.resolve()(choice.settings(), CONTEXT)
    return Climber(Ladder(choice, settings, CONTEXT), made)


def reasons(outcome: Outcome) -> list[tuple[str, str]]:
    return [(a.step, str(a.reason)) for a in outcome.attempts]


def test_good_answers_need_one_call() -> None:
    asked = ladder()
    outcomes = asked.answer(exemplars(5))
    assert asked.backend.calls == [[0, 1, 2, 3, 4]]  # type: ignore[attr-defined]
    assert [o.user_index for o in outcomes] == [0, 1, 2, 3, 4]
    assert {o.step for o in outcomes} == {"first"}
    assert {(o.num_prompt_tokens, o.num_answer_tokens, o.model) for o in outcomes} == {(10, 5, "scripted-1")}
    assert not any(o.attempts for o in outcomes)


@pytest.mark.parametrize(
    ("script", "step", "tried", "prompt_tokens"),
    [
        ({"truncate": [1]}, "larger_budget", [("first", "truncated")], 20),
        (
            {"always_truncate": [1]},
            "larger_budget",
            [("first", "truncated"), ("larger_budget", "truncated")],
            20,
        ),
        ({"prose": [1]}, "shorter_history", [("first", "not_json")], 20),
        ({"refuse": [1]}, "shorter_history", [("first", "backend_error")], 19),
        ({"always_prose": [1]}, "", [("first", "not_json"), ("shorter_history", "not_json")], 20),
        ({"none": [1]}, "first", [], 10),
    ],
)
def test_each_step_is_reached_and_recorded(
    script: dict, step: str, tried: list[tuple[str, str]], prompt_tokens: int
) -> None:
    outcomes = ladder(**script).answer(exemplars(3))
    assert [o.step for o in outcomes] == ["first", step, "first"]
    assert reasons(outcomes[1]) == tried
    assert outcomes[1].num_prompt_tokens == prompt_tokens


def test_the_shorter_prompt_is_stored_and_its_answer_is_read_against_it() -> None:
    asked = ladder(prose=[0])
    outcome = asked.answer(exemplars(1))[0]
    assert '"t4" (4), "t5" (5), "t6" (6)' in outcome.prompt
    assert '"t3"' not in outcome.prompt
    parsed = read_answer(outcome.answer, exemplars(1)[0], outcome.step, asked.ladder.config)
    assert isinstance(parsed, ParsedAnswer)
    assert parsed.interests[0].item_indices == (4, 5)
    # The same text at step "first" may cite any of the six, at this step only the three that were shown.
    text = '{"interests": [{"text": "x", "item_ids": [1, 4]}]}'
    cited = [
        read_answer(text, exemplars(1)[0], s, asked.ladder.config).interests[0].item_indices
        for s in ("first", outcome.step)
    ]  # type: ignore[union-attr]
    assert cited == [(1, 4), (4,)]


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_no_more_retries_than_allowed(retries: int) -> None:
    asked = ladder(config={"max_retries": retries}, always_prose=[0], always_truncate=[1], truncate=[2])
    outcomes = asked.answer(exemplars(3))
    calls = Counter(u for users in asked.backend.calls for u in users)  # type: ignore[attr-defined]
    assert calls[0] == 1 + min(retries, 1)  # a larger budget is not for answers that were whole
    assert calls[1] == 1 + min(retries, 1)  # its complete interests are kept
    assert (
        [o.step for o in outcomes] == ["", "first", "first"]
        if retries == 0
        else ["", "larger_budget", "larger_budget"]
    )


def test_a_short_history_is_not_asked_for_twice() -> None:
    asked = ladder(always_prose=[0])
    assert asked.answer(exemplars(1, history=3))[0].failed
    assert asked.backend.calls == [[0]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("poison", [[0], [7], [3, 4], list(range(8))])
def test_a_bad_prompt_fails_alone(poison: list[int]) -> None:
    outcomes = ladder(config={"max_retries": 0}, poison=poison).answer(exemplars(8))
    assert [o.user_index for o in outcomes if o.failed] == poison
    for o in outcomes:
        if o.failed:
            assert reasons(o) == [("first", "backend_error")]
            assert "bad prompt" in o.attempts[0].detail


def test_halving_takes_few_calls() -> None:
    asked = ladder(config={"max_retries": 0}, poison=[5])
    asked.answer(exemplars(64))
    # 64 -> 2 x 32 -> ... -> 2 x 1: one whole call, then two for each of six levels.
    assert len(asked.backend.calls) == 13  # type: ignore[attr-defined]


def test_a_dead_engine_is_not_taken_for_a_bad_prompt() -> None:
    asked = ladder(dead=[2])
    with pytest.raises(BackendDeadError):
        asked.answer(exemplars(4))
    assert len(asked.backend.calls) == 1  # type: ignore[attr-defined]


class Forgetful(ScriptedBackend):
    """Loses the last request of each batch."""

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        return super().generate(requests)[:-1]


class Confused(ScriptedBackend):
    """Answers for somebody who was not asked for."""

    def collect(self) -> list[Response]:
        return [Response(99, "{}")]


@pytest.mark.parametrize(("name", "message"), [("Forgetful", "exactly once"), ("Confused", "not asked for")])
def test_a_backend_that_loses_or_invents_a_request_is_refused(name: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        ladder(backend=f"tests.unit.interests.test_ladder:{name}").answer(exemplars(2))


class Continuing(ScriptedBackend):
    """Goes on from a truncated answer, at most ten characters further."""

    can_continue = True

    def _respond(self, request: Request) -> Response:
        if not request.prefix:
            return super()._respond(request)
        whole = super()._respond(replace(request, max_answer_tokens=10_000)).text
        rest = whole[len(request.prefix) :]
        if request.user_index in self.config.always_truncate:
            return Response(request.user_index, "", 10, 7, finish_reason="length")
        return Response(request.user_index, rest, 10, 7)


def test_a_truncated_answer_is_continued_from_where_it_was_cut() -> None:
    asked = ladder(backend="tests.unit.interests.test_ladder:Continuing", truncate=[1], always_truncate=[2])
    outcomes = asked.answer(exemplars(3))
    assert [o.step for o in outcomes] == ["first", "continued", "larger_budget"]
    assert reasons(outcomes[1]) == [("first", "truncated")]
    assert json.loads(outcomes[1].answer)["interests"][1]["text"] == "second"
    assert outcomes[1].num_answer_tokens == 12
    assert reasons(outcomes[2]) == [
        ("first", "truncated"),
        ("continued", "truncated"),
        ("larger_budget", "truncated"),
    ]
    first, continued = outcomes[1].replies
    assert (first.step, continued.step) == ("first", "continued")
    assert first.key != continued.key


def test_cached_replies_are_played_down_the_whole_ladder() -> None:
    script: dict[str, Any] = {"truncate": [1], "prose": [2], "refuse": [3]}
    asked = ladder(**script)
    outcomes = asked.answer(exemplars(5))
    replies: list[Reply] = [r for o in outcomes for r in o.replies]
    assert len(replies) == 8
    known = {r.key: r.response for r in replies}
    climbs = [asked.ladder.begin(e) for e in exemplars(5)]
    # equal prompts have equal hashes, whoever asks: here all five
    assert len(needed(climbs)) == 1
    climb = climbs[1]
    assert play(climb, {outcomes[1].replies[0].key: outcomes[1].replies[0].response}) == 1
    assert climb.request is not None
    assert climb.step == "larger_budget"
    assert climb.key in known
    assert play(climb, known) == 1
    played = climb.outcome
    assert played.replies == ()
    assert (played.answer, played.step, played.prompt_hash) == (
        outcomes[1].answer,
        outcomes[1].step,
        outcomes[1].prompt_hash,
    )
    calls = len(asked.backend.calls)  # type: ignore[attr-defined]
    other = Climber(asked.ladder, asked.backend)
    other.add(exemplars(5)[4], {outcomes[4].replies[0].key: outcomes[4].replies[0].response})
    assert [o.step for o in other.advance()] == ["first"]
    assert len(asked.backend.calls) == calls  # type: ignore[attr-defined]


class Picky(ScriptedBackend):
    """Does not take in whole histories of user 1."""

    def submit(self, request: Request) -> None:
        if request.user_index == 1 and len(request.exemplar.history) > 3:
            raise TypeError("no such text")
        super().submit(request)


def test_a_request_that_is_not_taken_in_fails_alone() -> None:
    outcomes = ladder(backend="tests.unit.interests.test_ladder:Picky").answer(exemplars(3))
    assert [o.step for o in outcomes] == ["first", "shorter_history", "first"]
    assert reasons(outcomes[1]) == [("first", "backend_error")]
    assert "no such text" in outcomes[1].attempts[0].detail
    alone = ladder(backend="tests.unit.interests.test_ladder:Picky", config={"max_retries": 0})
    assert [o.failed for o in alone.answer(exemplars(3))] == [False, True, False]


def test_what_is_under_way_cannot_be_added_again() -> None:
    asked = ladder()
    asked.add(exemplars(1)[0])
    with pytest.raises(StageError, match="under way"):
        asked.add(exemplars(1)[0])
    assert asked.held == 1
    assert [o.user_index for o in asked.advance()] == [0]
    assert (asked.held, asked.advance()) == (0, [])


def test_a_prompt_is_cut_from_the_oldest_side_to_its_budget() -> None:
    whole = ladder().ladder.request(exemplars(1, history=40)[0], "first").prompt
    limit = estimate_tokens(whole) - 60
    asked = ladder(config={"max_prompt_tokens": limit}).ladder
    request = asked.request(exemplars(1, history=40)[0], "first")
    shown = [i.item_index for i in request.exemplar.history]
    assert shown == list(range(41 - len(shown), 41))
    assert 1 < len(shown) < 40
    assert estimate_tokens(request.prompt) <= limit
    one_more = asked.request(exemplars(1, history=40)[0].latest(len(shown) + 1), "first")
    assert one_more.prompt == request.prompt
    # a budget that not even one item fits in still asks about the newest
    tiny = ladder(config={"max_prompt_tokens": 5}).ladder.request(exemplars(1)[0], "first")
    assert [i.item_index for i in tiny.exemplar.history] == [6]


def test_the_fallback_keeps_what_the_failure_cost() -> None:
    failed = ladder(always_prose=[0]).answer(exemplars(1))[0]
    final = ladder().fall_back(exemplars(1)[0], failed)
    assert final.step == "keyphrase"
    assert (final.num_prompt_tokens, final.num_answer_tokens) == (20, 10)
    assert final.attempts == failed.attempts
    assert final.answer
