"""The part of the interests stage that calls the backend: shards of answers, failures, and where a run goes on.

A shard holds answers in the order in which they came, is written whole, and is the only sign that its exemplars are
done: a killed run goes on with those that stand in no shard. Before a backend is asked, exemplars with the same prompt
are put together, and what the answer cache has is taken from it, down the whole ladder.
"""

import json
import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from distributed_mi.core import schema
from distributed_mi.core.artifacts import StageRun, list_files, read_table, write_bytes
from distributed_mi.core.errors import StageError
from distributed_mi.core.progress import track
from distributed_mi.interests.answer import answer_model, json_schema
from distributed_mi.interests.backends.base import BackendContext, BackendDeadError
from distributed_mi.interests.cache import AnswerCache
from distributed_mi.interests.config import BackendChoice, InterestsConfig
from distributed_mi.interests.energy import EnergyMeter
from distributed_mi.interests.ladder import KEYPHRASE, Climb, Climber, Ladder, Outcome, needed, play
from distributed_mi.interests.ledger import Ledger
from distributed_mi.interests.prompts import TEMPLATES
from distributed_mi.interests.source import Source

logger = logging.getLogger(__name__)

MAX_SAMPLES = 100
"""Failures in failures.jsonl; all of them are in the generation's folder `failures`."""
CACHE_FOLDER = "answer_cache"
"""In the workspace, where no other cache is named."""


@dataclass(frozen=True)
class Plan:
    """What there is to do."""

    done: int
    """Exemplars that stand in a shard."""
    from_cache: tuple[Outcome, ...]
    """Finished without asking anybody."""
    to_ask: tuple[Climb, ...]
    """One for each different prompt, in the order in which they share beginnings."""
    replies_from_cache: int
    same: dict[int, tuple[int, ...]]
    """User -> others with the same prompt, whose answer is his."""


def make_context(config: InterestsConfig, source: Source) -> BackendContext:
    """What a backend is told of the run."""
    model = answer_model(
        max_interests=config.max_interests,
        max_interest_chars=config.max_interest_chars,
        max_items_per_interest=config.max_items_per_interest,
        max_item_index=source.max_item_index,
        categories=TEMPLATES[config.template].categories,
    )
    return BackendContext(json_schema(model), config.max_interests, config.max_interest_chars)


class Work:
    """Answers what is missing, shard by shard.

    Args:
        config: of the stage.
        stage: written to.
        source: exemplars.
        cache: answers of earlier runs; None: there is none, or the backend's cost less than looking them up.
    """

    def __init__(
        self, config: InterestsConfig, stage: StageRun, source: Source, cache: AnswerCache | None = None
    ) -> None:
        self.config, self.stage, self.source = config, stage, source
        self.context = make_context(config, source)
        self.ladder = Ladder(config.backend, config, self.context)
        self.cache = cache if self.ladder.backend.cacheable else None
        self.ledger = Ledger(stage.directory, config.backend.name, self.ladder.model, config.prices)
        self.failed = 0
        """Exemplars whose answer is the fallback's, shards of earlier attempts included."""
        self.restarts = 0
        """Actors that died and were replaced."""
        self._fallback: Climber | None = None
        self._meter = EnergyMeter()
        self._buffer: list[Outcome] = []
        self._shards = 0
        self._started = time.monotonic()
        self.engine_seconds: Callable[[], float] = lambda: 0.0
        """Seconds for which engines were held so far, summed over engines."""

    def run(self, start_ray: Callable[[], None]) -> None:
        """Answer every exemplar that no shard holds.

        Raises:
            StageError: see `ActorPool.run`, and `max_failed_fraction` is exceeded.
        """
        plan = self.plan()
        left = len(self.source.users) - plan.done
        if plan.done:
            logger.info("interests: %d of %d answers are there already", plan.done, len(self.source.users))
        self._check_failures()
        if not left:
            return
        if plan.from_cache or plan.same:
            logger.info(
                "interests: %d answers come from the cache, %d prompts are asked for %d exemplars",
                len(plan.from_cache),
                len(plan.to_ask),
                left - len(plan.from_cache),
            )
        self.ledger.account.replies_from_cache = plan.replies_from_cache
        with track(f"interests ({self.config.backend.name})", left, "exemplars") as bar:

            def finish(outcomes: Iterable[Outcome], note: str = "") -> None:
                for outcome in outcomes:
                    others = plan.same.get(outcome.user_index, ())
                    self._keep(outcome, others)
                    bar.advance(1 + len(others))
                fell_back = f"{self.failed} fell back" if self.failed else ""
                bar.advance(0, ", ".join(n for n in (note, fell_back) if n))

            finish(plan.from_cache)
            if plan.to_ask:
                try:
                    with closing(self.results(plan, start_ray)) as results:
                        for outcomes, note in results:
                            finish(outcomes, note)
                except BaseException:
                    with suppress(StageError):  # what ended the run says more
                        self._commit()  # what is finished was paid for
                    raise
            self._commit()

    def results(self, plan: Plan, start_ray: Callable[[], None]) -> Generator[tuple[list[Outcome], str]]:
        """Ask; yields what is finished, and a note on the engines."""
        if self.ladder.backend.in_process:
            return self._in_process(plan)
        return self._on_actors(plan, start_ray)

    def plan(self) -> Plan:
        """What is done, what the cache has, and what has to be asked."""
        done = self._done_users()
        missing = [self.source.exemplars[u] for u in self.source.users if u not in done]
        by_key: dict[str, list[Climb]] = {}
        for exemplar in missing:
            climb = self.ladder.begin(exemplar)
            by_key.setdefault(climb.key if self.cache is not None else str(exemplar.user_index), []).append(
                climb
            )
        climbs = [same[0] for same in by_key.values()]
        played = 0
        waiting = climbs if self.cache is not None else []
        while waiting and self.cache is not None:
            found = self.cache.lookup(needed(waiting))
            waiting = [c for c in waiting if c.key in found]
            played += sum(play(c, found) for c in waiting)
            waiting = [c for c in waiting if c.request is not None]
        finished = tuple(c.outcome for c in climbs if c.request is None)
        asked = [c for c in climbs if c.request is not None]
        asked.sort(key=lambda c: c.outcome.prompt)
        same = {
            s[0].exemplar.user_index: tuple(c.exemplar.user_index for c in s[1:]) for s in by_key.values()
        }
        same = {user: others for user, others in same.items() if others}
        return Plan(len(done), finished, tuple(asked), played, same)

    def _done_users(self) -> set[int]:
        """Who stands in a shard; also counts shards and failures."""
        done: set[int] = set()
        for path in self.stage.valid_shards("answers", "answers"):
            shard = read_table(self.stage.fs, path, "answers", columns=["user_index", "step"])
            done.update(shard["user_index"].to_pylist())
            self._shards = max(self._shards, _shard_number(path))
            if self.config.backend.name != KEYPHRASE:
                self.failed += shard["step"].to_pylist().count(KEYPHRASE)
        return done

    def _in_process(self, plan: Plan) -> Generator[tuple[list[Outcome], str]]:
        began = time.monotonic()
        self.engine_seconds = lambda: time.monotonic() - began
        climber = self._climber(self.config.backend)
        window = self.config.in_flight or climber.backend.window
        waiting = iter(plan.to_ask)
        more = True
        while more or climber.held:
            while more and climber.held < window:
                climb = next(waiting, None)
                more = climb is not None
                if climb is not None:
                    climber.add(climb.exemplar, climb.known)
            try:
                yield climber.advance(), ""
            except BackendDeadError as error:
                raise StageError(f"backend {self.config.backend.name}: {error}") from error

    def _on_actors(self, plan: Plan, start_ray: Callable[[], None]) -> Generator[tuple[list[Outcome], str]]:
        start_ray()
        from distributed_mi.interests.pool import ActorPool, Job

        pool = ActorPool(self.config, self._context_for(self.config.backend))
        self.engine_seconds = lambda: pool.engine_seconds
        jobs = [Job(c.exemplar, c.known) for c in plan.to_ask]
        with closing(pool.run(jobs)) as results:
            for outcomes in results:
                self.restarts = pool.restarts
                yield outcomes, pool.state

    def _context_for(self, choice: BackendChoice) -> BackendContext:
        uses_catalogue = choice.resolve().uses_catalogue
        return replace(self.context, catalogue=self.source.catalogue) if uses_catalogue else self.context

    def _climber(self, choice: BackendChoice) -> Climber:
        context = self._context_for(choice)
        backend = choice.resolve()(choice.settings("interests.backend"), context)
        return Climber(Ladder(choice, self.config, context), backend)

    def _keep(self, outcome: Outcome, others: Sequence[int]) -> None:
        """Put an outcome, and its copies for those with the same prompt, into the next shard."""
        self._buffer.append(outcome)
        self._buffer += [
            replace(
                outcome, user_index=user, replies=(), num_prompt_tokens=0, num_answer_tokens=0, seconds=0.0
            )
            for user in others
        ]
        self.ledger.account.duplicates += len(others)
        if len(self._buffer) >= self.config.commit_every:
            self._commit()

    def _commit(self) -> None:
        """Write one shard: first what failed and why, then the answers, whose file says that all is there.

        The cache comes before the answers: what was paid for is there for the next run even if this one ends here.
        """
        outcomes, self._buffer = self._buffer, []
        if not outcomes:
            return
        if self.cache is not None:
            replies = [r for o in outcomes for r in o.replies]
            self.cache.store(replies, self.config.backend.name, self.ladder.model)
        self._shards += 1
        name = f"part-{self._shards:09d}"
        failed = [o for o in outcomes if o.failed]
        if failed:
            lines = "".join(_failure_line(o) for o in failed)
            write_bytes(self.stage.fs, self.stage.path("failures", f"{name}.jsonl"), lines.encode())
        final = [self._fall_back(o) if o.failed else o for o in outcomes]
        declared = schema.TABLES["answers"]
        table = pa.Table.from_pylist([{c: getattr(o, c) for c in declared.names} for o in final], declared)
        try:
            self.stage.write_table(f"answers/{name}.parquet", table, "answers")
        except OSError as error:
            raise StageError(
                f"interests: cannot write {self.stage.path('answers', name)}.parquet: {error}. What is committed is "
                "kept: run the same command again to go on."
            ) from error
        account = self.ledger.account
        account.count(outcomes)
        account.engine_seconds = self.engine_seconds()
        account.seconds = time.monotonic() - self._started
        account.joules = self._meter.joules()
        self.ledger.write()
        self.failed += len(failed)
        self._check_failures()

    def _fall_back(self, outcome: Outcome) -> Outcome:
        if self._fallback is None:
            self._fallback = self._climber(BackendChoice(name=KEYPHRASE))
        return self._fallback.fall_back(self.source.exemplars[outcome.user_index], outcome)

    def _check_failures(self) -> None:
        """Stop as soon as the limit cannot be kept any more."""
        total = len(self.source.users)
        if self.failed <= self.config.max_failed_fraction * total:
            return
        path = f"{self.stage.directory.base}/failures.jsonl"
        write_bytes(self.stage.fs, path, failure_samples(self.stage))
        raise StageError(
            f"interests: {self.failed:,} of {total:,} exemplars ({self.failed / total:.1%}) had no usable answer "
            f"from backend {self.config.backend.name} after up to {self.config.max_retries} retries; limit is "
            f"{self.config.max_failed_fraction:.1%}.\n  Samples: {path}. Raise interests.max_failed_fraction to "
            "accept; what is finished is kept."
        )


def _shard_number(path: str) -> int:
    """N of `part-N.parquet`."""
    stem = path.rsplit("/", 1)[-1].removesuffix(".parquet").removeprefix("part-")
    return int(stem) if stem.isdigit() else 0


def _failure_line(outcome: Outcome) -> str:
    row = {
        "user_index": outcome.user_index,
        "prompt": outcome.prompt,
        "attempts": [asdict(a) for a in outcome.attempts],
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def failure_samples(stage: StageRun) -> bytes:
    """The first `MAX_SAMPLES` failures of a run, as JSON lines; empty when nothing failed."""
    lines: list[bytes] = []
    for path in list_files(stage.fs, stage.path("failures"), ".jsonl"):
        with stage.fs.open_input_stream(path) as stream:
            lines += stream.read().splitlines(keepends=True)
        if len(lines) >= MAX_SAMPLES:
            break
    return b"".join(lines[:MAX_SAMPLES])
