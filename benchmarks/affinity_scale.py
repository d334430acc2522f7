"""Commands of `bench_affinity` about quality and growth: sparse, curve, baselines, scaling."""

from pathlib import Path
from typing import Any

from benchmarks.affinity_data import fit_power, plant
from benchmarks.affinity_setup import Setup, gb, state_cells, verdict
from benchmarks.affinity_sides import MATRIX_USERS
from benchmarks.harness import Table


def sparse(setup: Setup) -> None:
    """Planted clusters at scale."""
    from sklearn.metrics import adjusted_rand_score

    args = setup.args
    options = {"neighbours": args.neighbours, "most_neighbours": args.most_neighbours}
    found = setup.run("sparse", options=options)
    facts = found.facts
    index = adjusted_rand_score(plant(args.users, args.clusters, args.seed), found.labels_U)
    row = [f"{args.users:,}", *(f"{facts[f'seconds_{part}']:.1f}" for part in ("graph", "messages"))]
    row += [*state_cells(found), gb(found.peak_bytes), f"{index:.4f}"]
    row += [f"{facts['unproven_rows']:,}", f"{100 * facts['no_exemplar_listed']:.2f}"]
    header = ["users", "graph s", "messages s", "rounds", "converged", "exemplars", "pairs", "peak GB"]
    header += ["adjusted Rand index to the plant", "unproven rows", "% of users without a listed exemplar"]
    setup.write(
        Table(header, [row], [{**found.sample(), "adjusted_rand": index}]),
        f"{args.clusters:,} planted clusters, which are well apart: favours any method that looks at neighbours.",
        **{
            "time": verdict(found.seconds / 60, 12, unit=" min"),
            "memory": verdict(found.peak_bytes / 1e9, 10, unit=" GB"),
            "agreement": verdict(index, 0.95, at_least=True),
            "neighbours": f"{args.neighbours}, growing to at most {args.most_neighbours}",
        },
    )


def curve(setup: Setup) -> None:
    """Sparse against exact over the number of neighbours."""
    args = setup.args
    whole = setup.run("lists")
    best, samples = setup.net(whole), [whole.sample()]
    rows = [
        [
            "exact",
            "-",
            "0",
            f"{whole.facts['pairs']:,}",
            f"{whole.seconds:.1f}",
            *state_cells(whole)[:3],
            "-",
            "-",
        ]
    ]
    points: dict[str, list[tuple[int, float, float]]] = {"fixed length": [], "growing": []}
    facts: dict[str, Any] = {"exact net similarity": f"{best:.6f}"}
    for k in args.neighbours:
        for how, most in (("fixed length", k), ("growing", args.growth * k)):
            found = setup.run("sparse", options={"neighbours": k, "most_neighbours": most})
            gap = 100 * (setup.net(found) - best) / abs(best)
            points[how].append((k, gap, found.seconds))
            samples.append({"gap_percent": gap, **found.sample()})
            ends = [f"{100 * found.facts['no_exemplar_listed']:.2f}", f"{found.facts['unproven_rows']:,}"]
            cells = [f"{k}", how, f"{gap:+.4f}", f"{found.facts['pairs']:,}", f"{found.seconds:.1f}"]
            rows.append([*cells, *state_cells(found)[:3], *ends])
            if k == 64:
                facts[f"k = 64, {how}, below exact"] = verdict(max(-gap, 0.0), 1, unit=" %")

    def plot(path: Path) -> None:
        panels = {"net similarity against exact, %": 1, "seconds": 2}
        lines = {
            title: {how: ([p[0] for p in found], [p[i] for p in found]) for how, found in points.items()}
            for title, i in panels.items()
        }
        draw(path, lines, "neighbours k")

    header = [
        "k",
        "lists",
        "net similarity against exact, %",
        "pairs",
        "s",
        "rounds",
        "converged",
        "exemplars",
    ]
    header += ["% of users without a listed exemplar", "unproven rows"]
    notes = (
        "Above 0 is better than exact. Same vectors, preference and damping; seconds include the graph. Lists "
        f"that grow reach at most {args.growth} k. Up to 20,000 users the index is exact, which favours "
        "sparse."
    )
    setup.write(Table(header, rows, samples), notes, plot, **facts)


def baselines(setup: Setup) -> None:
    """Other ways to as many exemplars."""
    first = setup.run("lists")
    found = {"affinity propagation": first}
    options = {"num_exemplars": len(first.exemplars_E)}
    found["greedy facility location"] = setup.run("facility", options=options)
    facts: dict[str, Any] = {}
    if setup.users <= MATRIX_USERS:
        found["k-medoids (FasterPAM)"] = setup.run("k-medoids", options=options)
    else:
        facts["k-medoids"] = f"left out: needs the whole matrix, for at most {MATRIX_USERS:,} users here"
    found["mini-batch k-means, nearest member"] = setup.run("k-means", options=options)
    nets = {name: setup.net(run) for name, run in found.items()}
    rows = []
    for name, run in found.items():
        gap = 100 * (nets[name] - nets["affinity propagation"]) / abs(nets["affinity propagation"])
        share = f"{100 * len(run.exemplars_E) / setup.users:.3f}"
        cells = [name, f"{nets[name]:.6f}", f"{gap:+.3f}", f"{len(run.exemplars_E):,}", share]
        rows.append([*cells, f"{run.seconds:.1f}", gb(run.peak_bytes)])
    facts["highest net similarity"] = max(nets, key=lambda name: nets[name])
    header = ["method", "net similarity", "against the first, %", "exemplars", "share, %", "s", "peak GB"]
    samples = [{"name": name, "net": nets[name], **run.sample()} for name, run in found.items()]
    notes = (
        "Net similarity with the same preference for all, computed alike. The others are given the number of "
        "exemplars that affinity propagation found, which favours them; an empty k-means cluster has no "
        "exemplar. All label users with the nearest exemplar."
    )
    setup.write(Table(header, rows, samples), notes, **facts)


def scaling(setup: Setup) -> None:
    """Seconds and bytes against the number of users."""
    args = setup.args
    rows, samples, facts = [], [], {}
    lines: dict[str, dict[str, Any]] = {"seconds": {}, "bytes grown": {}}
    for method in ("scikit-learn", "dense", "lists", "sparse"):
        most = {"scikit-learn": args.scikit_most, "dense": args.dense_most}.get(method, max(args.sizes))
        sizes = [n for n in args.sizes if n <= most]
        seconds, memory = [], []
        for users in sizes:
            found = setup.run(method, users=users)
            seconds.append(found.seconds)
            memory.append(max(found.facts["grown_bytes"], 1_000_000))
            samples.append(found.sample())
            cells = [method, f"{users:,}", f"{found.seconds:.3g}", gb(found.peak_bytes), gb(memory[-1])]
            rows.append([*cells, str(found.facts["rounds"]), f"{found.facts['pairs']:,}"])
        for what, values in (("seconds", seconds), ("bytes grown", memory)):
            lines[what][method] = (sizes, values)
            if len(sizes) > 1:
                exponent, factor = fit_power(sizes, values)
                facts[f"{method}, {what}"] = f"{factor:.3g} * users ^ {exponent:.2f}"
    header = ["method", "users", "s", "peak GB", "GB grown", "rounds", "pairs kept"]
    notes = (
        "One run each; exponents by least squares in the logarithms, memory from the peak above what the "
        "process held when the clustering began (vectors, imports, warm-up), at least 1 MB. Rounds to "
        "convergence differ and are part of the seconds. Compilation is left out, which favours ours."
    )
    table = Table(header, rows, samples)
    setup.write(table, notes, lambda path: draw(path, lines, "users", log_y=True), **facts)


def draw(path: Path, panels: dict[str, dict[str, Any]], x: str, *, log_y: bool = False) -> None:
    """One panel for each quantity: name of a line -> its x and y."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained")
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, (xs, ys) in lines.items():
            ax.plot(xs, ys, marker="o", label=name)
        ax.set_xscale("log", base=10 if log_y else 2)
        if log_y:
            ax.set_yscale("log")
        ax.set_xlabel(x)
        ax.set_title(title)
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
