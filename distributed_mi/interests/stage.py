"""The interests stage: exemplars -> interests, as text and as vectors.

Reads   prepare (catalogue, sequences/train), exemplars
Writes  answers/           one row per exemplar: prompt, answer, the step of the ladder that gave it, what it cost
        interests/         the interests in those answers, checked against the history
        interest_vectors/  their text vectors
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from distributed_mi.core import schema
from distributed_mi.core.artifacts import Manifest, StageKey, StageRun, Workspace
from distributed_mi.core.errors import StageError
from distributed_mi.interests.cache import AnswerCache
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import UNNAMED, Exemplar
from distributed_mi.interests.ladder import FIRST, KEYPHRASE, STEPS, Ladder, read_answer
from distributed_mi.interests.parse import ParsedAnswer, ParsedInterest
from distributed_mi.interests.sanitize import printable, safe_title
from distributed_mi.interests.source import Source
from distributed_mi.interests.work import CACHE_FOLDER, Work, failure_samples, make_context

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float32 `[n, T]`."""


def run(
    config: InterestsConfig, workspace: Workspace, *, encode: Encode, start_ray: Callable[[], None]
) -> Manifest:
    """Ask for the interests of every exemplar.

    Args:
        config: backend, prompt, limits.
        workspace: with complete stages prepare, embed and exemplars.
        encode: texts -> vectors, by the encoder and scale of the stage embed.
        start_ray: called before Ray is used; not called when the backend runs in this process.

    Raises:
        StageError: too many exemplars had no usable answer, or the actors cannot work.
        WorkspaceError: an earlier stage is missing.
    """
    stage = workspace.stage("interests").open(stage_key(config, workspace))
    if stage.manifest is not None:
        return stage.manifest
    source = Source(workspace, config.max_history)
    cache = open_cache(config, workspace)
    work = Work(config, stage, source, cache)
    started = time.monotonic()
    work.run(start_ray)
    seconds = time.monotonic() - started
    answers = _all_answers(stage, source.users)
    interests, stats = _read_interests(config, source, answers)
    stats |= {"answering_seconds": round(seconds, 3), "actor_restarts": work.restarts}
    stats["ledger"] = work.ledger.account.report(config.prices)
    stats["ledger_of_all_runs"] = work.ledger.cumulative()
    if cache is not None:
        stats["cache_unreadable"], stats["cache_unwritten"] = cache.unreadable, cache.unwritten
    stats |= what_was_cut(config, source)
    return _write(stage, answers, interests, encode, stats)


def stage_key(config: InterestsConfig, workspace: Workspace) -> StageKey:
    """What the result depends on.

    Raises:
        WorkspaceError: an earlier stage is missing.
    """
    backend, settings = config.backend.resolve(), config.backend.settings("interests.backend")
    inputs: dict[str, Any] = {
        name: workspace.stage(name).require().identity for name in ("prepare", "embed", "exemplars")
    }
    if (model_files := backend.fingerprint(settings)) is not None:
        inputs["model_files"] = model_files
    return StageKey("interests", inputs, config.result_fields())


def open_cache(config: InterestsConfig, workspace: Workspace) -> AnswerCache | None:
    """The cache that a configuration names, or the workspace's own; None where looking up saves nothing."""
    if not config.backend.resolve().cacheable:
        return None
    return AnswerCache(config.cache or f"{workspace.url.rstrip('/')}/{CACHE_FOLDER}")


def what_was_cut(config: InterestsConfig, source: Source) -> dict[str, int]:
    """Titles that do not stand in the first prompts as they are in the catalogue, and items left out of them."""
    ladder = Ladder(config.backend, config, make_context(config, source))
    shown = {i.item_index: i for u in source.users for i in source.exemplars[u].history}
    changed = sum(safe_title(i.title, config.max_title_chars) != i.title for i in shown.values())
    shortened = sum(len(i.title) > config.max_title_chars for i in shown.values())
    left_out = 0
    if config.max_prompt_tokens is not None:
        exemplars = [source.exemplars[u] for u in source.users]
        left_out = sum(len(e.history) - len(ladder.request(e, FIRST).exemplar.history) for e in exemplars)
    return {"titles_changed": changed, "titles_shortened": shortened, "items_left_out": left_out}


def _all_answers(stage: StageRun, users: Sequence[int]) -> list[dict[str, Any]]:
    """The table `answers` in the order of the exemplars.

    Raises:
        StageError: an exemplar is missing or stands twice.
    """
    rows = stage.read_table("answers", "answers").to_pylist()
    counts = Counter(r["user_index"] for r in rows)
    wrong = [u for u in users if counts[u] != 1] + [u for u in counts if u not in set(users)]
    if wrong:
        raise StageError(
            f"interests: {len(wrong)} exemplars do not have exactly one answer (first: user_index {wrong[0]}, "
            f"{counts[wrong[0]]} answers). Remove {stage.root} and run again."
        )
    by_user = {r["user_index"]: r for r in rows}
    return [by_user[u] for u in users]


def _read_interests(
    config: InterestsConfig, source: Source, answers: Sequence[Mapping[str, Any]]
) -> tuple[dict[int, tuple[ParsedInterest, ...]], dict[str, Any]]:
    """Parse every stored answer; also the counts for the manifest."""
    interests: dict[int, tuple[ParsedInterest, ...]] = {}
    counts: Counter[str] = Counter()
    for row in answers:
        user, step = row["user_index"], row["step"]
        exemplar = source.exemplars[user]
        parsed = read_answer(row["answer"], exemplar, step, config)
        if not isinstance(parsed, ParsedAnswer):
            if step != KEYPHRASE:
                raise StageError(
                    f"interests: the stored answer of user_index {user} reads as {parsed.reason}"
                )
            parsed = ParsedAnswer(())
        for name in ("truncated", "refused_ids", "merged", "dropped", "foreign", "over_limit"):
            counts[name] += int(getattr(parsed, name))
        found = parsed.interests or _titles_as_interests(exemplar, config)
        counts["answered_by_titles"] += not parsed.interests
        counts["without_support"] += sum(not i.item_indices for i in found)
        interests[user] = found
    steps = Counter(r["step"] for r in answers)
    stats = {
        "backend": config.backend.name,
        "models": sorted({r["model"] for r in answers}),
        "steps": {s: steps[s] for s in STEPS},
        "failed": steps[KEYPHRASE] if config.backend.name != KEYPHRASE else 0,
        "num_prompt_tokens": sum(r["num_prompt_tokens"] for r in answers),
        "num_answer_tokens": sum(r["num_answer_tokens"] for r in answers),
        "engine_seconds": round(sum(r["seconds"] for r in answers), 3),
        **counts,
    }
    return interests, stats


def _titles_as_interests(exemplar: Exemplar, config: InterestsConfig) -> tuple[ParsedInterest, ...]:
    """The newest items with a title stand in for interests when an answer names none (as EIMF does)."""
    items = [i for i in exemplar.history if i.has_title][-config.max_interests :]
    if not items:
        support = tuple(i.item_index for i in exemplar.history)
        return (ParsedInterest(printable(UNNAMED, config.max_interest_chars), support),)
    return tuple(
        ParsedInterest(
            printable(i.title, config.max_interest_chars) or f"item {i.item_index}", (i.item_index,)
        )
        for i in items
    )


def _write(
    stage: StageRun,
    answers: Sequence[Mapping[str, Any]],
    interests: Mapping[int, tuple[ParsedInterest, ...]],
    encode: Encode,
    stats: dict[str, Any],
) -> Manifest:
    rows: list[dict[str, Any]] = [
        {"user_index": u, "interest_index": n, "text": i.text, "item_indices": list(i.item_indices)}
        for u, found in interests.items()
        for n, i in enumerate(found)
    ]
    texts = list(dict.fromkeys(r["text"] for r in rows))
    vectors = _encode(encode, texts)
    place = {t: n for n, t in enumerate(texts)}
    row_vectors = vectors[[place[r["text"]] for r in rows]]
    table = pa.Table.from_pylist(rows, schema.TABLES["interests"])
    stage.write_table("interests/part-0.parquet", table, "interests")
    stage.write_table(
        "interest_vectors/part-0.parquet", _vector_table(table, row_vectors), "interest_vectors"
    )
    content = hashlib.sha256(repr([sorted(r.items()) for r in rows]).encode() + row_vectors.tobytes())
    stats |= {
        "mean_interests": round(len(rows) / len(interests), 3),
        "distinct_texts": len(texts),
        "dim": int(vectors.shape[1]),
        "content": content.hexdigest(),
    }
    samples = failure_samples(stage)
    _remove_stale_samples(stage)
    return stage.commit(
        rows={"answers": len(answers), "interests": len(rows), "interest_vectors": len(rows)},
        stats=stats,
        top_files={"failures.jsonl": samples} if samples else None,
    )


def _encode(encode: Encode, texts: Sequence[str]) -> np.ndarray:
    vectors = np.ascontiguousarray(encode(texts), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
        raise StageError(
            f"interests: the text encoder gave shape {vectors.shape} for {len(texts)} texts, or values that are "
            "not finite"
        )
    return vectors


def _vector_table(interests: pa.Table, vectors: np.ndarray) -> pa.Table:
    """The keys of the table `interests` beside its vectors `[n, T]`."""
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.reshape(-1)))
    keys = interests.select(["user_index", "interest_index"])
    return keys.append_column("vector", column)


def _remove_stale_samples(stage: StageRun) -> None:
    """failures.jsonl of a stopped attempt or of another key must not stand beside a result without failures."""
    path = f"{stage.directory.base}/failures.jsonl"
    if stage.fs.get_file_info(path).type == pafs.FileType.File:
        stage.fs.delete_file(path)
