"""What answers cost: tokens, seconds, retries, money and energy, per run and over all runs of a workspace.

Each run keeps one JSON file, written anew with every committed shard, so that a killed run has its account too. Only
what a backend was asked counts; replies of a cache, and exemplars that share a prompt, are counted beside it as saved.
"""

import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from distributed_mi.core.artifacts import StageDirectory, list_files, write_bytes
from distributed_mi.interests.config import Prices
from distributed_mi.interests.ladder import FIRST, Outcome

logger = logging.getLogger(__name__)

FOLDER = "ledger"


@dataclass
class Account:
    """Sums of a run, or of several."""

    exemplars: int = 0
    """Answered, from wherever."""
    requests: int = 0
    """Asked of the backend."""
    retries: int = 0
    """Of them those of a later step of the ladder."""
    errors: int = 0
    """Of them those that the backend could not answer."""
    replies_from_cache: int = 0
    duplicates: int = 0
    """Exemplars whose prompt is another one's."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of them those that the backend did not have to read again."""
    num_answer_tokens: int = 0
    seconds: float = 0.0
    """From the plan of the run to the last committed answer."""
    engine_seconds: float = 0.0
    """For which engines were held, loading included, summed over engines."""
    joules: float | None = None
    """Of this machine's devices; None where none tells."""

    def count(self, outcomes: Sequence[Outcome]) -> None:
        """Add what the backend was asked for these exemplars."""
        self.exemplars += len(outcomes)
        for reply in (r for o in outcomes for r in o.replies):
            self.requests += 1
            self.retries += reply.step != FIRST
            self.errors += reply.response.error is not None
            self.num_prompt_tokens += reply.response.num_prompt_tokens
            self.num_cached_tokens += reply.response.num_cached_tokens
            self.num_answer_tokens += reply.response.num_answer_tokens

    def add(self, other: "Account") -> None:
        """Add another account's sums."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if theirs is not None:
                setattr(self, f.name, theirs if mine is None else mine + theirs)

    def money(self, prices: Prices) -> float:
        """In the currency of the prices."""
        cached_price = prices.cached_input_per_million
        if cached_price is None:
            cached_price = prices.input_per_million
        fresh = self.num_prompt_tokens - self.num_cached_tokens
        return (
            fresh * prices.input_per_million / 1e6
            + self.num_cached_tokens * cached_price / 1e6
            + self.num_answer_tokens * prices.output_per_million / 1e6
            + self.engine_seconds * prices.engine_hour / 3600
            + (self.joules or 0.0) * prices.kilowatt_hour / 3.6e6
        )

    def report(self, prices: Prices) -> dict[str, Any]:
        """All sums, the money, and what one exemplar cost."""
        money = self.money(prices)
        return {
            **{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()},
            "money": round(money, 6),
            "money_per_exemplar": round(money / self.exemplars, 9) if self.exemplars else 0.0,
            "currency": prices.currency,
        }


@dataclass
class Ledger:
    """The accounts of a workspace's interests stage.

    Args:
        directory: of the stage; survives its generations.
        backend: name in the configuration.
        model: of that backend.
        prices: what things cost.
    """

    directory: StageDirectory
    backend: str
    model: str
    prices: Prices
    run: str = field(default_factory=lambda: f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}")
    account: Account = field(default_factory=Account)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def write(self) -> None:
        """Put this run's account on disk; nothing is written for a run that has not done anything."""
        if not self.account.exemplars:
            return
        entry = {
            "run": self.run,
            "started": self.started,
            "backend": self.backend,
            "model": self.model,
            **self.account.report(self.prices),
        }
        data = json.dumps(entry, indent=1, ensure_ascii=False).encode()
        write_bytes(self.directory.fs, f"{self.directory.base}/{FOLDER}/{self.run}.json", data)

    def cumulative(self) -> dict[str, Any]:
        """All runs together; the money is the sum of what each run's prices made of it."""
        runs = read_runs(self.directory)
        total = Account()
        for entry in runs:
            total.add(account_of(entry))
        report = total.report(Prices(currency=self.prices.currency))
        money = sum(float(e.get("money", 0.0)) for e in runs)
        report["money"] = round(money, 6)
        report["money_per_exemplar"] = round(money / total.exemplars, 9) if total.exemplars else 0.0
        return {"runs": len(runs), **report}


def read_runs(directory: StageDirectory) -> list[dict[str, Any]]:
    """The entries of all runs, oldest first; one that cannot be read is said and left out."""
    found = []
    for path in list_files(directory.fs, f"{directory.base}/{FOLDER}", ".json"):
        try:
            with directory.fs.open_input_stream(path) as stream:
                entry = json.loads(stream.read())
        except (OSError, ValueError) as error:
            logger.warning("interests: %s of the ledger cannot be read: %s", path, error)
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def render(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line for each run, and their sums; money of different currencies is not added up."""
    if not runs:
        return "no run of the interests stage has an account yet"
    head = ("started", "backend", "exemplars", "requests", "retries", "tokens in", "tokens out", "s", "money")
    names = ("exemplars", "requests", "retries", "num_prompt_tokens", "num_answer_tokens", "seconds")

    def cells(entry: Mapping[str, Any], started: str, backend: str) -> list[str]:
        numbers = [f"{float(entry.get(n) or 0):,.0f}" for n in names]
        return [
            started,
            backend,
            *numbers,
            f"{float(entry.get('money') or 0):,.4f} {entry.get('currency', '')}",
        ]

    rows = [list(head), *(cells(e, str(e.get("started", "")), str(e.get("backend", ""))) for e in runs)]
    currencies = {str(e.get("currency", "")) for e in runs}
    if len(runs) > 1 and len(currencies) == 1:
        total = {n: sum(float(e.get(n) or 0) for e in runs) for n in (*names, "money")}
        rows.append(cells({**total, "currency": currencies.pop()}, "all", ""))
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    )


def account_of(entry: Mapping[str, Any]) -> Account:
    """The sums in a run's entry; what is missing or no number counts as nothing."""
    values = {f.name: entry[f.name] for f in fields(Account) if isinstance(entry.get(f.name), int | float)}
    return Account(**values)
