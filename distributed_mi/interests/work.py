"""The part of the interests stage that calls the backend: shards of answers, failures, and where a run goes on.

A shard holds the answers of up to `commit_every` exemplars. Its file is named after the place of its first exemplar in
the list of all, is written whole, and is the only sign that these exemplars are done; so a killed run goes on with the
exemplars that stand in no shard, also when `commit_every` has changed in between.
"""

import json
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace

import pyarrow as pa

from distributed_mi.core import schema
from distributed_mi.core.artifacts import StageRun, list_files, read_table, write_bytes
from distributed_mi.core.errors import StageError
from distributed_mi.core.progress import track
from distributed_mi.interests.answer import answer_model, json_schema
from distributed_mi.interests.backends.base import BackendContext
from distributed_mi.interests.config import BackendChoice, InterestsConfig
from distributed_mi.interests.history import Exemplar
from distributed_mi.interests.ladder import KEYPHRASE, Ladder, Outcome
from distributed_mi.interests.source import Source

logger = logging.getLogger(__name__)

MAX_SAMPLES = 100
"""Failures in failures.jsonl; all of them are in the generation's folder `failures`."""


class Work:
    """Answers what is missing, shard by shard."""

    def __init__(self, config: InterestsConfig, stage: StageRun, source: Source) -> None:
        self.config, self.stage, self.source = config, stage, source
        model = answer_model(
            max_interests=config.max_interests,
            max_interest_chars=config.max_interest_chars,
            max_items_per_interest=config.max_items_per_interest,
            max_item_index=source.max_item_index,
        )
        self.context = BackendContext(json_schema(model), config.max_interests, config.max_interest_chars)
        self.failed = 0
        """Exemplars whose answer is the fallback's, shards of earlier attempts included."""
        self.restarts = 0
        """Actors that died and were replaced."""
        self._fallback: Ladder | None = None

    def run(self, start_ray: Callable[[], None]) -> None:
        """Answer every exemplar that no shard holds.

        Raises:
            StageError: see `ActorPool.run`, and `max_failed_fraction` is exceeded.
        """
        chunks = self._missing_chunks()
        total, left = len(self.source.users), sum(len(c) for c in chunks.values())
        if left < total:
            logger.info("interests: %d of %d answers are there already", total - left, total)
        self._check_failures()
        if not chunks:
            return
        in_process = self.config.backend.resolve().in_process
        results = self._in_process(chunks) if in_process else self._on_actors(chunks, start_ray)
        name = f"interests ({self.config.backend.name})"
        with track(name, left, "exemplars") as bar, closing(results):
            for place, outcomes in results:
                self._commit(place, outcomes)
                bar.advance(len(outcomes), f"{self.failed} fell back" if self.failed else "")

    def _missing_chunks(self) -> dict[int, list[Exemplar]]:
        """Place of the first exemplar -> exemplars of each shard that is to be written."""
        done: set[int] = set()
        for path in self.stage.valid_shards("answers", "answers"):
            shard = read_table(self.stage.fs, path, "answers", columns=["user_index", "step"])
            done.update(shard["user_index"].to_pylist())
            if self.config.backend.name != KEYPHRASE:
                self.failed += shard["step"].to_pylist().count(KEYPHRASE)
        users, size = self.source.users, self.config.commit_every
        chunks = {}
        for start in range(0, len(users), size):
            places = [p for p in range(start, min(start + size, len(users))) if users[p] not in done]
            if places:
                chunks[places[0]] = [self.source.exemplars[users[p]] for p in places]
        return chunks

    def _in_process(self, chunks: Mapping[int, Sequence[Exemplar]]) -> Generator[tuple[int, list[Outcome]]]:
        ladder = self._ladder(self.config.backend)
        for place, exemplars in chunks.items():
            yield place, ladder.answer(exemplars)

    def _on_actors(
        self, chunks: Mapping[int, Sequence[Exemplar]], start_ray: Callable[[], None]
    ) -> Generator[tuple[int, list[Outcome]]]:
        start_ray()
        from distributed_mi.interests.pool import ActorPool

        pool = ActorPool(self.config, self._context_for(self.config.backend))
        with closing(pool.run(chunks)) as results:
            for place, outcomes in results:
                self.restarts = pool.restarts
                yield place, outcomes

    def _context_for(self, choice: BackendChoice) -> BackendContext:
        uses_catalogue = choice.resolve().uses_catalogue
        return replace(self.context, catalogue=self.source.catalogue) if uses_catalogue else self.context

    def _ladder(self, choice: BackendChoice) -> Ladder:
        context = self._context_for(choice)
        backend = choice.resolve()(choice.settings("interests.backend"), context)
        return Ladder(backend, choice.name, self.config, context)

    def _commit(self, place: int, outcomes: Sequence[Outcome]) -> None:
        """Write one shard: first what failed and why, then the answers, whose file says that all is there."""
        failed = [o for o in outcomes if o.failed]
        if failed:
            lines = "".join(_failure_line(o) for o in failed)
            write_bytes(self.stage.fs, self.stage.path("failures", f"part-{place:09d}.jsonl"), lines.encode())
        final = [self._fall_back(o) if o.failed else o for o in outcomes]
        declared = schema.TABLES["answers"]
        table = pa.Table.from_pylist([{c: getattr(o, c) for c in declared.names} for o in final], declared)
        self.stage.write_table(f"answers/part-{place:09d}.parquet", table, "answers")
        self.failed += len(failed)
        self._check_failures()

    def _fall_back(self, outcome: Outcome) -> Outcome:
        if self._fallback is None:
            self._fallback = self._ladder(BackendChoice(name=KEYPHRASE))
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
