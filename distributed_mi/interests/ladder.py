"""What is tried for one exemplar until there is a usable answer, without Ray: it runs in the driver or inside an actor.

    first            the whole prompt, `max_answer_tokens`
    continued        only after a truncated answer, where the backend can: it goes on from where it was cut
    larger_budget    only after a truncated answer: the same prompt, `larger_answer_tokens`
    shorter_history  after anything unusable: the newest `short_history` items, `larger_answer_tokens`
    keyphrase        the driver answers with the keyphrase backend (`fall_back`); counts as a failure

A truncated answer whose complete interests could be read is used when nothing longer came of it.

`Climb` is one exemplar on the ladder: it names the next request and takes the response. It asks nobody itself, so that
responses of a cache can be played to it first, and `Climber` can keep a backend busy with many climbs at a time.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distributed_mi.core.errors import DistributedMIError, StageError
from distributed_mi.interests.backends.base import (
    Backend,
    BackendContext,
    Request,
    Response,
    estimate_tokens,
)
from distributed_mi.interests.config import BackendChoice, InterestsConfig
from distributed_mi.interests.history import Exemplar
from distributed_mi.interests.parse import FailureReason, ParsedAnswer, ParseFailure, parse_answer, script
from distributed_mi.interests.prompts import PromptHasher, render

logger = logging.getLogger(__name__)

FIRST, CONTINUED, LARGER_BUDGET = "first", "continued", "larger_budget"
SHORTER_HISTORY, KEYPHRASE = "shorter_history", "keyphrase"
TRUNCATED = "truncated"
"""Reason of an attempt whose complete interests were kept while more was tried."""
STEPS = (FIRST, CONTINUED, LARGER_BUDGET, SHORTER_HISTORY, KEYPHRASE)
"""Values of the column `step` of the table `answers`."""
_LEAST_BUDGET = 64
"""Tokens that a continued answer gets at least."""


@dataclass(frozen=True)
class Attempt:
    """One answer that was not used (or a truncated one that was tried again)."""

    step: str
    reason: str
    detail: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Reply:
    """What a backend answered to a request, under the request's hash: the entry of a cache."""

    key: str
    step: str
    response: Response
    seconds: float = 0.0


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
    replies: tuple[Reply, ...] = ()
    """What the backend was paid for; replies of a cache are not among them."""

    @property
    def failed(self) -> bool:
        """Whether every step was used up."""
        return not self.step


def seen_exemplar(exemplar: Exemplar, step: str, config: InterestsConfig) -> Exemplar:
    """The part of an exemplar's history that a step's prompt is made of."""
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
        scripts=_scripts(shown, config),
    )


def _scripts(exemplar: Exemplar, config: InterestsConfig) -> frozenset[str] | None:
    """Scripts that interests may be written in: Latin, and those of the titles; any where a language is asked for."""
    if config.template == "language" or not config.same_script:
        return None
    return frozenset({"LATIN", "", *(script(i.title) for i in exemplar.history)})


class Ladder:
    """The steps of one configuration.

    Args:
        choice: backend and its settings; no instance is needed to say what it would be asked.
        config: limits and numbers of tokens.
        context: as the backend's.
    """

    def __init__(self, choice: BackendChoice, config: InterestsConfig, context: BackendContext) -> None:
        self.name, self.config, self.context = choice.name, config, context
        self.backend: type[Backend] = choice.resolve()
        self._settings: Any = choice.settings("interests.backend")
        self.model = self.backend.model_of(self._settings)
        identity = self.backend.identity_of(self._settings)
        self._hash = PromptHasher(config.template, context.answer_schema, identity)
        self._counter: Callable[[str], int] | None = None

    def begin(self, exemplar: Exemplar) -> "Climb":
        """An exemplar at the first step."""
        return Climb(self, exemplar)

    def request(self, exemplar: Exemplar, step: str) -> Request:
        """What a step asks; `continued` asks for more of what it is given."""
        shown = seen_exemplar(exemplar, step, self.config)
        prompt = self._render(shown)
        limit = self.config.max_prompt_tokens
        if limit is not None and self._count(prompt) > limit:
            fewest, most = 1, len(shown.history) - 1  # how many of the newest items fit
            while fewest < most:
                middle = (fewest + most + 1) // 2
                if self._count(self._render(shown.latest(middle))) <= limit:
                    fewest = middle
                else:
                    most = middle - 1
            shown = shown.latest(fewest)
            prompt = self._render(shown)
        first = step in (FIRST, KEYPHRASE)
        tokens = self.config.max_answer_tokens if first else self.config.larger_answer_tokens
        return Request(shown, prompt, tokens)

    def _render(self, exemplar: Exemplar) -> str:
        return render(
            self.config.template,
            exemplar,
            max_interests=self.config.max_interests,
            max_title_chars=self.config.max_title_chars,
            language=self.config.language,
        )

    @property
    def _count(self) -> Callable[[str], int]:
        """Tokens of a prompt; the model's own count where there is one."""
        if self._counter is None:
            self._counter = self.backend.token_counter(self._settings) or estimate_tokens
        return self._counter

    def key(self, request: Request) -> str:
        """Hash of everything that decides the answer to a request."""
        return self._hash(request.prompt, max_answer_tokens=request.max_answer_tokens, prefix=request.prefix)


class Climb:
    """One exemplar on the ladder; `request` is what to ask next, None when there is nothing more to try."""

    def __init__(self, ladder: Ladder, exemplar: Exemplar) -> None:
        self.ladder, self.exemplar = ladder, exemplar
        self.request: Request | None = None
        self.step, self.key = "", ""
        self._partial: Outcome | None = None
        self._text = ""
        """Of the newest truncated answer."""
        self._retries = 0
        self._tried: set[str] = set()
        self._attempts: list[Attempt] = []
        self._replies: list[Reply] = []
        self._spent = 0
        """Tokens of the newest answer."""
        self.known: dict[str, Response] = {}
        """What came from a cache, by the hash of the request."""
        self._outcome = Outcome(exemplar.user_index)
        self._ask(FIRST)

    @property
    def outcome(self) -> Outcome:
        """What came of it so far."""
        outcome = self._outcome
        if outcome.failed and self._partial is not None:
            outcome = replace(
                self._partial,
                num_prompt_tokens=outcome.num_prompt_tokens,
                num_answer_tokens=outcome.num_answer_tokens,
                seconds=outcome.seconds,
            )
        return replace(outcome, attempts=tuple(self._attempts), replies=tuple(self._replies))

    def take(self, response: Response, seconds: float = 0.0, *, cached: bool = False) -> None:
        """Use the response to `request`, or go on to the next step.

        Args:
            response: of the backend, or of a cache.
            seconds: of the backend.
            cached: whether it was there already.
        """
        request, step = self.request, self.step
        assert request is not None
        if cached:
            self.known[self.key] = response
        else:
            self._replies.append(Reply(self.key, step, response, seconds))
        self._spent = response.num_answer_tokens
        self._outcome = replace(
            self._outcome,
            prompt=request.prompt,
            prompt_hash=self.key,
            num_prompt_tokens=self._outcome.num_prompt_tokens + response.num_prompt_tokens,
            num_answer_tokens=self._outcome.num_answer_tokens + response.num_answer_tokens,
            seconds=self._outcome.seconds + seconds,
        )
        truncated = self._judge(request, step, response)
        if self._outcome.failed:
            self._next(truncated)
        else:
            self.request = None

    def _judge(self, request: Request, step: str, response: Response) -> bool:
        """Accept an answer, keep a truncated one, or note why it cannot be used; whether it was truncated."""
        if response.error is not None:
            self._attempts.append(Attempt(step, FailureReason.BACKEND_ERROR, response.error))
            return False
        text = request.prefix + response.text
        parsed = read_answer(text, self.exemplar, step, self.ladder.config)
        accepted = replace(
            self._outcome,
            answer=text,
            backend=self.ladder.name,
            model=self.ladder.model,
            step=KEYPHRASE if self.ladder.name == KEYPHRASE else step,
        )
        if isinstance(parsed, ParseFailure):
            self._attempts.append(Attempt(step, parsed.reason, parsed.detail, text[:2000]))
            self._text = text
            return response.finish_reason == "length"
        if parsed.truncated:
            self._partial, self._text = accepted, text
            self._attempts.append(Attempt(step, TRUNCATED, answer=text[:2000]))
            return True
        self._outcome = accepted  # whole JSON, even when it ends on the very last token of the budget
        return False

    def _next(self, truncated: bool) -> None:
        config, self.request = self.ladder.config, None
        if self._retries >= config.max_retries:
            return
        if truncated and self.step in (FIRST, CONTINUED):
            if self.ladder.backend.can_continue and self.step == FIRST and self._text:
                self._ask(CONTINUED)
            else:
                self._ask(LARGER_BUDGET)
        elif (
            self._partial is None
            and SHORTER_HISTORY not in self._tried
            and len(self.exemplar.history) > config.short_history
        ):
            self._ask(SHORTER_HISTORY)

    def _ask(self, step: str) -> None:
        self._retries += step != FIRST
        self._tried.add(step)
        request = self.ladder.request(self.exemplar, step)
        if step == CONTINUED:
            left = max(request.max_answer_tokens - self._spent, _LEAST_BUDGET)
            request = replace(request, prefix=self._text, max_answer_tokens=left)
        self.step, self.request, self.key = step, request, self.ladder.key(request)
        if step == FIRST:
            self._outcome = replace(self._outcome, prompt=request.prompt, prompt_hash=self.key)


class Climber:
    """Keeps one backend busy with climbs.

    Args:
        ladder: whose climbs they are.
        backend: answers.
    """

    def __init__(self, ladder: Ladder, backend: Backend) -> None:
        self.ladder, self.backend = ladder, backend
        self._climbs: dict[int, Climb] = {}
        self._done: list[Outcome] = []

    @property
    def held(self) -> int:
        """Exemplars under way, and finished ones that were not given up yet."""
        return len(self._climbs) + len(self._done)

    def add(self, exemplar: Exemplar, known: Mapping[str, Response] | None = None) -> None:
        """Begin with an exemplar.

        Args:
            exemplar: not under way yet.
            known: responses by the hash of the request, from a cache.

        Raises:
            StageError: it is under way already.
        """
        if exemplar.user_index in self._climbs:
            raise StageError(f"user {exemplar.user_index} is under way already")
        climb = self.ladder.begin(exemplar)
        play(climb, known or {})
        self._move(climb)

    def advance(self) -> list[Outcome]:
        """Wait until something is answered; the exemplars that are finished, [] when none is or none is under way.

        Raises:
            BackendDeadError: the backend has to be started anew; what was under way is lost.
            StageError: the backend answered what it was not asked.
        """
        if self._climbs and not self._done:
            started = time.monotonic()
            responses = self.backend.collect()
            seconds = (time.monotonic() - started) / max(len(responses), 1)
            for response in responses:
                climb = self._climbs.pop(response.user_index, None)
                if climb is None:
                    raise StageError(
                        f"backend {self.ladder.name} answered for user {response.user_index}, who was not asked "
                        "for. This is an error in the backend."
                    )
                climb.take(response, seconds)
                self._move(climb)
        done, self._done = self._done, []
        return done

    def answer(self, exemplars: Sequence[Exemplar]) -> list[Outcome]:
        """Outcomes in the order of `exemplars`; those with `failed` have no usable answer."""
        waiting, found = iter(exemplars), dict[int, Outcome]()
        window, more = self.backend.window, True
        while more or self.held:
            while more and self.held < window:
                exemplar = next(waiting, None)
                more = exemplar is not None
                if exemplar is not None:
                    self.add(exemplar)
            found.update((o.user_index, o) for o in self.advance())
        return [found[e.user_index] for e in exemplars]

    def fall_back(self, exemplar: Exemplar, failed: Outcome) -> Outcome:
        """The answer of this backend in place of a failed one; keeps what the failed one cost."""
        started = time.monotonic()
        request = self.ladder.request(exemplar, KEYPHRASE)
        response = self.backend.generate([request])[0]
        return replace(
            failed,
            prompt=request.prompt,
            prompt_hash=self.ladder.key(request),
            answer=response.text,
            backend=self.ladder.name,
            model=self.ladder.model,
            step=KEYPHRASE,
            seconds=failed.seconds + time.monotonic() - started,
        )

    def _move(self, climb: Climb) -> None:
        """Ask what a climb wants to ask next, or give it up as done; a request that is not taken in fails alone."""
        while climb.request is not None:
            user = climb.exemplar.user_index
            try:
                self.backend.submit(climb.request)
            except DistributedMIError:  # of the backend or of the run, not of this prompt
                raise
            except Exception as error:
                logger.warning("backend %s did not take in user %d: %r", self.ladder.name, user, error)
                climb.take(Response(user, finish_reason="error", error=repr(error)))
                continue
            self._climbs[user] = climb
            return
        self._done.append(climb.outcome)


def play(climb: Climb, known: Mapping[str, Response]) -> int:
    """Take from a cache what it has; returns how many responses that were."""
    played = 0
    while climb.request is not None and climb.key in known:
        climb.take(replace(known[climb.key], user_index=climb.exemplar.user_index), cached=True)
        played += 1
    return played


def needed(climbs: Iterable[Climb]) -> list[str]:
    """Hashes of the requests that climbs wait for."""
    return list(dict.fromkeys(c.key for c in climbs if c.request is not None))
