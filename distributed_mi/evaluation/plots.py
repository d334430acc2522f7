"""PNG plots of a report. Figures are made without pyplot, so nothing global is changed and no display is needed."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.fs as pafs

from distributed_mi.core.artifacts import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_BLUE, _ORANGE, _GREY = "#2f6db5", "#d9762b", "#5a5a5a"
_DPI = 150


def draw_all(content: Mapping[str, Any], workspace: Workspace, run_name: str) -> dict[str, bytes]:
    """File name -> PNG bytes of every plot whose data are there.

    Args:
        content: of `report.json`.
        workspace: read for the training curve and the exemplar clusters.
        run_name: of the training run.
    """
    pictures = {"metrics.png": metrics(content)}
    lines = training_lines(workspace, run_name)
    if lines:
        pictures["training_curve.png"] = training_curve(lines, run_name)
    sizes = cluster_sizes(workspace)
    if sizes is not None:
        pictures["exemplar_clusters.png"] = exemplar_clusters(sizes)
    return pictures


def training_lines(workspace: Workspace, run_name: str) -> list[dict[str, Any]]:
    """Lines of the run's `metrics.jsonl`; none for a model that has no training steps."""
    path = workspace.stage(f"train/{run_name}").path("metrics.jsonl")
    if workspace.fs.get_file_info(path).type != pafs.FileType.File:
        return []
    with workspace.fs.open_input_stream(path) as stream:
        return [json.loads(line) for line in stream.read().decode().splitlines() if line.strip()]


def cluster_sizes(workspace: Workspace) -> np.ndarray | None:
    """Users of each exemplar, or None when the exemplars stage has not run."""
    stage = workspace.stage("exemplars")
    if stage.manifest() is None:
        return None
    return stage.read("exemplars", "exemplars", columns=["num_users"])["num_users"].to_numpy()


def metrics(content: Mapping[str, Any]) -> bytes:
    """Horizontal bars of the metrics with their intervals."""
    known = {n: m for n, m in content["metrics"].items() if m["value"] is not None}
    figure = _figure(7.0, 1.4 + 0.34 * max(len(known), 1))
    axes = figure.subplots()
    values = [m["value"] for m in known.values()]
    low = [m["value"] - m["ci95"][0] if m["ci95"] else np.nan for m in known.values()]
    high = [m["ci95"][1] - m["value"] if m["ci95"] else np.nan for m in known.values()]
    places = np.arange(len(known))
    # NaN draws no bar; a metric that is the same for all users has an interval that is off by a rounding error.
    errors = np.maximum(np.array([low, high]), 0.0)
    reach = np.nan_to_num(errors[1])
    axes.barh(
        places, values, height=0.62, color=_BLUE, xerr=errors, error_kw={"ecolor": "black", "capsize": 3}
    )
    for place, value, above in zip(places, values, reach, strict=True):
        axes.annotate(
            f"{value:.4f}",
            (value + above, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(places, list(known))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max([v + e for v, e in zip(values, reach, strict=True)], default=1.0) or 1.0)
    axes.set_xlabel("value, bars with 95 % bootstrap intervals")
    axes.set_title(f"{content['run']}: {content['num_users']:,} {content['split']} users")
    return _png(figure)


def training_curve(lines: Sequence[Mapping[str, Any]], run_name: str) -> bytes:
    """Loss above, validation metrics below, over steps."""
    figure = _figure(7.0, 5.6)
    above, below = figure.subplots(2, 1, sharex=True)
    losses = [(x["step"], x["loss"]) for x in lines if x.get("kind") == "train"]
    if losses:
        above.plot(*zip(*losses, strict=True), color=_GREY, linewidth=1.2)
    above.set_ylabel("training loss")
    above.set_title(f"{run_name}: training")
    for number, (name, points) in enumerate(sorted(validation_curves(lines).items())):
        steps, values = zip(*points, strict=True)
        below.plot(steps, values, marker="o", markersize=3.5, linewidth=1.4, label=name, color=f"C{number}")
        best = int(np.argmax(values))
        below.annotate(f"{values[best]:.4f}", (steps[best], values[best]), (0, 6), textcoords="offset points",
                       ha="center", fontsize=8)  # fmt: skip
    if below.lines:
        below.legend(loc="best", fontsize=8, framealpha=0.8)
        below.margins(y=0.15)
    below.set_ylabel("validation metric")
    below.set_xlabel("step")
    return _png(figure)


def validation_curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) points, from the lines of kind "validation"."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        if line.get("kind") == "validation":
            for name, value in line["metrics"].items():
                curves.setdefault(name, []).append((line["step"], value))
    return curves


def exemplar_clusters(sizes: np.ndarray) -> bytes:
    """How many users each exemplar stands for, largest first, and the share of users they cover together."""
    ordered = np.sort(sizes)[::-1]
    figure = _figure(7.0, 4.2)
    axes = figure.subplots()
    log_scale = bool(ordered[0] > 50)
    edges = np.arange(len(ordered) + 1) + 0.5
    axes.stairs(ordered, edges, baseline=0.5 if log_scale else 0, fill=True, color=_BLUE, alpha=0.85)
    if log_scale:
        axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 if log_scale else 0)
    axes.set_xlim(0.5, len(ordered) + 0.5)
    axes.set_xlabel("exemplar, by cluster size")
    axes.set_ylabel("users of the cluster", color=_BLUE)
    share = axes.twinx()
    share.plot(edges[:-1] + 0.5, np.cumsum(ordered) / ordered.sum(), color=_ORANGE, linewidth=1.6)
    share.set_ylim(0, 1.02)
    share.set_ylabel("share of users covered", color=_ORANGE)
    axes.set_title(
        f"{len(ordered):,} exemplars for {ordered.sum():,} users (median cluster {np.median(ordered):,.0f} users)"
    )
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.spines["top"].set_visible(False)
        if axes.yaxis.get_label_position() == "left":
            axes.grid(alpha=0.25)
            axes.spines["right"].set_visible(False)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
