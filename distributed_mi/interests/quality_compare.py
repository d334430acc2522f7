"""Two backends compared on the same users, from the reports that `evaluate.py` wrote."""

from typing import Any

import numpy as np
import pyarrow as pa

from distributed_mi.core.artifacts import Manifest, read_table, resolve_url
from distributed_mi.core.errors import InputError
from distributed_mi.interests import quality_report
from distributed_mi.interests.evaluate import STAGE, read_json
from distributed_mi.interests.quality_users import POPULATIONS
from distributed_mi.interests.resampling import Floats, Ints, paired_differences


def compare(
    report_a: str, report_b: str, *, samples: int = 1_000, permutations: int = 10_000, seed: int = 7
) -> dict[str, Any]:
    """Compare the interests of two workspaces user by user; differences are B minus A.

    A workspace holds the interests of one backend: give each backend its own, with equal prepare, embed and exemplars.

    Args:
        report_a: `report.json` of the first, or its folder `<workspace>/interests/quality`; a path or URL.
        report_b: of the second.
        samples: bootstrap resamples.
        permutations: random sign assignments behind each p-value.
        seed: of both.

    Returns:
        JSON-ready: both backends, and for each population its metrics as `Difference.to_dict`.

    Raises:
        InputError: a report is missing, or they were made with other settings, users, later items or exemplars.
    """
    (a, tables_a), (b, tables_b) = _load(report_a), _load(report_b)
    for what in ("split", "settings", "num_others", "item_text"):
        if a[what] != b[what]:
            raise InputError(
                f"the reports differ in {what}, so their numbers are not comparable: {a[what]!r} in {report_a}, "
                f"{b[what]!r} in {report_b}"
            )
    populations = {}
    for name in POPULATIONS:
        pairs = _pair(tables_a[name], tables_b[name], f"{name} of {report_a} and {report_b}")
        found = paired_differences(*pairs, samples=samples, permutations=permutations, seed=seed)
        populations[name] = {
            "saw_whole_history": a["populations"][name]["saw_whole_history"],
            "metrics": {d.metric: d.to_dict() for d in found},
        }
    facts = ("backend", "models", "interests_per_exemplar")
    return {
        "a": {n: a[n] for n in facts},
        "b": {n: b[n] for n in facts},
        "num_exemplars": a["num_exemplars"],
        "num_others": a["num_others"],
        "populations": populations,
    }


def render_comparison(comparison: dict[str, Any]) -> str:
    """Table for the terminal."""
    return quality_report.comparison_text(comparison)


def _load(path: str) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """A report and the table of each population.

    Raises:
        InputError: there is none.
    """
    filesystem, folder = resolve_url(path)
    folder = folder.removesuffix("/report.json")
    try:
        content = read_json(filesystem, f"{folder}/report.json")
        with filesystem.open_input_stream(f"{folder}/manifest.json") as stream:
            manifest = Manifest.from_json(stream.read(), f"{folder}/manifest.json")
    except FileNotFoundError as error:
        raise InputError(
            f"no report at {path}: name <workspace>/{STAGE}, or run `distributed-mi interests evaluate CONFIG`"
        ) from error
    root = f"{folder}/{manifest.generation}"
    return content, {
        n: read_table(filesystem, f"{root}/{n}", "per_user").sort_by("user_id") for n in POPULATIONS
    }


def _pair(a: pa.Table, b: pa.Table, what: str) -> tuple[dict[str, Floats], dict[str, Floats], Ints]:
    """Metrics of both sides for the same users, and their exemplars as groups.

    Raises:
        InputError: users, later items or exemplars differ.
    """
    keys = ["user_id", "num_history", "num_labels", "exemplar_user_index"]
    if not a.select(keys).combine_chunks().equals(b.select(keys).combine_chunks()):
        raise InputError(
            f"the {what} are not the same users with the same later items and exemplars: compare workspaces with "
            "equal [data], [embed] and [exemplars]"
        )
    metrics = [n for n in a.column_names if n in b.column_names and pa.types.is_float64(a[n].type)]
    sides = [{m: t[m].to_numpy().astype(np.float64) for m in metrics} for t in (a, b)]
    return sides[0], sides[1], a["exemplar_user_index"].to_numpy()
