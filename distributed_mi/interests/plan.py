"""What a run of the stage would ask and cost, without running it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from distributed_mi.core.artifacts import Workspace
from distributed_mi.interests.backends.base import estimate_tokens
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.ladder import Outcome
from distributed_mi.interests.ledger import Account, account_of, read_runs
from distributed_mi.interests.source import Source
from distributed_mi.interests.stage import open_cache, stage_key
from distributed_mi.interests.work import Plan, Work

SAMPLE = 32
"""Prompts that the estimate is made from."""


def dry_run(
    config: InterestsConfig,
    workspace: Workspace,
    *,
    ask: bool = False,
    start_ray: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Prompts to send, and what they are expected to take, from a sample of 32.

    Tokens of prompts are counted by the model's tokenizer, where there is one. How long answers are and how fast they
    come is known from earlier runs with the same model in the workspace's ledger, or by asking the sample. Without
    both the longest answer that is allowed is assumed, and no time is given.

    Args:
        config: of the stage.
        workspace: with complete stages prepare, embed and exemplars.
        ask: send the sample. Its answers go into the cache: the run that follows does not pay for them again.
        start_ray: called before the sample is sent to actors.

    Returns:
        `render`'s facts: exemplars, done, from_cache, duplicates, prompts, tokens, seconds, money.
    """
    stage = workspace.stage("interests")
    key = stage_key(config, workspace)
    root = f"{stage.base}/{key.generation}"
    was_there = stage.fs.get_file_info(root).type == pafs.FileType.Directory
    run = stage.open(key)
    source = Source(workspace, config.max_history)
    facts: dict[str, Any] = {"exemplars": len(source.users), "complete": run.manifest is not None}
    if run.manifest is not None:
        return facts | {"done": len(source.users), "prompts": 0}
    try:
        work = Work(config, run, source, open_cache(config, workspace))
        plan = work.plan()
        return facts | _estimate(config, work, plan, ask=ask, start_ray=start_ray)
    finally:
        if not was_there:
            stage.fs.delete_dir(root)


def _estimate(
    config: InterestsConfig,
    work: Work,
    plan: Plan,
    *,
    ask: bool,
    start_ray: Callable[[], None] | None,
) -> dict[str, Any]:
    asked_for = plan.to_ask
    facts: dict[str, Any] = {
        "done": plan.done,
        "from_cache": len(plan.from_cache),
        "duplicates": sum(map(len, plan.same.values())),
        "prompts": len(asked_for),
        "backend": config.backend.name,
        "model": work.ladder.model,
    }
    if not asked_for:
        return facts
    chosen = np.unique(np.linspace(0, len(asked_for) - 1, min(SAMPLE, len(asked_for))).astype(int))
    sample = [asked_for[i] for i in chosen]
    count = work.ladder.backend.token_counter(config.backend.settings("interests.backend"))
    lengths = [(count or estimate_tokens)(c.request.prompt) for c in sample if c.request is not None]
    past = _past(work)
    how = "earlier runs"
    if ask:
        past, how = _ask(work, plan, sample, start_ray), f"a sample of {len(sample)}"
    expected = Account(exemplars=len(asked_for))
    asked = past.requests - past.retries  # exemplars; others came from a cache
    per_exemplar = past.requests / asked if asked else 1.0
    expected.requests = round(per_exemplar * len(asked_for))
    expected.num_prompt_tokens = round(float(np.mean(lengths)) * expected.requests)
    if past.requests:
        expected.num_answer_tokens = round(past.num_answer_tokens / past.requests * expected.requests)
        expected.num_cached_tokens = round(
            expected.num_prompt_tokens * past.num_cached_tokens / max(past.num_prompt_tokens, 1)
        )
        expected.engine_seconds = past.engine_seconds / past.requests * expected.requests
    else:
        how = f"the limit of {config.max_answer_tokens} tokens an answer"
        expected.num_answer_tokens = config.max_answer_tokens * expected.requests
    actors = config.num_actors if isinstance(config.num_actors, int) else config.num_actors[1]
    engines = 1 if work.ladder.backend.in_process else actors
    return facts | {
        "sampled_prompts": len(sample),
        "mean_prompt_tokens": round(float(np.mean(lengths)), 1),
        "longest_prompt_tokens": max(lengths),
        "tokens_counted_by": "tokenizer" if count else "estimate",
        "requests": expected.requests,
        "num_prompt_tokens": expected.num_prompt_tokens,
        "num_answer_tokens": expected.num_answer_tokens,
        "answers_estimated_from": how,
        "seconds": round(expected.engine_seconds / engines, 1) if past.requests else None,
        "money": round(expected.money(config.prices), 4),
        "currency": config.prices.currency,
    }


def _past(work: Work) -> Account:
    """Sums of earlier runs with the same backend and model."""
    total = Account()
    for entry in read_runs(work.stage.directory):
        if (entry.get("backend"), entry.get("model")) == (work.ledger.backend, work.ledger.model):
            total.add(account_of(entry))
    return total if total.requests else Account()


def _ask(work: Work, plan: Plan, sample: list[Any], start_ray: Callable[[], None] | None) -> Account:
    """Answer the sample now; what comes goes into the cache."""
    some = Plan(plan.done, (), tuple(sample), 0, {})
    outcomes = list[Outcome]()
    for finished, _ in work.results(some, start_ray or (lambda: None)):
        outcomes += finished
    account = Account()
    account.count(outcomes)
    account.engine_seconds = work.engine_seconds()
    if work.cache is not None:
        replies = [r for o in outcomes for r in o.replies]
        work.cache.store(replies, work.ledger.backend, work.ledger.model)
    return account


def render(facts: dict[str, Any]) -> str:
    """Lines for a terminal."""
    lines = [f"{facts['exemplars']:,} exemplars"]
    if facts["complete"]:
        return lines[0] + ", all answered: nothing to send"
    lines.append(f"  answered already      {facts['done']:,}")
    lines.append(f"  from the cache        {facts['from_cache']:,}")
    lines.append(f"  prompt of another one {facts['duplicates']:,}")
    lines.append(f"  prompts to send       {facts['prompts']:,}")
    if not facts["prompts"]:
        return "\n".join(lines)
    lines += [
        f"backend {facts['backend']}, model {facts['model']}",
        f"  a prompt              {facts['mean_prompt_tokens']:,} tokens on average, "
        f"{facts['longest_prompt_tokens']:,} the longest of {facts['sampled_prompts']} "
        f"({'counted' if facts['tokens_counted_by'] == 'tokenizer' else 'estimated'})",
        f"  expected in           {facts['num_prompt_tokens']:,} tokens in {facts['requests']:,} requests",
        f"  expected out          {facts['num_answer_tokens']:,} tokens (from {facts['answers_estimated_from']})",
        f"  expected cost         {facts['money']:,.4f} {facts['currency']}",
    ]
    seconds = facts["seconds"]
    time_text = "unknown: --ask-sample measures it" if seconds is None else f"{seconds:,.0f} s"
    lines.append(f"  expected time         {time_text}")
    return "\n".join(lines)
