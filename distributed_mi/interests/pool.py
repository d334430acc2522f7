"""A pool of Ray actors, each with one backend: bounded work in flight, every exemplar exactly once, actors may die.

A task is one shard's exemplars. When an actor dies, its tasks are sent to others and a new actor takes its place. The
task that it was working on is sent once more as it is; when that kills a second actor, it is halved until the exemplar
that does it stands alone and is given up (`FailureReason.ACTOR_DIED`), so that one bad prompt cannot stop the run.

The oldest task without an answer need not be the one that killed the actor: an answer that was made just before is lost
with the process. A task that is under suspicion is therefore alone in its actor until it is cleared.
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
from distributed_mi.interests.backends.base import BackendContext, BackendDeadError
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar
from distributed_mi.interests.ladder import Attempt, Ladder, Outcome
from distributed_mi.interests.parse import FailureReason

logger = logging.getLogger(__name__)

POLL_S = 5.0
"""Longest wait before time limits are looked at again."""
WAITING_LOG_S = 30.0
"""Seconds between two lines about actors that have not started."""
_DEATHS = (RayActorError, WorkerCrashedError, OutOfMemoryError, BackendDeadError)


class _Engine:
    """The actor. The backend is made in `start`, so that what goes wrong there arrives as the exception it is."""

    def __init__(self, config: InterestsConfig, context: BackendContext) -> None:
        self._config, self._context = config, context
        self._ladder: Ladder | None = None

    def start(self) -> tuple[int, float]:
        """Load the backend; returns the process id and the seconds it took."""
        started = time.monotonic()
        choice = self._config.backend
        backend = choice.resolve()(choice.settings("interests.backend"), self._context)
        self._ladder = Ladder(backend, choice.name, self._config, self._context)
        return os.getpid(), time.monotonic() - started

    def answer(self, exemplars: Sequence[Exemplar]) -> list[Outcome]:
        """Climb the ladder for each exemplar."""
        if self._ladder is None:
            raise BackendDeadError("the actor has no backend")
        return self._ladder.answer(exemplars)


@dataclass(frozen=True)
class _Task:
    key: int
    exemplars: tuple[Exemplar, ...]
    deaths: int = 0
    """Actors that died while this was their oldest task, or one that it was cut from."""

    @property
    def suspect(self) -> bool:
        return self.deaths > 0


@dataclass(eq=False)
class _Seat:
    """One actor and the tasks it was given, oldest first; it works on the oldest."""

    handle: Any
    starting: Any
    pid: int | None = None
    tasks: deque[tuple[Any, _Task]] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)

    @property
    def head(self) -> Any:
        """The reference whose completion is the actor's next news; None when it is idle."""
        if self.pid is None:
            return self.starting
        return self.tasks[0][0] if self.tasks else None

    def takes(self, task: _Task, in_flight: int) -> bool:
        """Whether the task may join those that the actor has."""
        if self.pid is None:
            return False
        alone = task.suspect or any(t.suspect for _, t in self.tasks)
        return len(self.tasks) < (1 if alone else in_flight)


class ActorPool:
    """Answers chunks of exemplars on `num_actors` actors; one `run` at a time."""

    def __init__(self, config: InterestsConfig, context: BackendContext) -> None:
        self.config, self.context = config, context
        self.restarts = 0
        """Actors that died and were replaced."""
        self._seats: list[_Seat] = []
        self._waiting: deque[_Task] = deque()
        self._answers: dict[int, dict[int, Outcome]] = {}
        self._waiting_logged = 0.0

    @property
    def pids(self) -> list[int]:
        """Process ids of the actors that have started."""
        return [s.pid for s in self._seats if s.pid is not None]

    def run(self, chunks: Mapping[int, Sequence[Exemplar]]) -> Generator[tuple[int, list[Outcome]]]:
        """Answer every chunk; yields each once, in the order in which they are finished.

        Args:
            chunks: key -> exemplars. Outcomes come back in the same order inside a chunk.

        Raises:
            StageError: the backend cannot start, no actor could be placed in time, or too many actors died.
        """
        self._waiting = deque(_Task(key, tuple(e)) for key, e in chunks.items())
        self._answers = {key: {} for key in chunks}
        left = dict(chunks)
        try:
            self._seats = [self._new_seat() for _ in range(min(self.config.num_actors, len(left)))]
            while left:
                self._send()
                for seat in self._with_news():
                    self._take(seat)
                for key in [k for k, e in left.items() if len(self._answers[k]) == len(e)]:
                    answers = self._answers.pop(key)
                    yield key, [answers[e.user_index] for e in left.pop(key)]
        finally:
            for seat in self._seats:
                ray.kill(seat.handle)
            self._seats = []

    def _new_seat(self) -> _Seat:
        choice = self.config.backend
        backend, settings = choice.resolve(), choice.settings("interests.backend")
        options = {"max_restarts": 0, "max_task_retries": 0, **backend.ray_actor_options(settings)}
        actor = ray.remote(_Engine).options(runtime_env=backend.runtime_env(settings), **options)
        handle: Any = actor.remote(self.config, self.context)
        return _Seat(handle, handle.start.remote())

    def _send(self) -> None:
        """Give waiting tasks to started actors, up to the window, the least busy first; suspects alone."""
        while self._waiting:
            task = self._waiting[0]
            free = [s for s in self._seats if s.takes(task, self.config.in_flight)]
            if not free:
                return
            seat = min(free, key=lambda s: len(s.tasks))
            self._waiting.popleft()
            if not seat.tasks:
                seat.since = time.monotonic()
            seat.tasks.append((seat.handle.answer.remote(task.exemplars), task))

    def _with_news(self) -> list[_Seat]:
        """Seats whose head is done; after a while without any, those over their time limit are replaced."""
        heads = {s.head: s for s in self._seats if s.head is not None}
        done, _ = ray.wait(list(heads), num_returns=1, timeout=POLL_S)
        if not done:
            self._check_time()
        return [heads[r] for r in done]

    def _take(self, seat: _Seat) -> None:
        """Use what a seat reports: it has started, answered, or died."""
        try:
            value = ray.get(seat.head)
        except _DEATHS as error:
            self._replace(seat, str(error).splitlines()[0] if str(error) else type(error).__name__)
            return
        except (RuntimeEnvSetupError, ActorUnschedulableError) as error:
            raise StageError(f"no actor for backend {self.config.backend.name}: {error}") from error
        except RayTaskError as error:
            self._explain(error, starting=seat.pid is None)
        if seat.pid is None:
            seat.pid, seconds = value
            seat.since = time.monotonic()
            logger.info(
                "backend %s started in %.1f s, process %d", self.config.backend.name, seconds, seat.pid
            )
            return
        _, task = seat.tasks.popleft()
        seat.since = time.monotonic()
        self._answers[task.key].update((o.user_index, o) for o in value)

    def _explain(self, error: RayTaskError, *, starting: bool) -> None:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, DistributedMIError):
            raise cause from error
        what = "could not start" if starting else "failed outside of a prompt"
        raise StageError(f"backend {self.config.backend.name} {what} on an actor: {cause!r}") from error

    def _replace(self, seat: _Seat, why: str) -> None:
        """Send a dead actor's tasks back and seat a new one."""
        self.restarts += 1
        logger.warning(
            "an actor of backend %s died (process %s, %d tasks sent again): %s",
            self.config.backend.name,
            seat.pid,
            len(seat.tasks),
            why,
        )
        if self.restarts > self.config.max_actor_restarts:
            raise StageError(
                f"{self.restarts} actors of backend {self.config.backend.name} died; the limit is "
                f"interests.max_actor_restarts = {self.config.max_actor_restarts}. Last reason: {why}. What is "
                "committed is kept: run the same command again to go on."
            )
        ray.kill(seat.handle)
        tasks = [t for _, t in seat.tasks]
        again = self._after_death(tasks[0]) + tasks[1:] if tasks else []
        self._waiting.extendleft(reversed(again))
        self._seats[self._seats.index(seat)] = self._new_seat()

    def _after_death(self, task: _Task) -> list[_Task]:
        """What to send after an actor died on a task: the same, then halves, then nothing."""
        deaths = task.deaths + 1
        if deaths < 2:
            return [_Task(task.key, task.exemplars, deaths)]
        if len(task.exemplars) > 1:
            middle = len(task.exemplars) // 2
            halves = (task.exemplars[:middle], task.exemplars[middle:])
            return [_Task(task.key, half, deaths=1) for half in halves]
        user = task.exemplars[0].user_index
        attempt = Attempt("first", FailureReason.ACTOR_DIED, f"{deaths} actors died on this prompt")
        self._answers[task.key][user] = Outcome(user, attempts=(attempt,))
        logger.warning("user %d is given up: %s", user, attempt.detail)
        return []

    def _check_time(self) -> None:
        now = time.monotonic()
        for seat in list(self._seats):
            if seat.pid is not None and seat.tasks and now - seat.since > self.config.answer_timeout_s:
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

    def _needs(self) -> str:
        choice = self.config.backend
        wanted = choice.resolve().ray_actor_options(choice.settings("interests.backend"))
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        return f"each asks for {wanted}, free are {free}"
