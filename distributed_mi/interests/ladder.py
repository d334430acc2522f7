"""What is tried for one exemplar until there is a usable answer, without Ray: it runs in the driver or inside an actor.

    first            the whole prompt, `max_answer_tokens`
    larger_budget    only after a truncated answer: the same prompt, `larger_answer_tokens`
    shorter_history  after anything unusable: the newest `short_history` items, `larger_answer_tokens`
    keyphrase        the driver answers with the keyphrase backend (`fall_back`); counts as a failure

A truncated answer whose complete interests could be read is used when the larger budget did not help either.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distributed_mi.core.errors import StageError
from distributed_mi.interests.backends.base import (
    Backend,
    BackendContext,
    BackendDeadError,
    Request,
    Response,
)
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar
from distributed_mi.interests.parse import FailureReason, ParsedAnswer, ParseFailure, parse_answer
from distributed_mi.interests.prompts import prompt_hash, render

logger = logging.getLogger(__name__)

FIRST, LARGER_BUDGET, SHORTER_HISTORY, KEYPHRASE = "first", "larger_budget", "shorter_history", "keyphrase"
TRUNCATED = "truncated"
"""Reason of an attempt whose complete interests were kept while more was tried."""
STEPS = (FIRST, LARGER_BUDGET, SHORTER_HISTORY, KEYPHRASE)
"""Values of the column `step` of the table `answers`."""


@dataclass(frozen=True)
class Attempt:
    """One answer that was not used (or a truncated one that was tried again)."""

    step: str
    reason: str
    detail: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of one exemplar, over all steps; `step` is empty while there is no usable answer."""

    user_index: int
    prompt: str = ""
    prompt_hash: str = ""
    answer: str = ""
    backend: str = ""
    model: str = ""
    step: str = ""
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0
    seconds: float = 0.0
    attempts: tuple[Attempt, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether every step was used up."""
        return not self.step


def seen_exemplar(exemplar: Exemplar, step: str, config: InterestsConfig) -> Exemplar:
    """The part of an exemplar's history that stood in the prompt of a step."""
    return exemplar.latest(config.short_history) if step == SHORTER_HISTORY else exemplar


def read_answer(
    text: str, exemplar: Exemplar, step: str, config: InterestsConfig
) -> ParsedAnswer | ParseFailure:
    """Parse the answer of a step against what its prompt showed."""
    shown = seen_exemplar(exemplar, step, config)
    return parse_answer(
        text,
        [i.item_index for i in shown.history],
        max_interests=config.max_interests,
        max_interest_chars=config.max_interest_chars,
    )


@dataclass
class _Progress:
    exemplar: Exemplar
    outcome: Outcome
    partial: Outcome | None = None
    truncated: bool = False
    retries: int = 0
    attempts: list[Attempt] = field(default_factory=list)


class Ladder:
    """Asks one backend, step by step; see the module docstring."""

    def __init__(self, backend: Backend, name: str, config: InterestsConfig, context: BackendContext) -> None:
        self.backend, self.name, self.config, self.context = backend, name, config, context

    def answer(self, exemplars: Sequence[Exemplar]) -> list[Outcome]:
        """Outcomes in the order of `exemplars`; those with `failed` have no usable answer.

        Raises:
            BackendDeadError: the backend has to be started anew; nothing was answered.
        """
        progress = [_Progress(e, self._blank(e)) for e in exemplars]
        self._step(progress, FIRST)
        self._step([p for p in progress if p.outcome.failed and p.truncated and self._may(p)], LARGER_BUDGET)
        self._step([p for p in progress if self._needs_shorter(p)], SHORTER_HISTORY)
        return [self._finish(p) for p in progress]

    def fall_back(self, exemplar: Exemplar, failed: Outcome) -> Outcome:
        """The answer of this ladder's backend in place of a failed one; keeps what the failed one cost."""
        started = time.monotonic()
        request = self._request(exemplar, KEYPHRASE)
        response = self.backend.generate([request])[0]
        return replace(
            failed,
            prompt=request.prompt,
            prompt_hash=self._hash(request),
            answer=response.text,
            backend=self.name,
            model=self.backend.model_id,
            step=KEYPHRASE,
            seconds=failed.seconds + time.monotonic() - started,
        )

    def _may(self, p: _Progress) -> bool:
        return p.retries < self.config.max_retries

    def _needs_shorter(self, p: _Progress) -> bool:
        shorter = len(p.exemplar.history) > self.config.short_history
        return p.outcome.failed and p.partial is None and shorter and self._may(p)

    def _step(self, progress: Sequence[_Progress], step: str) -> None:
        if not progress:
            return
        requests = [self._request(p.exemplar, step) for p in progress]
        started = time.monotonic()
        responses = self._generate(requests)
        seconds = (time.monotonic() - started) / len(requests)
        for p, request, response in zip(progress, requests, responses, strict=True):
            self._judge(p, step, request, response, seconds)

    def _judge(self, p: _Progress, step: str, request: Request, response: Response, seconds: float) -> None:
        """Accept an answer, keep a truncated one, or note why it cannot be used."""
        p.retries += step != FIRST
        p.outcome = replace(
            p.outcome,
            prompt=request.prompt,
            prompt_hash=self._hash(request),
            num_prompt_tokens=p.outcome.num_prompt_tokens + response.num_prompt_tokens,
            num_answer_tokens=p.outcome.num_answer_tokens + response.num_answer_tokens,
            seconds=p.outcome.seconds + seconds,
        )
        if response.error is not None:
            p.attempts.append(Attempt(step, FailureReason.BACKEND_ERROR, response.error))
            p.truncated = False
            return
        parsed = read_answer(response.text, p.exemplar, step, self.config)
        accepted = replace(
            p.outcome,
            answer=response.text,
            backend=self.name,
            model=self.backend.model_id,
            step=KEYPHRASE if self.name == KEYPHRASE else step,
        )
        if isinstance(parsed, ParseFailure):
            p.truncated = response.finish_reason == "length"
            p.attempts.append(Attempt(step, parsed.reason, parsed.detail, response.text[:2000]))
        elif parsed.truncated:
            p.truncated, p.partial = True, accepted
            p.attempts.append(Attempt(step, TRUNCATED, answer=response.text[:2000]))
        else:  # whole JSON, even when it ends on the very last token of the budget
            p.outcome = accepted

    def _finish(self, p: _Progress) -> Outcome:
        outcome = p.outcome
        if outcome.failed and p.partial is not None:
            outcome = replace(
                p.partial,
                num_prompt_tokens=outcome.num_prompt_tokens,
                num_answer_tokens=outcome.num_answer_tokens,
                seconds=outcome.seconds,
            )
        return replace(outcome, attempts=tuple(p.attempts))

    def _generate(self, requests: Sequence[Request]) -> list[Response]:
        """Ask the backend; after an exception ask for each half, so that one bad prompt fails alone."""
        try:
            responses = self.backend.generate(requests)
        except BackendDeadError:
            raise
        except Exception as error:
            if len(requests) == 1:
                user = requests[0].user_index
                logger.warning("backend %s failed on user %d: %r", self.name, user, error)
                return [Response(user, finish_reason="error", error=repr(error))]
            logger.warning("backend %s failed on %d prompts, halving: %r", self.name, len(requests), error)
            middle = len(requests) // 2
            return self._generate(requests[:middle]) + self._generate(requests[middle:])
        if [r.user_index for r in responses] != [r.user_index for r in requests]:
            raise StageError(
                f"backend {self.name} did not answer each of {len(requests)} requests exactly once and in order "
                f"({len(responses)} responses). This is an error in the backend."
            )
        return responses

    def _request(self, exemplar: Exemplar, step: str) -> Request:
        shown = seen_exemplar(exemplar, step, self.config)
        prompt = render(
            self.config.template,
            shown,
            max_interests=self.config.max_interests,
            max_title_chars=self.config.max_title_chars,
        )
        first = step in (FIRST, KEYPHRASE)
        tokens = self.config.max_answer_tokens if first else self.config.larger_answer_tokens
        return Request(shown, prompt, tokens)

    def _hash(self, request: Request) -> str:
        identity: dict[str, Any] = {
            **self.backend.identity,
            "max_answer_tokens": request.max_answer_tokens,
        }
        return prompt_hash(self.config.template, request.prompt, self.context.answer_schema, identity)

    def _blank(self, exemplar: Exemplar) -> Outcome:
        request = self._request(exemplar, FIRST)
        return Outcome(exemplar.user_index, request.prompt, self._hash(request))
