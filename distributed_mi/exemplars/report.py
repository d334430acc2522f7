"""Report of the exemplars stage: Markdown, and plots of cluster sizes and of the share of exemplars by preference."""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_BLUE, _ORANGE = "#2f6db5", "#d9762b"

SIZES, CURVE = "cluster_sizes.png", "share_by_preference.png"

_TITLES = 8
"""Titles of an exemplar's history that the report shows, the newest."""

_TITLE_CHARS = 90


def size_plot(sizes: np.ndarray) -> bytes:
    """Histogram of cluster sizes, in powers of two."""
    figure = Figure(figsize=(7.0, 3.8), layout="constrained")
    axes = figure.subplots()
    edges = 2.0 ** np.arange(int(np.log2(sizes.max())) + 2)
    counts, _ = np.histogram(sizes, edges)
    places = np.arange(len(counts))
    axes.bar_label(axes.bar(places, counts, width=0.85, color=_BLUE), fontsize=8)
    labels = [f"{int(a)}" if b - a == 1 else f"{int(a)}-{int(b) - 1}" for a, b in pairwise(edges)]
    axes.set_xticks(places, labels, fontsize=8)
    axes.set_xlabel("users of a cluster")
    axes.set_ylabel("clusters")
    axes.set_title(f"{len(sizes):,} exemplars for {int(sizes.sum()):,} users")
    return _png(figure)


def curve_plot(points: Sequence[tuple[float, float]], used: float) -> bytes:
    """Share of exemplars against minus the preference, both logarithmic; the preference used is marked."""
    figure = Figure(figsize=(7.0, 3.8), layout="constrained")
    axes = figure.subplots()
    ordered = sorted((-p, 100 * s) for p, s in points)
    axes.plot(*zip(*ordered, strict=True), color=_BLUE, marker="o", markersize=4)
    axes.axvline(-used, color=_ORANGE, linewidth=1.2, label=f"preference {used:.4g}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("minus the preference")
    axes.set_ylabel("exemplars, % of the users")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    return _png(figure)


def markdown(
    stats: Mapping[str, Any], pictures: Sequence[str], largest: Sequence[tuple[str, int, Sequence[str]]]
) -> str:
    """Text of `report.md`.

    Args:
        stats: of the manifest.
        pictures: file names beside the report.
        largest: exemplar's user id, users of its cluster, titles of its history, newest first; the largest clusters.
    """
    certificate = stats["certificate"]
    rows = [
        ("method", stats["method"]),
        ("exemplars", f"{stats['exemplars']:,} of {stats['users']:,} users ({100 * stats['share']:.2f} %)"),
        ("preference", f"{stats['preference']:.6g}"),
        (
            "converged",
            f"{'yes' if stats['converged'] else '**no**'}, {stats['rounds']} rounds, damping {stats['damping']}",
        ),
        ("oscillating users", f"{certificate['oscillating_users']:,}"),
        ("labels are a fixed point", "yes" if certificate["fixed_point"] else "no"),
        (
            "pairs kept",
            f"{stats['pairs']:,} ({100 * stats['pairs'] / stats['users'] ** 2:.2f} %), "
            + (
                "no other could matter"
                if certificate["proven"]
                else f"{certificate['unproven_rows']:,} users unproven"
            ),
        ),
        ("users without an exemplar in their list", f"{stats['users_without_listed_exemplar']:,}"),
        ("net similarity", f"{stats['net_similarity']:,.2f}"),
        ("greedy facility location, as many exemplars", _number(stats["facility_location_net_similarity"])),
        ("seconds", f"{stats['seconds']:,}"),
    ]
    if stats.get("moved") is not None:
        moved = stats["moved"]
        rows.append(
            (
                "against the previous run",
                f"{moved['users_moved']:,} of {moved['users_in_both']:,} users have another exemplar, "
                f"{moved['exemplars_kept']:,} exemplars kept, "
                f"{moved['exemplars_gone']:,} gone, {moved['exemplars_new']:,} new",
            )
        )
    lines = ["# Exemplars", "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]
    lines += [f"![{name}]({name})\n" for name in pictures]
    lines += ["## The largest clusters", ""]
    for user_id, size, titles in largest:
        lines += [f"### {_plain(user_id)}: {size:,} users", ""]
        lines += [f"* {_plain(t)}" for t in titles[:_TITLES]]
        if len(titles) > _TITLES:
            lines.append(f"* and {len(titles) - _TITLES} older ones")
        lines.append("")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A title as text: it can end no line, open no tag and set no link (titles come from anywhere)."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_TITLE_CHARS]
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|<>~" else c for c in text)


def _number(value: float | None) -> str:
    return "not computed" if value is None else f"{value:,.2f}"


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=150)
    return buffer.getvalue()
