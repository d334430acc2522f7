"""Paired comparison of two runs on the same users.

Differences are B minus A, user by user, so that what makes a user easy or hard for both runs cancels.

Shapes:  U users, M metrics, R random sign assignments.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from distributed_mi.core.artifacts import Manifest, read_table
from distributed_mi.core.errors import InputError
from distributed_mi.core.resampling import sign_flip_p_values
from distributed_mi.core.schema import TABLES
from distributed_mi.evaluation import report
from distributed_mi.evaluation.metrics.base import Floats
from distributed_mi.evaluation.scoring import intervals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetricComparison:
    """One metric of two runs."""

    metric: str
    value_a: float
    value_b: float
    difference: float
    """Mean over users of B minus A."""
    relative: float | None
    """`difference / value_a`; None when A is 0."""
    ci95: tuple[float, float]
    """95 % percentile bootstrap interval of the difference, users resampled in pairs."""
    p_value: float
    """Two-sided, from random sign flips of the users' differences."""
    p_mcnemar: float | None
    """Exact McNemar test, for metrics that are 0 or 1 for each user; else None."""


@dataclass(frozen=True)
class Comparison:
    """Two runs, metric by metric."""

    run_a: str
    run_b: str
    protocol: str
    num_users: int
    metrics: list[MetricComparison]
    leakage: list[str]
    """The leakage sentence of each report; one if they agree."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def to_text(self) -> str:
        """Plain text for a terminal."""
        lines = [f"A = {self.run_a}, B = {self.run_b}; {self.num_users:,} users, paired by user"]
        lines += report.align([_HEADER, *(_cells(m) for m in self.metrics)])
        lines += [f"Protocol: {self.protocol}.", *self.leakage, _LEGEND]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The same as a Markdown table."""
        rows = [_HEADER, ["---", *["---:"] * (len(_HEADER) - 1)], *(_cells(m) for m in self.metrics)]
        table = ["| " + " | ".join(row) + " |" for row in rows]
        head = f"A = `{self.run_a}`, B = `{self.run_b}`; {self.num_users:,} users, paired by user."
        return "\n".join([head, "", *table, "", f"Protocol: {self.protocol}.", *self.leakage, _LEGEND, ""])


def render(comparison: Comparison, *, as_json: bool = False) -> str:
    """Text for the terminal, or JSON."""
    return json.dumps(comparison.to_dict(), indent=2) if as_json else comparison.to_text()


_HEADER = ["metric", "A", "B", "B - A", "relative", "95 % interval", "p", "p McNemar"]
_LEGEND = "Interval: paired bootstrap over users. p: two-sided sign flips. No correction for testing several metrics."


def _cells(m: MetricComparison) -> list[str]:
    return [
        m.metric,
        f"{m.value_a:.4f}",
        f"{m.value_b:.4f}",
        f"{m.difference:+.4f}",
        "n/a" if m.relative is None else f"{m.relative:+.1%}",
        f"[{m.ci95[0]:+.4f}, {m.ci95[1]:+.4f}]",
        f"{m.p_value:.4f}",
        "" if m.p_mcnemar is None else f"{m.p_mcnemar:.4f}",
    ]


def compare(
    path_a: str, path_b: str, *, samples: int = 1000, permutations: int = 10_000, seed: int = 7
) -> Comparison:
    """Compare two reports user by user.

    Args:
        path_a: `report.json` of the first run, or its folder.
        path_b: of the second.
        samples: bootstrap resamples.
        permutations: random sign assignments.
        seed: of both.

    Raises:
        InputError: a report is missing, or they do not have protocol, users or any metric in common.
    """
    (report_a, users_a), (report_b, users_b) = _load(path_a), _load(path_b)
    for key in ("protocol", "split"):
        if report_a[key] != report_b[key]:
            raise InputError(
                f"the reports differ in {key}, so their numbers are not comparable: "
                f"{report_a[key]!r} in {path_a}, {report_b[key]!r} in {path_b}"
            )
    _check_same_users(users_a, users_b, path_a, path_b)
    fixed = set(TABLES["per_user"].names)
    names = [n for n in users_a.column_names if n in users_b.column_names and n not in fixed]
    if not names:
        raise InputError(f"the reports have no metric in common: {path_a}, {path_b}")
    per_user = {n: (users_a[n].to_numpy(), users_b[n].to_numpy()) for n in names}
    return Comparison(
        run_a=str(report_a["run"]),
        run_b=str(report_b["run"]),
        protocol=f"{report_a['protocol']} ({report_a['split']} users)",
        num_users=users_a.num_rows,
        metrics=compare_values(per_user, samples=samples, permutations=permutations, seed=seed),
        leakage=list(dict.fromkeys(report.leakage_sentence(r["leakage"]) for r in (report_a, report_b))),
    )


def _load(path: str) -> tuple[dict[str, Any], pa.Table]:
    content = report.read(path)
    filesystem, file = report.open_report(path)
    folder = file.rsplit("/", 1)[0]
    try:
        with filesystem.open_input_stream(f"{folder}/manifest.json") as stream_:
            manifest = Manifest.from_json(stream_.read(), f"{folder}/manifest.json")
    except FileNotFoundError as error:
        raise InputError(
            f"{path} stands alone: compare reads the users' metrics beside it, and {folder} has no manifest.json. "
            "Name the report inside its workspace."
        ) from error
    table = read_table(filesystem, f"{folder}/{manifest.generation}/per_user", "per_user")
    return content, table.sort_by("user_id")


def _check_same_users(a: pa.Table, b: pa.Table, path_a: str, path_b: str) -> None:
    same = a.num_rows == b.num_rows and all(
        a[c].combine_chunks().equals(b[c].combine_chunks()) for c in ("user_id", "num_history", "num_labels")
    )
    if not same:
        common = len(set(a["user_id"].to_pylist()) & set(b["user_id"].to_pylist()))
        raise InputError(
            f"the reports were not made on the same users and events ({a.num_rows:,} users in {path_a}, {b.num_rows:,} "
            f"in {path_b}, {common:,} in both): compare runs of one workspace, or of workspaces with equal [data]"
        )


def compare_values(
    per_user: Mapping[str, tuple[Floats, Floats]], *, samples: int, permutations: int, seed: int
) -> list[MetricComparison]:
    """Compare paired values.

    Args:
        per_user: metric -> values of A and of B, float64 `[U]` each, in the same user order.
        samples: bootstrap resamples.
        permutations: random sign assignments.
        seed: of both.
    """
    differences = {name: b - a for name, (a, b) in per_user.items()}
    bands = intervals(differences, samples, seed)
    p_values = sign_flip_p_values(np.stack(list(differences.values()), axis=1), permutations, seed)
    out = []
    for (name, (a, b)), p_value in zip(per_user.items(), p_values, strict=True):
        mean_a, difference = float(a.mean()), float(differences[name].mean())
        binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()) and name.startswith("hit_rate@")
        out.append(
            MetricComparison(
                metric=name,
                value_a=mean_a,
                value_b=float(b.mean()),
                difference=difference,
                relative=difference / mean_a if mean_a else None,
                ci95=bands.get(name, (difference, difference)),
                p_value=float(p_value),
                p_mcnemar=mcnemar(a, b) if binary else None,
            )
        )
    return out


def mcnemar(a: Floats, b: Floats) -> float:
    """Exact two-sided McNemar test of paired 0/1 values: a binomial test of the users on whom the runs disagree.

    McNemar, Psychometrika 1947; 1.0 when they never disagree.
    """
    from scipy.stats import binomtest

    only_b, only_a = int(((b == 1) & (a == 0)).sum()), int(((a == 1) & (b == 0)).sum())
    return float(binomtest(only_b, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
