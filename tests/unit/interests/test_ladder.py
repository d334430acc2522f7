"""Steps of the ladder, halving around bad prompts, and what a failure leaves behind."""

from collections import Counter
from typing import Any

import pytest

from distributed_mi.core.errors import StageError
from distributed_mi.interests.backends.base import BackendContext, BackendDeadError, Request, Response
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.ladder import Ladder, Outcome, read_answer
from distributed_mi.interests.parse import ParsedAnswer
from tests.unit.interests.fakes import ScriptedBackend

CONTEXT = BackendContext({"type": "object"}, 20, 120)


def exemplars(count: int, history: int = 6) -> list[Exemplar]:
    return [Exemplar(u, tuple(HistoryItem(i, f"t{i}") for i in range(1, history + 1))) for u in range(count)]


def ladder(*, config: dict[str, Any] | None = None, **script: Any) -> Ladder:
    settings = InterestsConfig(**{"short_history": 3, **(config or {})})
    return Ladder(ScriptedBackend(ScriptedBackend.Config(**script), CONTEXT), "scripted", settings, CONTEXT)


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
    parsed = read_answer(outcome.answer, exemplars(1)[0], outcome.step, asked.config)
    assert isinstance(parsed, ParsedAnswer)
    assert parsed.interests[0].item_indices == (4, 5)
    # The same text at step "first" may cite any of the six, at this step only the three that were shown.
    text = '{"interests": [{"text": "x", "item_ids": [1, 4]}]}'
    cited = [
        read_answer(text, exemplars(1)[0], s, asked.config).interests[0].item_indices
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


def test_a_backend_that_loses_a_request_is_refused() -> None:
    class Forgetful(ScriptedBackend):
        def generate(self, requests: list[Request]) -> list[Response]:  # type: ignore[override]
            return super().generate(requests)[:-1]

    asked = Ladder(Forgetful(Forgetful.Config(), CONTEXT), "forgetful", InterestsConfig(), CONTEXT)
    with pytest.raises(StageError, match="exactly once"):
        asked.answer(exemplars(2))


def test_the_fallback_keeps_what_the_failure_cost() -> None:
    failed = ladder(always_prose=[0]).answer(exemplars(1))[0]
    final = ladder().fall_back(exemplars(1)[0], failed)
    assert final.step == "keyphrase"
    assert (final.num_prompt_tokens, final.num_answer_tokens) == (20, 10)
    assert final.attempts == failed.attempts
    assert final.answer
