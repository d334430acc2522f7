"""Reports: `report.json` for machines, `report.md` for people, and a side-by-side table of runs for the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from distributed_mi.core.artifacts import Manifest, resolve_url
from distributed_mi.core.errors import InputError

_REQUIRED = ("model", "run", "protocol", "split", "num_users", "metrics", "leakage")


def build(
    *,
    run: str,
    model: str,
    protocol: str,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    intervals: Mapping[str, tuple[float, float]],
    leakage: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Content of `report.json`.

    Args:
        run: name of the training run.
        model: registry name of its model.
        protocol: in words, see `protocol.describe`.
        config: `EvaluateConfig.result_fields()`.
        result: `values`, `num_users`, `skipped_users` of `stage.evaluate_worker`.
        intervals: metric -> 95 % interval; missing for metrics without a value per user.
        leakage: the check of the prepare stage.
        checkpoint: what is known of the evaluated weights.
        seconds: wall time of ranking and scoring.
    """
    metrics = {
        name: {"value": value, "ci95": list(intervals[name]) if name in intervals else None}
        for name, value in result["values"].items()
    }
    return {
        "model": model,
        "run": run,
        "protocol": protocol,
        "split": config["split"],
        "num_users": result["num_users"],
        "skipped_users": result["skipped_users"],
        "metrics": metrics,
        "leakage": dict(leakage),
        "checkpoint": dict(checkpoint),
        "config": dict(config),
        "seconds": round(seconds, 3),
    }


def checkpoint_facts(train: Manifest) -> dict[str, Any]:
    """Generation of the run, and step and validation score of its best checkpoint as far as its manifest has them."""
    wanted = ("step", "best_step", "best_value", "validation_metric", "steps", "stopped")
    facts: dict[str, Any] = {"generation": train.generation}
    facts.update({k: train.stats[k] for k in wanted if k in train.stats})
    facts.setdefault("step", facts.get("best_step"))
    return facts


def to_json(content: Mapping[str, Any]) -> bytes:
    """Bytes of `report.json`."""
    return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"


def read(path: str) -> dict[str, Any]:
    """Read a report.

    Args:
        path: `report.json`, or the folder that holds it; local or a URL.

    Raises:
        InputError: it is missing or is not a report.
    """
    filesystem, file = open_report(path)
    with filesystem.open_input_stream(file) as stream:
        data = stream.read()
    try:
        content = json.loads(data)
    except ValueError as error:
        raise InputError(f"{path} is not a report: {error}") from error
    missing = [key for key in _REQUIRED if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"{path} is not a report of `distributed-mi evaluate`: {', '.join(missing)} missing")
    return content


def open_report(path: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of the `report.json` behind a file or folder name.

    Raises:
        InputError: there is none; says which command writes it.
    """
    filesystem, file = resolve_url(path)
    if filesystem.get_file_info(file).type == pafs.FileType.Directory:
        file = f"{file}/report.json"
    if filesystem.get_file_info(file).type != pafs.FileType.File:
        raise InputError(
            f"no report at {path}: name <workspace>/evaluate/<run>/report.json, or run `distributed-mi evaluate CONFIG`"
        )
    return filesystem, file


def leakage_sentence(leakage: Mapping[str, Any]) -> str:
    """One sentence that stands beside every metric: prepare's own, which begins with the verdict."""
    if not leakage:
        return "Leakage check: not recorded by prepare."
    return str(leakage.get("text") or f"Leakage check {'passed' if leakage.get('passed') else 'FAILED'}.")


def metric_text(entry: Mapping[str, Any] | None) -> str:
    """`0.1234 [0.1111, 0.1357]`, without an interval when there is none, `n/a` without a value."""
    if entry is None or entry.get("value") is None:
        return "n/a"
    interval = entry.get("ci95")
    return f"{entry['value']:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def to_markdown(content: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """Text of `report.md`.

    Args:
        content: see `build`.
        pictures: names of PNG files beside the report.
    """
    step = content["checkpoint"].get("step")
    lines = [
        f"# {content['run']}",
        "",
        f"Model `{content['model']}`{f', checkpoint of step {step:,}' if step is not None else ''}, "
        f"{content['num_users']:,} {content['split']} users "
        f"({content['skipped_users']:,} skipped: no history or no label).",
        f"Protocol: {content['protocol']}.",
        "",
        "| metric | value | 95 % interval |",
        "| --- | ---: | ---: |",
    ]
    for name, entry in content["metrics"].items():
        value = "n/a" if entry["value"] is None else f"{entry['value']:.4f}"
        interval = "" if entry["ci95"] is None else f"{entry['ci95'][0]:.4f} to {entry['ci95'][1]:.4f}"
        lines.append(f"| {name} | {value} | {interval} |")
    lines += ["", leakage_sentence(content["leakage"]), ""]
    samples = content["config"].get("bootstrap_samples")
    lines += [
        f"Intervals: percentile bootstrap over users, {samples} resamples. n/a: the items have no categories.",
        "",
    ]
    lines += [f"![{Path(name).stem.replace('_', ' ')}]({name})\n" for name in pictures]
    return "\n".join(lines)


def format_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Runs side by side as plain text: a row for each metric, a column for each run, the leakage check underneath.

    Args:
        reports: contents of `report.json` files.
    """
    if not reports:
        return "no reports"
    names = list(dict.fromkeys(name for r in reports for name in r["metrics"]))
    rows = [["metric", *(str(r["run"]) for r in reports)]]
    rows += [[name, *(metric_text(r["metrics"].get(name)) for r in reports)] for name in names]
    rows.append(["users", *(f"{r['num_users']:,}" for r in reports)])
    lines = align(rows)
    for text in dict.fromkeys(f"Protocol: {r['protocol']} ({r['split']} users)." for r in reports):
        lines.append(text)
    lines.extend(dict.fromkeys(leakage_sentence(r["leakage"]) for r in reports))
    return "\n".join(lines)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a text table: first row as header with a rule, first column left, the others right aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
