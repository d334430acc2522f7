"""The `prepare` stage: raw logs -> catalogue and sequences, on Ray.

    input files --Ray Data: read, check, filter rows--> staged events (one file per chunk), rejected rows
    staged events --Ray Data: hash partition by user--> staged partitions, item counts
    partitions --tasks: k-core--> items and users --driver: ids--> partitions --tasks--> sequences, leakage check

Ray moves blocks and starts tasks; `passes.py` does the work in polars. The driver holds one row per distinct item and
user, never events. What is read is staged first, so that a killed run does not parse its input again and bad input
stops the job before anything is shuffled.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import polars as pl
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data.context import DataContext, ShuffleStrategy

from distributed_mi.core import schema
from distributed_mi.core.artifacts import (
    Manifest,
    StageKey,
    StageRun,
    Workspace,
    expand_inputs,
    fingerprint_files,
    list_files,
    resolve_url,
)
from distributed_mi.core.errors import (
    ConfigError,
    InputError,
    RejectedRowsError,
    StageError,
    own_error,
)
from distributed_mi.core.progress import track
from distributed_mi.data import exchange, filters, leakage, passes, split, vocab
from distributed_mi.data.catalogue import ROWS_PER_SHARD, build_catalogue, collect_metadata
from distributed_mi.data.config import SPLITS, DataConfig
from distributed_mi.data.passes import Place, ReadOutcome
from distributed_mi.data.readers.base import Reader, ReadTask, What

logger = logging.getLogger(__name__)

_PARTITION_BYTES = 128 << 20
_MAX_TASKS_PER_CPU = 2
"""Tasks handed to Ray at once for each CPU: enough to keep it busy, few enough to bound what waits on the driver."""

T = TypeVar("T")


def run(config: DataConfig, workspace: Workspace, *, start_ray: Callable[[], None]) -> Manifest:
    """Run the stage, or return at once when its result is there.

    Args:
        config: the `[data]` table.
        workspace: where the stage `prepare` is written.
        start_ray: makes sure that Ray is up; called only when there is work.

    Returns:
        The manifest. `rows`: events, users, items, train, validation, test. `stats`: leakage, split, mean_length,
        rejected_by_reason and what each filter removed.

    Raises:
        InputError: a file or column is missing, or nothing is left after a filter. RejectedRowsError: too many unusable
            rows. LeakageError: labels would be trained on. ConfigError: the reader needs `data.interactions`.
    """
    reader = config.reader.resolve()(config.reader.settings("data.reader"))
    _check_inputs(config, reader)
    inputs: dict[str, Any] = {
        what: fingerprint_files(url) for what, url in _urls(config).items() if url is not None
    }
    key = StageKey("prepare", inputs, config.result_fields())
    stage_run = workspace.stage("prepare").open(key)
    num_partitions = config.num_partitions or _default_partitions(reader, inputs)
    prepare = _Prepare(config, stage_run, reader, num_partitions)
    if stage_run.manifest is not None:
        prepare.accept_complete(stage_run.manifest)
        logger.info("prepare: complete, skipped (%s)", stage_run.root)
        return stage_run.manifest
    plans = {what: _plan(reader, config, what) for what in _whats(config, reader)}
    start_ray()
    return prepare.run(plans)


def _check_inputs(config: DataConfig, reader: Reader) -> None:
    if reader.needs_files and config.interactions is None:
        raise ConfigError(
            f'data.interactions is not set, and the reader "{config.reader.name}" needs files. '
            'Give a path or URL, or use data.reader.name="synthetic".'
        )
    if not reader.needs_files and (config.interactions or config.items):
        raise ConfigError(
            f'the reader "{config.reader.name}" generates its data, but data.interactions or data.items is set; '
            "choose another reader or remove the paths"
        )


def _urls(config: DataConfig) -> dict[What, str | None]:
    return {"interactions": config.interactions, "items": config.items}


def _whats(config: DataConfig, reader: Reader) -> list[What]:
    return ["interactions", "items"] if not reader.needs_files or config.items else ["interactions"]


def _plan(reader: Reader, config: DataConfig, what: What) -> list[ReadTask]:
    url = _urls(config)[what]
    filesystem, _ = resolve_url("/" if url is None or "://" not in url else url)
    return reader.plan(filesystem, [] if url is None else expand_inputs(url), what)


def _default_partitions(reader: Reader, inputs: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    size = reader.estimate_bytes() + sum(file["bytes"] for file in inputs.get("interactions", []))
    return max(1, math.ceil(size / _PARTITION_BYTES))


@dataclass
class _Core:
    """Items and users of the k-core, numbered."""

    items: pl.DataFrame
    users_by_partition: list[pl.DataFrame]
    plan: split.SplitPlan
    num_users: int


class _Prepare:
    """One run of the stage; every method is one arrow of the module docstring."""

    def __init__(self, config: DataConfig, stage_run: StageRun, reader: Reader, num_partitions: int) -> None:
        self.config, self.stage_run, self.reader = config, stage_run, reader
        self.num_partitions = num_partitions
        self.place = Place(stage_run.fs, stage_run.root)
        self.num_rows = 0
        """Rows of the interactions, unusable ones included."""
        self.removed: Counter[str] = Counter()
        """Filter -> events it removed, in the order of the filters."""

    def run(self, plans: Mapping[What, list[ReadTask]]) -> Manifest:
        """All passes, then the manifest."""
        for folder in ("sequences", "catalogue", f"{passes.STAGING}/users"):
            self.stage_run.clear(folder)
        outcomes = {what: self.read(tasks, what) for what, tasks in plans.items()}
        for what, outcome in outcomes.items():
            self.accept_rejected(outcome, what)
        self.removed.update(outcomes["interactions"].removed)
        self.num_rows = outcomes["interactions"].rows
        self.require_events(outcomes["interactions"].kept)
        summaries = self.partition(outcomes["interactions"].files)
        core = self.find_core(summaries)
        written = self.write(core)
        checked = self.check(written)
        items = outcomes.get("items", ReadOutcome())
        catalogue = self.write_catalogue(core.items, written, items)
        return self.commit(core, written, checked, catalogue, outcomes)

    def read(self, tasks: Sequence[ReadTask], what: What) -> ReadOutcome:
        """Stage one of the two inputs."""
        place, reader, config = self.place, self.reader, self.config.filters

        def read_one(block: pa.Table) -> pa.Table:
            index = block["index"][0].as_py()
            found = passes.read(place, reader, tasks[index], index, what, config)
            return exchange.outcome_table(index, found)

        found: dict[int, ReadOutcome] = {}
        num_rows = 0
        with _ray_data(), track(f"prepare: read {what}", len(tasks), "tasks") as bar:
            rows = ray.data.from_items(
                [{"index": i} for i in range(len(tasks))], override_num_blocks=len(tasks)
            )
            graph = rows.map_batches(read_one, batch_format="pyarrow", batch_size=1)
            for row in graph.iter_rows():
                found[row["index"]] = exchange.outcome_of(row)
                num_rows += found[row["index"]].rows
                bar.advance(note=f"{num_rows:,} rows")
        _require_all(found, len(tasks), f"read {what}")
        total = ReadOutcome()
        for index in sorted(found):
            total.add(found[index])
        return total

    def accept_rejected(self, outcome: ReadOutcome, what: What) -> None:
        """Stop when too many rows could not be used.

        Raises:
            RejectedRowsError: names the counts by reason and where the rows lie.
        """
        rejected = sum(outcome.rejected.values())
        if not rejected:
            return
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in outcome.rejected.most_common())
        where = f"{self.stage_run.directory.workspace.url}/prepare/{self.stage_run.key.generation}/rejected"
        text = f"{rejected:,} of {outcome.rows:,} rows of the {what} could not be used ({reasons}); they are in {where}"
        if rejected > self.config.max_rejected_fraction * outcome.rows:
            raise RejectedRowsError(
                f"prepare: {text}. The limit is {self.config.max_rejected_fraction:.2%}: "
                "mend the input, or raise data.max_rejected_fraction."
            )
        logger.warning("prepare: %s", text)

    def accept_complete(self, manifest: Manifest) -> None:
        """Stop when an earlier run set more rows aside than is allowed now: the limit is no part of the key.

        Raises:
            RejectedRowsError: see `accept_rejected`.
        """
        for what, reasons in manifest.stats.get("rejected_by_input", {}).items():
            rows = manifest.stats["input_rows"][what]
            self.accept_rejected(ReadOutcome(rows, rejected=Counter(reasons)), what)

    def require_events(self, left: int) -> None:
        """Refuse an empty result.

        Raises:
            InputError: names how many events each filter removed.
        """
        if left:
            return
        if not self.num_rows:
            raise InputError(f"prepare: the interactions ({self.config.interactions}) hold no rows")
        counts = ", ".join(f"{name} removed {count:,}" for name, count in self.removed.items() if count)
        raise InputError(
            f"prepare: no event is left of {self.num_rows:,} rows: {counts or 'all were rejected'}"
        )

    def partition(self, files: list[str]) -> list[passes.PartitionSummary]:
        """Bring each user's events together in one partition; the duplicate policy is applied on the way."""
        place, duplicates = self.place, self.config.filters.duplicates
        if self.num_partitions == 1:
            summaries = list(
                _tasks(passes.partition_files, [(place, files, duplicates)], "prepare: gather users")
            )
        else:
            summaries = self._shuffle(files)
        removed = sum(s.num_duplicates for s in summaries)
        if duplicates != "keep":
            self.removed["duplicates"] += removed
        return sorted(summaries, key=lambda s: s.partition)

    def _shuffle(self, files: list[str]) -> list[passes.PartitionSummary]:
        place, duplicates, num_partitions = self.place, self.config.filters.duplicates, self.num_partitions

        def load(block: pa.Table) -> pa.Table:
            return passes.load_for_partition(place, block["file"][0].as_py(), num_partitions)

        def write(block: pa.Table) -> pa.Table:
            if block.num_rows == 0:
                return exchange.summary_table([])
            events = pl.DataFrame(pl.from_arrow(block))
            parts = events.partition_by("partition", as_dict=True, include_key=False)
            return exchange.summary_table(
                [passes.partition(place, part, int(key[0]), duplicates) for key, part in parts.items()]
            )

        summaries: list[passes.PartitionSummary] = []
        num_events = 0
        with _ray_data(), track("prepare: gather users", num_partitions, "partitions") as bar:
            rows = ray.data.from_items([{"file": f} for f in files], override_num_blocks=len(files))
            graph = (
                rows.map_batches(load, batch_format="pyarrow", batch_size=1)
                .repartition(num_partitions, keys=["partition"])
                .map_batches(write, batch_format="pyarrow", batch_size=None)
            )
            for row in graph.iter_rows():
                summaries.append(exchange.summary_of(row))
                num_events += summaries[-1].num_events
                bar.advance(note=f"{num_events:,} events")
        numbers = [s.partition for s in summaries]
        if len(set(numbers)) != len(numbers):
            raise StageError(
                "prepare: a partition of users came back in two pieces; this is a bug, please report it"
            )
        return summaries

    def find_core(self, summaries: list[passes.PartitionSummary]) -> _Core:
        """Items and users of the k-core, numbered, and the plan of the split.

        Raises:
            InputError: nothing is left, or nobody to train on.
        """
        config = self.config
        numbers = [s.partition for s in summaries]
        total = sum(s.num_events for s in summaries)
        least = filters.min_user_events(config.k_core)
        counts = filters.combine_counts(*(s.items for s in summaries))

        def recount(item_ids: pl.Series) -> pl.DataFrame:
            shared = ray.put(item_ids)
            arguments = [(self.place, n, shared, least) for n in numbers]
            return _combined(_tasks(passes.recount, arguments, "prepare: k-core"))

        kept = filters.core_items(config.k_core, counts, recount)
        items = vocab.index_items(kept)
        first_ms = min(s.first_ms for s in summaries)
        width_ms = split.bucket_ms(first_ms, max(s.last_ms for s in summaries))
        shared = ray.put(kept["item_id"])
        arguments = [(self.place, n, shared, least, first_ms, width_ms) for n in numbers]
        found = list(_tasks(passes.find_users, arguments, "prepare: find users"))
        events = sum(f.num_events for f in found)
        if config.k_core.method != "none":
            rare = sum(f.num_rare_item_events for f in found)
            self.removed["k_core (rare items)"] += rare
            self.removed["k_core (short users)"] += total - rare - events
        self.require_events(events)
        return self._number(items, numbers, found, split.SplitPlan(config.split, 0), first_ms, width_ms)

    def _number(
        self,
        items: pl.DataFrame,
        numbers: list[int],
        found: list[passes.UsersFound],
        plan: split.SplitPlan,
        first_ms: int,
        width_ms: int,
    ) -> _Core:
        config = self.config.split
        users = pl.concat(
            f.users.with_columns(pl.lit(n).alias("partition")) for n, f in zip(numbers, found, strict=True)
        )
        users = vocab.index_users(users, config.seed if config.name == "by-user" else None)
        cuts = (0, 0)
        if config.name == "global-temporal":
            histogram = pl.concat(f.histogram for f in found)
            cuts = split.temporal_cuts(histogram, first_ms, width_ms, config)
        plan = split.SplitPlan(config, users.height, cuts)
        if config.name == "by-user" and plan.user_cuts[0] == 0:
            raise InputError(
                f"prepare: {users.height} users are too few to train on a share of {config.train_fraction}"
            )
        parts = users.partition_by("partition", as_dict=True)
        return _Core(
            items, [parts.get((n,), users.clear()) for n in range(self.num_partitions)], plan, users.height
        )

    def write(self, core: _Core) -> list[passes.WriteSummary]:
        """Write the sequences of the three splits; a split without users gets an empty shard."""
        shared = ray.put(core.items)
        arguments = [
            (self.place, n, users, shared, core.plan)
            for n, users in enumerate(core.users_by_partition)
            if users.height
        ]
        written = list(_tasks(passes.write, arguments, "prepare: write sequences"))
        for name in SPLITS:
            if not list_files(self.stage_run.fs, self.stage_run.path("sequences", name), ".parquet"):
                logger.warning("prepare: the %s split has no users", name)
                empty = schema.empty("sequences")
                self.stage_run.write_table(passes.shard_file(f"sequences/{name}", 0), empty, "sequences")
        return written

    def check(self, written: list[passes.WriteSummary]) -> dict[str, Any]:
        """The leakage check on the shards as written.

        Raises:
            LeakageError: labels would be trained on.
        """
        first = min((w.first_label_ms for w in written if w.first_label_ms is not None), default=None)
        arguments = [(self.place, n, first) for n in range(self.num_partitions)]
        counts = sum(_tasks(passes.check, arguments, "prepare: leakage check"), leakage.LeakageCounts())
        found = leakage.require_clean(counts, self.config.split.name)
        logger.info("prepare: %s", found["text"])
        return found

    def write_catalogue(
        self, items: pl.DataFrame, written: list[passes.WriteSummary], metadata: ReadOutcome
    ) -> dict[str, int]:
        """Write the catalogue; returns counts for the manifest."""
        chunks = (self.place.load(file) for file in metadata.files)
        known = collect_metadata(chunks, items["item_id"])
        table = build_catalogue(items, pl.concat(w.item_events for w in written), known)
        for shard, start in enumerate(range(0, table.height, ROWS_PER_SHARD)):
            part = table.slice(start, ROWS_PER_SHARD).to_arrow()
            self.stage_run.write_table(passes.shard_file("catalogue", shard), part, "catalogue")
        untitled = table["title"].null_count()
        if metadata.files and untitled:
            logger.warning("prepare: %s of %s items have no title", f"{untitled:,}", f"{table.height:,}")
        return {"items_without_title": untitled, "items_without_metadata": table.height - known.height}

    def commit(
        self,
        core: _Core,
        written: list[passes.WriteSummary],
        checked: dict[str, Any],
        catalogue: dict[str, int],
        outcomes: Mapping[What, ReadOutcome],
    ) -> Manifest:
        """Remove what was staged and declare the stage complete."""
        if not list_files(self.stage_run.fs, self.stage_run.path("rejected"), ".parquet"):
            self.stage_run.write_table("rejected/none.parquet", schema.empty("rejected"), "rejected")
        rejected = sum((o.rejected for o in outcomes.values()), Counter[str]())
        events = sum(w.events for w in written)
        rows = {"events": events, "users": core.num_users, "items": core.items.height}
        rows |= {name: sum(w.rows[name] for w in written) for name in SPLITS}
        stats: dict[str, Any] = {
            "leakage": checked,
            "split": self.config.split.name,
            "mean_length": round(events / core.num_users, 4),
            "rejected_by_reason": dict(sorted(rejected.items())),
            "rejected_by_input": {what: dict(sorted(o.rejected.items())) for what, o in outcomes.items()},
            "input_rows": {what: o.rows for what, o in outcomes.items()},
            "removed_events": dict(self.removed),
            "single_event_users": sum(w.num_single_event_users for w in written),
            "evaluation_users_without_history": sum(w.num_without_history for w in written),
            "num_partitions": self.num_partitions,
            **catalogue,
        }
        if core.plan.config.name == "global-temporal":
            stats["cuts_ms"] = list(core.plan.cuts_ms)
        self.stage_run.clear(passes.STAGING)
        manifest = self.stage_run.commit(rows=rows, rejected_rows=rejected.total(), stats=stats)
        logger.info("prepare: %s", ", ".join(f"{count:,} {name}" for name, count in rows.items()))
        return manifest


def _combined(counts: Iterator[pl.DataFrame]) -> pl.DataFrame:
    """Counts added up as they arrive, so that only two are held."""
    total = pl.DataFrame(schema=exchange.ITEM_COUNTS)
    for part in counts:
        total = filters.combine_counts(total, part)
    return total


def _require_all(found: Mapping[int, Any], expected: int, what: str) -> None:
    if len(found) != expected:
        raise StageError(
            f"prepare: {what}: {len(found)} of {expected} tasks came back; run the same command again"
        )


def _tasks(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], what: str) -> Iterator[T]:
    """Results of a function over argument tuples, in their order, from Ray tasks of which a bounded number waits."""
    remote = ray.remote(function)
    limit = _MAX_TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: list[Any] = []
    with track(what, len(arguments), "partitions") as bar:
        for argument in arguments:
            if len(waiting) >= limit:
                yield _get(waiting.pop(0))
                bar.advance()
            waiting.append(remote.remote(*argument))
        for reference in waiting:
            yield _get(reference)
            bar.advance()


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise own_error(error) from error


@contextmanager
def _ray_data() -> Iterator[None]:
    """Ray Data with hash shuffles and without its own bars and log; the settings found are put back."""
    context = DataContext.get_current()
    wanted = {
        "shuffle_strategy": ShuffleStrategy.HASH_SHUFFLE,
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
    }
    before = {name: getattr(context, name) for name in wanted}
    log = logging.getLogger("ray.data")
    level = log.level
    for name, value in wanted.items():
        setattr(context, name, value)
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except ray.exceptions.RayError as error:
        raise own_error(error) from error
    finally:
        log.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
