"""A pool of Ray actors, each with one backend that is kept full: every exemplar exactly once, actors may die.

An actor holds up to a window of exemplars and gives up those that are finished while the others go on: no batch is
waited for, and freed places are filled while the actor works, because two calls are under way to each.

When an actor dies, what it held is under suspicion: it is cut into halves, and each half is answered alone in an actor
until the exemplar that does it stands alone; when that has taken two actors down by itself, it is given up
(`FailureReason.ACTOR_DIED`). So one bad prompt cannot stop the run, and nobody is given up for an accident.

Why not `ray.data.llm` (seen in Ray 2.60): a processor is a stage of a Ray Data pipeline. It can keep the error of one
prompt in its row (`should_continue_on_error`), but a prompt that takes its engine down makes the actor exit and is sent
again together with its batch, each time. There is no place in it for a second question about the same row (the ladder),
for committing rows while their batch is under way, nor for a cache; what is left of it is the actor pool below.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from distributed_mi.core.errors import DistributedMIError, StageError
from distributed_mi.interests.backends.base import BackendContext, BackendDeadError, Response
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar
from distributed_mi.interests.ladder import Attempt, Climber, Ladder, Outcome
from distributed_mi.interests.parse import FailureReason

logger = logging.getLogger(__name__)

POLL_S = 5.0
"""Longest wait before time limits, and the number of actors, are looked at again."""
WAITING_LOG_S = 30.0
"""Seconds between two lines about actors that have not started."""
CALL_S = 0.2
"""An actor gives up what is finished after about so long; sooner when half of its window is free."""
CALLS = 2
"""Calls under way to an actor: one that it works on, one that brings more."""
DEATHS_ALONE = 2
"""Actors that an exemplar must take down by itself before it is given up."""
_DEATHS = (RayActorError, WorkerCrashedError, OutOfMemoryError, BackendDeadError)


@dataclass(eq=False)
class Job:
    """One exemplar to answer."""

    exemplar: Exemplar
    known: Mapping[str, Response] = field(default_factory=dict)
    """Responses that a cache has for it, by the hash of the request."""
    deaths: int = 0
    """Actors that died while it was alone in them."""


class _Engine:
    """The actor. The backend is made in `start`, so that what goes wrong there arrives as the exception it is."""

    def __init__(self, config: InterestsConfig, context: BackendContext) -> None:
        self._config, self._context = config, context
        self._climber: Climber | None = None

    def start(self) -> tuple[int, float, int]:
        """Load the backend; returns the process id, the seconds it took, and the exemplars it wants at a time."""
        started = time.monotonic()
        choice = self._config.backend
        backend = choice.resolve()(choice.settings("interests.backend"), self._context)
        self._climber = Climber(Ladder(choice, self._config, self._context), backend)
        return os.getpid(), time.monotonic() - started, backend.window

    def work(self, jobs: Sequence[tuple[Exemplar, Mapping[str, Response]]], window: int) -> list[Outcome]:
        """Take in exemplars and work on what is held until some are finished; [] when none is held."""
        if self._climber is None:
            raise BackendDeadError("the actor has no backend")
        for exemplar, known in jobs:
            self._climber.add(exemplar, known)
        started, finished = time.monotonic(), self._climber.advance()
        while (
            self._climber.held
            and (not finished or self._climber.held > window // 2)
            and (not finished or time.monotonic() - started < CALL_S)
        ):
            finished += self._climber.advance()
        return finished


@dataclass(eq=False)
class _Seat:
    """One actor, what it holds, and the calls under way to it, oldest first."""

    handle: Any
    starting: Any
    pid: int | None = None
    window: int = 0
    held: dict[int, Job] = field(default_factory=dict)
    calls: deque[Any] = field(default_factory=deque)
    suspect: bool = False
    """Whether what it holds is under suspicion; then nothing is added to it."""
    since: float = field(default_factory=time.monotonic)
    began: float | None = None
    """When it began to load its backend."""

    @property
    def seconds(self) -> float:
        """For how long it has had its resources."""
        return time.monotonic() - self.began if self.began is not None else 0.0

    @property
    def head(self) -> Any:
        """The reference whose completion is the actor's next news; None when it is idle."""
        if self.pid is None:
            return self.starting
        return self.calls[0] if self.calls else None


class ActorPool:
    """Answers exemplars on actors; one `run` at a time."""

    def __init__(self, config: InterestsConfig, context: BackendContext) -> None:
        self.config, self.context = config, context
        counts = config.num_actors
        self.least, self.most = counts if isinstance(counts, tuple) else (counts, counts)
        self.restarts = 0
        """Actors that died and were replaced."""
        self._ended_seconds = 0.0
        """Of actors that are gone."""
        self._barren = 0
        """Deaths since the last answer."""
        self._seats: list[_Seat] = []
        self._waiting: deque[Job] = deque()
        self._suspects: deque[list[Job]] = deque()
        self._given_up: list[Outcome] = []
        self._waiting_logged = 0.0

    @property
    def pids(self) -> list[int]:
        """Process ids of the actors that have started."""
        return [s.pid for s in self._seats if s.pid is not None]

    @property
    def engine_seconds(self) -> float:
        """Seconds for which actors had their resources, loading included, summed over actors."""
        return self._ended_seconds + sum(s.seconds for s in self._seats)

    @property
    def state(self) -> str:
        """What the actors do, for a progress bar."""
        ready = len(self.pids)
        if ready < len(self._seats):
            return f"{ready} of {len(self._seats)} engines ready"
        return f"{ready} engines" if ready > 1 else ""

    def run(self, jobs: Sequence[Job]) -> Generator[list[Outcome]]:
        """Answer every exemplar; yields what is finished, each exemplar once, and [] now and then.

        Args:
            jobs: sent in this order.

        Raises:
            StageError: the backend cannot start, no actor could be placed in time, or too many actors died.
        """
        self._waiting, self._suspects, self._given_up = deque(jobs), deque(), []
        left = len(jobs)
        try:
            self._seats = [self._new_seat() for _ in range(min(self.least, left))]
            while left:
                self._send()
                finished = self._news()
                finished += self._given_up
                self._given_up = []
                left -= len(finished)
                yield finished
        finally:
            for seat in list(self._seats):
                self._end(seat)

    def _new_seat(self) -> _Seat:
        choice = self.config.backend
        backend, settings = choice.resolve(), choice.settings("interests.backend")
        options = {"max_restarts": 0, "max_task_retries": 0, **backend.ray_actor_options(settings)}
        actor = ray.remote(_Engine).options(runtime_env=backend.runtime_env(settings), **options)
        handle: Any = actor.remote(self.config, self.context)
        return _Seat(handle, handle.start.remote())

    def _end(self, seat: _Seat) -> None:
        ray.kill(seat.handle)
        self._ended_seconds += seat.seconds
        self._seats.remove(seat)

    def _send(self) -> None:
        """Fill the windows of started actors; suspects first, alone, to those that are idle."""
        for seat in self._seats:
            if seat.pid is None:
                continue
            jobs: list[Job] = []
            if not seat.held:
                seat.suspect = False
                if self._suspects and not seat.calls:
                    jobs, seat.suspect = self._suspects.popleft(), True
            if not seat.suspect:
                room = seat.window - len(seat.held)
                while self._waiting and len(jobs) < room and len(seat.calls) < CALLS:
                    jobs.append(self._waiting.popleft())
            if jobs or (seat.held and not seat.calls):
                if not seat.calls:
                    seat.since = time.monotonic()
                seat.held.update((j.exemplar.user_index, j) for j in jobs)
                batch = [(j.exemplar, j.known) for j in jobs]
                seat.calls.append(seat.handle.work.remote(batch, seat.window))

    def _news(self) -> list[Outcome]:
        """What actors report; after a while without any, those over their time limit are replaced."""
        heads = {s.head: s for s in self._seats if s.head is not None}
        done, _ = ray.wait(list(heads), num_returns=1, timeout=POLL_S)
        finished = [o for ref in done for o in self._take(heads[ref])]
        if not done:
            self._check_time()
        self._scale()
        return finished

    def _take(self, seat: _Seat) -> list[Outcome]:
        """Use what a seat reports: it has started, answered, or died."""
        try:
            value = ray.get(seat.head)
        except _DEATHS as error:
            self._replace(seat, str(error).splitlines()[0] if str(error) else type(error).__name__)
            return []
        except (RuntimeEnvSetupError, ActorUnschedulableError) as error:
            raise StageError(f"no actor for backend {self.config.backend.name}: {error}") from error
        except RayTaskError as error:
            self._explain(error, starting=seat.pid is None)
        seat.since = time.monotonic()
        if seat.pid is None:
            seat.pid, seconds, window = value
            seat.window = self.config.in_flight or window
            seat.began = seat.since - seconds
            logger.info(
                "backend %s started in %.1f s, process %d", self.config.backend.name, seconds, seat.pid
            )
            return []
        seat.calls.popleft()
        finished: list[Outcome] = value
        for outcome in finished:
            del seat.held[outcome.user_index]
        if finished:
            self._barren = 0
        return finished

    def _explain(self, error: RayTaskError, *, starting: bool) -> None:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, DistributedMIError):
            raise cause from error
        what = "could not start" if starting else "failed outside of a prompt"
        raise StageError(f"backend {self.config.backend.name} {what} on an actor: {cause!r}") from error

    def _replace(self, seat: _Seat, why: str) -> None:
        """Take back what a dead actor held and seat a new one."""
        self.restarts += 1
        self._barren += 1
        held = list(seat.held.values())
        logger.warning(
            "an actor of backend %s died (process %s, %d exemplars are sent again): %s",
            self.config.backend.name,
            seat.pid,
            len(held),
            why,
        )
        if self._barren > self.config.max_actor_restarts:
            raise StageError(
                f"{self._barren} actors of backend {self.config.backend.name} died without an answer in between; "
                f"the limit is interests.max_actor_restarts = {self.config.max_actor_restarts}. Last reason: "
                f"{why}. What is committed is kept: run the same command again to go on."
            )
        self._suspect(held)
        ray.kill(seat.handle)
        self._ended_seconds += seat.seconds
        self._seats[self._seats.index(seat)] = self._new_seat()

    def _suspect(self, held: list[Job]) -> None:
        """Halve what a dead actor held; give up who was alone in it for the second time."""
        if len(held) > 1:
            middle = len(held) // 2
            self._suspects.extendleft((held[middle:], held[:middle]))
            return
        for job in held:
            job.deaths += 1
            if job.deaths < DEATHS_ALONE:
                self._suspects.appendleft([job])
                continue
            user = job.exemplar.user_index
            attempt = Attempt(
                "first", FailureReason.ACTOR_DIED, f"{job.deaths} actors died on this prompt alone"
            )
            self._given_up.append(Outcome(user, attempts=(attempt,)))
            self._barren = 0  # it was the prompt
            logger.warning("user %d is given up: %s", user, attempt.detail)

    def _scale(self) -> None:
        """More actors while those that are there have more than they can hold; fewer when some idle."""
        if self.least == self.most or any(s.pid is None for s in self._seats):
            return
        idle = [s for s in self._seats if not s.held and not s.calls]
        if idle and not self._waiting and not self._suspects:
            for seat in idle[: max(0, len(self._seats) - self.least)]:
                self._end(seat)
        elif len(self._seats) < self.most and len(self._waiting) > sum(s.window for s in self._seats):
            choice = self.config.backend
            wanted = choice.resolve().ray_actor_options(choice.settings("interests.backend"))
            free = ray.available_resources()
            if all(
                free.get(name, 0) >= wanted.get(option, 0)
                for option, name in (("num_cpus", "CPU"), ("num_gpus", "GPU"))
            ):
                self._seats.append(self._new_seat())

    def _check_time(self) -> None:
        now = time.monotonic()
        for seat in list(self._seats):
            if seat.pid is not None and seat.calls and now - seat.since > self.config.answer_timeout_s:
                self._replace(seat, f"no answer in {self.config.answer_timeout_s:g} s")
        slow = [s for s in self._seats if s.pid is None]
        if slow and now - self._waiting_logged > WAITING_LOG_S:
            if self._waiting_logged:
                logger.warning("waiting for %d of %d actors: %s", len(slow), len(self._seats), self._needs())
            self._waiting_logged = now
        if len(slow) == len(self._seats) and all(now - s.since > self.config.start_timeout_s for s in slow):
            raise StageError(
                f"no actor of backend {self.config.backend.name} started in {self.config.start_timeout_s:g} s: "
                f"{self._needs()}. Lower the resources of interests.backend, add nodes, or raise "
                "interests.start_timeout_s."
            )
        for seat in slow:
            if len(self._seats) > self.least and now - seat.since > self.config.start_timeout_s:
                self._end(seat)  # the room that was seen for one more is gone

    def _needs(self) -> str:
        choice = self.config.backend
        wanted = choice.resolve().ray_actor_options(choice.settings("interests.backend"))
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        return f"each asks for {wanted}, free are {free}"
