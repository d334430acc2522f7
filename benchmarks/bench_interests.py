"""The interests stage: its engines beside raw vLLM, two engines beside one, and the machinery without any model.

    $ python -m tests.tiny_llm tiny-llm
    $ python -m benchmarks.bench_interests throughput --prompts 2000 --model tiny-llm
    $ python -m benchmarks.bench_interests engines --model tiny-llm
    $ python -m benchmarks.bench_interests machinery --exemplars 10000

Exemplars have drawn histories with drawn titles. The smaller the model, the larger the share of the stage's own work.
Every run is a process of its own; seconds begin when the engines are ready and end with the last committed answer.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import harness
from benchmarks.harness import Spread, Table
from distributed_mi.core import schema
from distributed_mi.core.artifacts import StageKey, Workspace
from distributed_mi.core.config import ConfigModel
from distributed_mi.interests.backends.base import Backend, Request, Response
from distributed_mi.interests.config import InterestsConfig

ITEMS = 2_000
HISTORY = 12
WORDS = [
    "amber",
    "basil",
    "cedar",
    "denim",
    "ember",
    "flint",
    "glass",
    "hazel",
    "ivory",
    "jade",
    "kelp",
    "linen",
    "maple",
    "navy",
    "ochre",
    "pearl",
    "quartz",
    "rust",
]


class FakeBackend(Backend):
    """Answers at once: what is left is prompts, pool, parser and commits."""

    class Config(ConfigModel):
        """Nothing to set."""

    @classmethod
    def model_of(cls, config: Any) -> str:
        """No model."""
        return "fake-1"

    @property
    def window(self) -> int:
        """As an engine with 256 sequences."""
        return 512

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Two interests, of the first items."""
        return [self._answer(r) for r in requests]

    def _answer(self, request: Request) -> Response:
        ids = [i.item_index for i in request.exemplar.history]
        interests = [{"text": f"interest in {i}", "item_ids": [i]} for i in ids[:2]]
        return Response(request.user_index, json.dumps({"interests": interests}), 100, 20)


def make_workspace(folder: Path, exemplars: int, seed: int) -> Workspace:
    """A workspace with the tables that the stage reads."""
    draw, workspace = random.Random(seed), Workspace(str(folder))
    titles = [" ".join(draw.choices(WORDS, k=4)) for _ in range(ITEMS)]
    items = [
        {"item_index": i, "item_id": f"B{i}", "title": titles[i - 1], "brand": None, "categories": ["Shop"]}
        | {"num_events": 5, "num_train_events": 5}
        for i in range(1, ITEMS + 1)
    ]
    users = [
        {"user_index": u, "user_id": f"U{u}", "item_indices": draw.sample(range(1, ITEMS + 1), HISTORY)}
        | {"timestamps": list(range(HISTORY)), "num_history": HISTORY}
        for u in range(exemplars)
    ]
    rows = [{"cluster": u, "user_index": u, "user_id": f"U{u}", "num_users": 1} for u in range(exemplars)]
    prepare = workspace.stage("prepare").open(StageKey("prepare", {}, {"seed": seed}))
    prepare.write_table("catalogue/part-0.parquet", _table(items, "catalogue"), "catalogue")
    prepare.write_table("sequences/train/part-0.parquet", _table(users, "sequences"), "sequences")
    prepare.commit(rows={"items": ITEMS, "train": exemplars})
    workspace.stage("embed").open(StageKey("embed", {}, {})).commit(rows={})
    stage = workspace.stage("exemplars").open(StageKey("exemplars", {}, {"seed": seed}))
    stage.write_table("exemplars/part-0.parquet", _table(rows, "exemplars"), "exemplars")
    stage.commit(rows={"exemplars": exemplars})
    return workspace


def _table(rows: list[dict[str, Any]], name: str) -> pa.Table:
    return pa.Table.from_pylist(rows, schema.TABLES[name])


def vllm_config(model: str, engines: int, max_num_seqs: int) -> InterestsConfig:
    """As a user would set it, with short answers."""
    return InterestsConfig(
        backend={
            "name": "vllm",
            "model": model,
            "max_model_len": 2048,
            "kv_cache_gib": 1,
            "max_num_seqs": max_num_seqs,
        },
        max_interests=3,
        max_interest_chars=32,
        max_items_per_interest=3,
        max_answer_tokens=300,
        max_failed_fraction=1.0,
        same_script=False,
        num_actors=engines,
    )


def stage_side(config: InterestsConfig, exemplars: int, seed: int) -> dict[str, Any]:
    """The stage up to the last committed shard; seconds from the moment at which all engines are ready."""
    import ray

    from distributed_mi.interests import pool
    from distributed_mi.interests.source import Source
    from distributed_mi.interests.stage import open_cache, stage_key
    from distributed_mi.interests.work import Work

    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", object_store_memory=256 << 20)
    with tempfile.TemporaryDirectory() as folder:
        workspace = make_workspace(Path(folder), exemplars, seed)
        run = workspace.stage("interests").open(stage_key(config, workspace))
        work = Work(config, run, Source(workspace, config.max_history), open_cache(config, workspace))
        ready: list[float] = []
        take = pool.ActorPool._take

        def watched(self: pool.ActorPool, seat: Any) -> Any:
            starting = seat.pid is None
            outcomes = take(self, seat)
            if starting:
                ready.append(time.perf_counter())
            return outcomes

        send = pool.ActorPool._send

        def wait_for_all(self: pool.ActorPool) -> None:
            if len(self.pids) == len(self._seats):
                send(self)

        pool.ActorPool._take, pool.ActorPool._send = watched, wait_for_all  # type: ignore[method-assign]
        started = time.perf_counter()
        work.run(lambda: None)
        ended = time.perf_counter()
        account = work.ledger.account
        rows = len(run.read_table("answers", "answers", columns=["user_index"]))
    ray.shutdown()
    return {
        "seconds": ended - ready[-1],
        "seconds_with_start": ended - started,
        "rows": rows,
        "failed": work.failed,
        "requests": account.requests,
        "retries": account.retries,
        "prompt_tokens": account.num_prompt_tokens,
        "answer_tokens": account.num_answer_tokens,
        "cached_tokens": account.num_cached_tokens,
    }


def raw_side(config: InterestsConfig, exemplars: int, seed: int) -> dict[str, Any]:
    """`vllm.LLM.generate` of the same prompts with the same engine settings, all handed in at once."""
    from distributed_mi.interests.backends.vllm import VllmBackend, chat_tokens
    from distributed_mi.interests.ladder import FIRST, Ladder
    from distributed_mi.interests.source import Source
    from distributed_mi.interests.work import make_context

    with tempfile.TemporaryDirectory() as folder:
        source = Source(make_workspace(Path(folder), exemplars, seed), config.max_history)
    context = make_context(config, source)
    ladder = Ladder(config.backend, config, context)
    backend = VllmBackend(config.backend.settings(), context)
    prompts = sorted(ladder.request(source.exemplars[u], FIRST).prompt for u in source.users)
    started = time.perf_counter()
    tokens = [{"prompt_token_ids": chat_tokens(backend._tokenizer, backend.config, p)} for p in prompts]
    sampling = backend._sampling(config.max_answer_tokens, constrained=True)
    outputs = backend.llm.generate(tokens, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "rows": len(outputs),
        "prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs),
        "answer_tokens": sum(len(o.outputs[0].token_ids) for o in outputs),
        "cached_tokens": sum(o.num_cached_tokens or 0 for o in outputs),
    }


def run_side(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement in this process."""
    if args.side == "machinery":
        config = InterestsConfig(
            backend={"name": "benchmarks.bench_interests:FakeBackend"},
            num_actors=args.engines,
            commit_every=args.commit_every,
        )
    else:
        config = vllm_config(args.model, args.engines, args.max_num_seqs)
    side = raw_side if args.side == "raw" else stage_side
    return side(config, args.prompts, args.seed)


def measure(args: argparse.Namespace, side: str, engines: int) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.bench_interests", "_side", "--side", side]
    command += ["--engines", str(engines), "--prompts", str(args.prompts), "--seed", str(args.seed)]
    command += ["--model", args.model or "", "--max-num-seqs", str(args.max_num_seqs)]
    command += ["--commit-every", str(args.commit_every)]
    print(f"{side}, {engines} engine(s), {args.prompts:,} prompts ...", file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=harness.ROOT)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _rate(found: dict[str, Any]) -> float:
    return float(found["answer_tokens"]) / float(found["seconds"])


def throughput(args: argparse.Namespace) -> None:
    """One engine in the stage beside `vllm.LLM.generate`."""
    runs: dict[str, list[dict[str, Any]]] = {"stage": [], "raw": []}
    order, shuffle = list(runs), random.Random(args.seed).shuffle
    for _ in range(args.repeats):
        shuffle(order)
        for side in order:
            runs[side].append(measure(args, side, 1))
    rows = []
    for side, found in runs.items():
        share = Spread.of([100 * _rate(f) / _rate(r) for f, r in zip(found, runs["raw"], strict=True)])
        rate = Spread.of([_rate(f) for f in found])
        prompts = Spread.of([f["prompt_tokens"] / f["seconds"] for f in found])
        seconds = Spread.of([f["seconds"] for f in found])
        last = found[-1]
        counts = [f"{last.get(n, 0):,}" for n in ("rows", "answer_tokens", "retries")]
        rows.append([side, *(s.text() for s in (seconds, rate, prompts, share)), *counts])
    median = Spread.of([100 * _rate(f) / _rate(r) for f, r in zip(runs["stage"], runs["raw"], strict=True)])
    verdict = "met" if median.median >= 95 else "MISSED"
    facts = {"stage, share of raw vLLM": f"{median.median:.3g} %, bar at least 95 %: {verdict}"}
    header = [
        "side",
        "s",
        "answer tokens/s",
        "prompt tokens/s",
        "% of raw",
        "answers",
        "answer tokens",
        "retries",
    ]
    notes = (
        "Median (smallest to largest) of runs that take turns, each in a process of its own, engine start left out. "
        "The stage also renders, parses and commits; raw vLLM gets all prompts at once. Same prompts, order, engine "
        "settings and schema."
    )
    _write(
        args,
        "throughput",
        Table(header, rows, [{"side": s, **f} for s, fs in runs.items() for f in fs]),
        notes,
        facts,
    )


def engines(args: argparse.Namespace) -> None:
    """Two engines beside one."""
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(args.repeats):
        for count, found in runs.items():
            found.append(measure(args, "stage", count))
    rows = []
    for count, found in runs.items():
        gain = Spread.of([_rate(f) / _rate(o) for f, o in zip(found, runs[1], strict=True)])
        rate = Spread.of([_rate(f) for f in found])
        rows.append([str(count), Spread.of([f["seconds"] for f in found]).text(), rate.text(), gain.text()])
    notes = "One OpenMP thread an engine; driver, raylet and engines share the cores of the machine."
    samples = [{"engines": c, **f} for c, fs in runs.items() for f in fs]
    _write(args, "engines", Table(["engines", "s", "answer tokens/s", "x one"], rows, samples), notes, {})


def machinery(args: argparse.Namespace) -> None:
    """Prompt, pool, parse and commit with an engine that answers at once."""
    found = [measure(args, "machinery", 2) for _ in range(args.repeats)]
    rate = Spread.of([f["rows"] / f["seconds"] for f in found])
    verdict = "met" if rate.median >= 3000 else "MISSED"
    rows = [[f"{found[-1]['rows']:,}", Spread.of([f["seconds"] for f in found]).text(), rate.text()]]
    facts = {"rate": f"{rate.median:,.0f} rows/s, bar at least 3,000: {verdict}"}
    notes = (
        f"Two actors, {args.commit_every} answers a shard; seconds from the moment at which both are ready."
    )
    _write(args, "machinery", Table(["exemplars", "s", "rows/s"], rows, found), notes, facts)


def _describe(model: str) -> str:
    """Architecture and size from a model's configuration."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    sizes = ", ".join(
        f"{config[k]} {k}" for k in ("num_hidden_layers", "hidden_size", "vocab_size") if k in config
    )
    return f"{config['architectures'][0]}: {sizes}"


def _write(args: argparse.Namespace, name: str, table: Table, notes: str, facts: dict[str, Any]) -> None:
    model = args.model_name
    settings = f"{args.prompts:,} prompts of {HISTORY} items, at most {args.max_num_seqs} sequences, seed {args.seed}"
    extra = {**facts, "model": model, "settings": settings, "repeats": args.repeats}
    table = Table(table.header, table.rows, table.samples, extra)
    path = harness.write_table(f"interests_{name}", table, notes=notes, folder=args.results)
    print(path.read_text(encoding="utf-8"))


COMMANDS = {f.__name__: f for f in (throughput, engines, machinery)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*COMMANDS, "_side"])
    parser.add_argument("--prompts", "--exemplars", type=int, help="by default 2,000, for machinery 10,000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="", help="directory that vLLM can load")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--commit-every", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--side", choices=["stage", "raw", "machinery"], help=argparse.SUPPRESS)
    parser.add_argument("--engines", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.prompts = args.prompts or (10_000 if args.command == "machinery" else 2_000)
    if args.command == "_side":
        print(json.dumps(run_side(args)))
        return 0
    args.model_name = _describe(args.model) if args.model else "none"
    if not args.model and args.command != "machinery":
        parser.error(
            "--model is needed: a directory that vLLM can load, for example from python -m tests.tiny_llm"
        )
    COMMANDS[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
