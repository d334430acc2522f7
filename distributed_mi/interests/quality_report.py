"""The report of `evaluate.py` as text for the terminal, as Markdown and as plots."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distributed_mi.interests.quality import NEAR_DUPLICATE, SEMANTIC
from distributed_mi.interests.resampling import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#2f6db5", "#d9762b", "#5a5a5a"
_DPI = 150
_SEEN = "SEEN"
_WITHIN = {
    "coverage": "coverage",
    "distinctness": "distinctness",
    "near_duplicates": f"near duplicates (cosine > {NEAR_DUPLICATE:g})",
}
_LEGEND = (
    "rank_percentile: share of the other exemplars' interests that fit the user's later items less well, ties counted "
    "half; 1 is best. swapped: the same interests for the later items of a user with another exemplar. lift: the "
    "difference, 0 by chance also where interest sets differ in size, as those of members do; compare populations and "
    "backends by it. random: a random other exemplar's interests for the user's own later items. Intervals: 95 %, "
    "bootstrap over users, those of one exemplar together; p: two-sided sign flips."
)


def text(report: Mapping[str, Any]) -> str:
    """Plain text for a terminal."""
    parts = [_head(report), "", *_align(_semantic_rows(report)), "", *_notes(report)]
    if report["chance"]:
        parts += ["", *_align(_lift_rows(report))]
    return "\n".join([*parts, "", *_align(_within_rows(report)), "", _LEGEND])


def markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """Text of report.md.

    Args:
        report: content of report.json.
        pictures: names of PNG files beside the report.
    """
    lines = ["# Quality of the interests", "", _head(report), "", *_pipes(_semantic_rows(report)), ""]
    lines += [f"* {note}" for note in _notes(report)]
    if report["chance"]:
        lines += ["", "Against the same interests for other users' later items:", ""]
        lines += _pipes(_lift_rows(report))
    lines += ["", "Within an exemplar:", "", *_pipes(_within_rows(report)), "", _LEGEND, ""]
    settings = ", ".join(f"{k} {v}" for k, v in report["settings"].items())
    lines += [f"Settings: {settings}.", ""]
    lines += [f"![{Path(name).stem.replace('_', ' ')}]({name})\n" for name in pictures]
    return "\n".join(lines)


def _head(report: Mapping[str, Any]) -> str:
    models = ", ".join(report["models"]) or "model unknown"
    steps = ", ".join(f"{n:,} {step}" for step, n in report["steps"].items() if n)
    return (
        f"{report['num_exemplars']:,} exemplars, {report['interests_per_exemplar']:g} interests each, by "
        f"{report['backend']} ({models}{f'; answers by step: {steps}' if steps else ''}); split {report['split']}; "
        f"item text: {', '.join(report['item_text'])}."
    )


def _marked(name: str, section: Mapping[str, Any]) -> str:
    return f"{name} ({_SEEN})" if section["saw_whole_history"] else name


def _semantic_rows(report: Mapping[str, Any]) -> list[list[str]]:
    sections = report["populations"]
    rows = [["score", "chance", *(_marked(n, s) for n, s in sections.items())]]
    for metric in SEMANTIC:
        level = report["chance"].get(metric)
        cells = (_number(s["scores"][metric]) for s in sections.values())
        rows.append([metric, "n/a" if level is None else f"{level:.4f}", *cells])
    for name, key in (
        ("users scored", "users"),
        ("users without later items", "without_later_items"),
        ("later items per user", "later_items_per_user"),
        ("interests per user", "interests_per_user"),
    ):
        rows.append([name, "", *(_count(s[key]) for s in sections.values())])
    return rows


def _lift_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = [["rank_percentile", "own", "swapped", "lift", "95 % interval", "p", "users", "random"]]
    for name, section in report["populations"].items():
        found = section["lift"]["rank_percentile"]
        random = section["random_exemplar"]["rank_percentile"]["value"]
        rows.append(
            [
                _marked(name, section),
                *_difference(found, "value_b", "value_a"),
                f"{found['num_users']:,}",
                "n/a" if random is None else f"{random:.4f}",
            ]
        )
    return rows


def _within_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = [["within an exemplar", "mean", "exemplars"]]
    rows += [
        [label, _number(report["within"][name]), f"{report['within'][name]['num_users']:,}"]
        for name, label in _WITHIN.items()
    ]
    return rows


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the numbers."""
    notes = [f"Each user's interests are ranked among those of {report['num_others']:,} other exemplars."]
    for name, s in report["populations"].items():
        if s["reason"]:
            notes.append(f"{name}: not scored, {s['reason']}.")
        elif s["saw_whole_history"]:
            notes.append(
                f"{name} ({_SEEN}): {s['caveat']}. The number tells how well interests describe, not whether they "
                "foretell; compare it with numbers of the same label only."
            )
        if s["available"] > s["drawn"]:
            notes.append(f"{name}: {s['drawn']:,} users drawn from {s['available']:,}.")
        if s["later_items_without_text"]:
            notes.append(f"{name}: {s['later_items_without_text']:,} later items without text are left out.")
    return notes


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Plain text for a terminal."""
    sides = [f"{side.upper()} = {comparison[side]['backend']}" for side in ("a", "b")]
    lines = [f"{', '.join(sides)}; paired by user, {comparison['num_exemplars']:,} exemplars"]
    for name, section in comparison["populations"].items():
        rows = [[_marked(name, section), "A", "B", "B - A", "95 % interval", "p", "users"]]
        for metric, d in section["metrics"].items():
            rows.append([metric, *_difference(d, "value_a", "value_b"), f"{d['num_users']:,}"])
        lines += ["", *_align(rows)]
    return "\n".join([*lines, "", "p: two-sided sign flips; no correction for testing several metrics."])


def _difference(found: Mapping[str, Any], first: str, second: str) -> list[str]:
    if found["difference"] is None:
        return ["n/a"] * 5
    band = "" if not found["ci95"] else f"[{found['ci95'][0]:+.4f}, {found['ci95'][1]:+.4f}]"
    return [
        f"{found[first]:.4f}",
        f"{found[second]:.4f}",
        f"{found['difference']:+.4f}",
        band,
        f"{found['p_value']:.4f}",
    ]


def _number(found: Mapping[str, Any]) -> str:
    """`0.1234 [0.1111, 0.1357]`, or `n/a`."""
    if found["value"] is None:
        return "n/a"
    return f"{found['value']:.4f}" + ("" if not found["ci95"] else " [{:.4f}, {:.4f}]".format(*found["ci95"]))


def _count(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,}"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """A text table: first row as header with a rule, first column left, the others right aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return [lines[0].rstrip(), "  ".join("-" * w for w in widths), *(line.rstrip() for line in lines[1:])]


def _pipes(rows: Sequence[Sequence[str]]) -> list[str]:
    """The same as a Markdown table."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def plots(report: Mapping[str, Any], per_user: Mapping[str, Mapping[str, Floats]]) -> dict[str, bytes]:
    """File name -> PNG bytes of every plot whose data are there.

    Args:
        report: content of report.json.
        per_user: population -> metric -> float64 `[U]`, NaN where a user has no value.
    """
    scored = {n: s for n, s in report["populations"].items() if s["users"]}
    pictures = {"within_exemplars.png": _within_plot(report, per_user["exemplars"])}
    if scored:
        pictures["rank_percentile.png"] = _rank_plot(report, scored, per_user)
    return pictures


def _rank_plot(
    report: Mapping[str, Any], scored: Mapping[str, Any], per_user: Mapping[str, Mapping[str, Floats]]
) -> bytes:
    """Left: means with intervals, beside those for other users' items. Right: users by their percentile."""
    figure = _figure(10.0, 3.8)
    left, right = figure.subplots(1, 2)
    places = np.arange(len(scored))
    found = [s["scores"]["rank_percentile"] for s in scored.values()]
    means = np.array([f["value"] for f in found])
    errors = np.abs(np.array([f["ci95"] or (f["value"], f["value"]) for f in found]).T - means)
    left.errorbar(means, places, xerr=errors, fmt="o", color=_BLUE, capsize=3, label="own later items")
    swapped = [s["lift"]["rank_percentile"]["value_a"] for s in scored.values()]
    left.scatter(
        [np.nan if v is None else v for v in swapped], places, marker="x", color=_GREY, label="other users'"
    )
    left.axvline(0.5, color=_ORANGE, linewidth=1.2, label="chance")
    left.set_yticks(np.arange(len(scored)), [_marked(n, s) for n, s in scored.items()])
    left.set_ylim(len(scored) - 0.5, -0.5)
    left.set_xlabel(f"rank percentile among {report['num_others']:,} other exemplars, 95 % intervals")
    left.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    for number, name in enumerate(scored):
        values = per_user[name]["rank_percentile"]
        values = values[~np.isnan(values)]
        weights = np.full(len(values), 1.0 / len(values))
        right.hist(
            values,
            bins=np.linspace(0, 1, 21),
            weights=weights,
            histtype="step",
            color=f"C{number}",
            label=name,
        )
    right.axvline(0.5, color=_ORANGE, linewidth=1.2)
    right.set_xlabel("rank percentile of a user")
    right.set_ylabel("share of the users")
    right.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return _png(figure)


def _within_plot(report: Mapping[str, Any], exemplars: Mapping[str, Floats]) -> bytes:
    """Histograms over the exemplars."""
    figure = _figure(10.0, 3.2)
    for axes, (name, label) in zip(figure.subplots(1, len(_WITHIN)), _WITHIN.items(), strict=True):
        values = exemplars[name][~np.isnan(exemplars[name])]
        top = max(1.0, float(values.max(initial=0.0)))  # a distinctness may exceed 1: cosines may be negative
        axes.hist(values, bins=np.linspace(0, top, 21), color=_BLUE)
        axes.set_xlabel(label)
        found = report["within"][name]["value"]
        if found is not None:
            axes.axvline(found, color=_ORANGE, linewidth=1.2, label=f"mean {found:.3f}")
            axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("exemplars")
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure, sizes in inches; without pyplot, so that nothing global is changed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
