"""Affinity propagation: speed, memory, bandwidth and quality, ours beside scikit-learn's and beside other yardsticks.

    $ python -m benchmarks.bench_affinity exact --users 10000 --vectors beauty.npy
    $ python -m benchmarks.bench_affinity beauty --users all --vectors beauty.npy
    $ python -m benchmarks.bench_affinity {bandwidth,distributed,sparse,curve,baselines,scaling} --help

Vectors come from a .npy file (float32, one row a user) or are drawn (`affinity_data.py`). Every clustering runs alone
in a fresh process (`affinity_sides.py`): seconds without imports, compilation and loading; memory from the kernel.
scikit-learn and kmedoids are the published packages, unchanged.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.affinity_data import plant, write_planted
from benchmarks.affinity_job import Job, Measured
from benchmarks.affinity_scale import baselines, curve, scaling, sparse
from benchmarks.affinity_setup import (
    GENERATED_USERS,
    Setup,
    differing,
    gb,
    prepare,
    state_cells,
    verdict,
    yes,
)
from benchmarks.affinity_sides import DENSE_PASS_BYTES, LIST_PASS_BYTES, run_side
from benchmarks.harness import Spread, Table


def exact(setup: Setup) -> None:
    """Ours beside scikit-learn's."""
    args = setup.args
    sides: dict[str, dict[str, Any]] = {
        "ours, lists": {"method": "lists"},
        "ours, dense": {"method": "dense"},
    }
    sides["scikit-learn"] = {"method": "scikit-learn", "options": {"dtype": "float64"}}
    if args.with_float32:
        sides["scikit-learn, float32"] = {"method": "scikit-learn", "options": {"dtype": "float32"}}
    empty = {name: setup.run(**side, baseline=True).peak_bytes for name, side in sides.items()}
    runs: dict[str, list[Measured]] = {name: [] for name in sides}
    order, shuffle = list(sides), random.Random(args.seed).shuffle
    for _ in range(args.repeats):
        shuffle(order)
        for name in order:
            runs[name].append(setup.run(**sides[name]))
    reference = runs["scikit-learn"]
    theirs_own = min(r.peak_bytes for r in reference) - empty["scikit-learn"]
    rows, facts = [], {}
    for name, found in runs.items():
        speed = Spread.of([r.seconds / f.seconds for f, r in zip(found, reference, strict=True)])
        peak = Spread.of([f.peak_bytes for f in found])
        share = peak.median / Spread.of([r.peak_bytes for r in reference]).median
        own = Spread.of([f.peak_bytes - empty[name] for f in found])
        other = differing(found[-1], reference[-1])
        rows.append(
            [
                name,
                Spread.of([f.seconds for f in found]).text(),
                speed.text(),
                peak.text(1e-9),
                f"{share:.3g}",
                own.text(1e-9),
                f"{own.median / theirs_own:.3g}" if theirs_own > 0 else "-",
                str(found[-1].facts["rounds"]),
                f"{len(found[-1].exemplars_E):,}",
                f"{other:,}",
                f"{setup.net(found[-1]):.6f}",
            ]
        )
        if name.startswith("ours"):
            facts[f"{name}, speed"] = verdict(speed.median, 10, at_least=True, unit="x scikit-learn's")
            facts[f"{name}, peak"] = verdict(share, 0.6, unit=" of scikit-learn's")
            facts[f"{name}, labels equal scikit-learn's"] = yes(other == 0)
        same = all(differing(f, found[0]) == 0 for f in found)
        facts[f"{name}, the same in all repeats"] = yes(same)
    header = ["side", "s", "scikit-learn's s / side", "peak GB", "of scikit-learn's", "GB above loading"]
    header += ["of scikit-learn's", "rounds", "exemplars", "users with another exemplar", "net similarity"]
    samples = [{"side": n, "loading_bytes": empty[n], **f.sample()} for n, fs in runs.items() for f in fs]
    notes = (
        "Median (smallest to largest); sides take turns, ratios are paired by repeat. Favours ours: "
        "compilation, once a machine, is left out; messages are float32 (scikit-learn's are float64 always); "
        "a preference that makes short lists favours `lists`. Favours scikit-learn: what its imports hold is "
        "less than ours, and counts in `peak GB`."
    )
    setup.write(Table(header, rows, samples), notes, **facts, repeats=args.repeats)


def beauty(setup: Setup) -> None:
    """All users, exactly."""
    rows, samples, facts = [], [], {}
    for method in ("lists", "dense"):
        found = setup.run(method)
        rows.append(
            [
                method,
                f"{found.seconds:.1f}",
                *state_cells(found),
                gb(found.peak_bytes),
                f"{setup.net(found):.6f}",
            ]
        )
        samples.append(found.sample())
        facts[f"{method}, time"] = verdict(found.seconds, 120, unit=" s")
        facts[f"{method}, memory"] = verdict(found.peak_bytes / 1e9, 6.5, unit=" GB")
    header = ["solver", "s", "rounds", "converged", "exemplars", "pairs kept", "peak GB", "net similarity"]
    setup.write(Table(header, rows, samples), "Ours only, one run each; compilation is left out.", **facts)


def bandwidth(setup: Setup) -> None:
    """Message rounds beside a copy."""
    args = setup.args
    found = setup.run("bandwidth", options={"list_users": args.list_users, "repeats": args.repeats})
    rates = found.facts["gb_per_s"]
    work = {
        "copy": f"8 a pair of {setup.users:,}^2",
        "dense": f"{DENSE_PASS_BYTES} a pair of {setup.users:,}^2",
        "lists": f"{LIST_PASS_BYTES} an entry of {found.facts['list_entries']:,}",
    }
    rows, facts = [], {}
    for name, size in work.items():
        share = Spread.of([100 * a / b for a, b in zip(rates[name], rates["copy"], strict=True)])
        rows.append([name, size, Spread.of(rates[name]).text(), share.text()])
        if name != "copy":
            facts[f"{name}, share of the copy"] = verdict(share.median, 60, at_least=True, unit=" %")
    notes = (
        "GB/s of a whole round against a copy of float32 arrays in chunks (bytes read + written), same "
        "process and threads, taking turns: median (smallest to largest). Favours the copy: it may write past "
        "the cache, a round must read what it writes. The lists have random columns, which favours the copy "
        "too."
    )
    header = ["work", "bytes", "GB/s", "% of the copy"]
    facts["threads used"] = found.facts["threads_used"]
    setup.write(Table(header, rows, [found.sample()]), notes, **facts, repeats=args.repeats)


def distributed(setup: Setup) -> None:
    """Actors against one process."""
    args = setup.args
    rows, samples, facts = [], [], {}
    limits = {2: 0.6, 4: 0.35}
    for kind in args.kinds:
        one = setup.run(kind)
        rows.append(
            [f"{kind}, one process", f"{one.seconds:.1f}", "-", gb(one.peak_bytes), "1", "-", "-", "-"]
        )
        samples.append(one.sample())
        for actors, kill in [*((n, None) for n in args.actors), (args.actors[0], args.kill_round)]:
            options = {"kind": kind, "num_actors": actors, "kill_round": kill}
            found = setup.run("distributed", options=options)
            samples.append(found.sample())
            peak, same = max(found.facts["peak_bytes_of_actors"]), differing(found, one) == 0
            before = max(found.facts["warm_up"]["peak_bytes_of_actors"])
            share = peak / one.peak_bytes
            above = (peak - before) / max(one.facts["grown_bytes"], 1)
            what = f"{kind}, {actors} actors" + (f", one killed in round {kill}" if kill else "")
            again = (
                f"{found.facts['rounds_again']}" if found.facts["deaths"] else "nobody died" if kill else "-"
            )
            seconds = f"{found.facts['seconds_start']:.1f}"
            cells = [
                what,
                f"{found.seconds:.1f}",
                seconds,
                gb(peak),
                f"{share:.3g}",
                f"{above:.3g}",
                yes(same),
                again,
            ]
            rows.append(cells)
            facts[f"{what}, labels identical"] = yes(same)
            if kill is None and actors in limits:
                facts[f"{what}, peak of an actor"] = verdict(share, limits[actors], unit=" of one process's")
            if kill and found.facts["deaths"]:
                facts[f"{what}, went on from a checkpoint"] = yes(found.facts["from_checkpoint"])
    header = [
        "run",
        "s",
        "of it starting",
        "peak GB of a process",
        "of one process's",
        "the same, grown",
    ]
    header += ["labels identical", "rounds done again"]
    notes = (
        f"One process has {args.threads} threads, an actor one. Seconds with actors include starting them, "
        "their imports, and loading compiled code, which favours the one process. An actor's peak includes "
        "its imports (torch, Ray) and the object store's pages that it reads; `grown` leaves out the peak of "
        "an actor with 300 users, and what the one process held when the clustering began."
    )
    setup.write(Table(header, rows, samples), notes, **facts)


COMMANDS: dict[str, Callable[[Setup], None]] = {
    f.__name__: f for f in (exact, beauty, bandwidth, distributed, sparse, curve, baselines, scaling)
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    users = {"exact": 10_000, "bandwidth": 12_000, "sparse": 1_000_000, "baselines": 10_000}
    parsers = {}
    for name, command in COMMANDS.items():
        planted = name == "sparse"
        sub = parsers[name] = commands.add_parser(
            name, help=command.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add = sub.add_argument
        if name != "scaling":
            add("--users", type=_users, default=users.get(name, GENERATED_USERS), help="rows used, or `all`")
        add("--vectors", type=Path, help=argparse.SUPPRESS if planted else "float32 .npy; drawn when absent")
        add("--width", type=int, default=64 if planted else 384, help="of drawn vectors")
        add("--preference", type=float, default=-1500.0 if planted else -10.0, help="of all users")
        add("--damping", type=float, default=0.7 if planted else 0.5, help="weight of the old message")
        add("--max-iter", type=int, default=200, help="most rounds")
        add("--threads", type=int, default=2, help="of every side")
        add(
            "--seed",
            type=int,
            default=0,
            help="of drawn vectors, of methods that draw, and of the order of sides",
        )
        add("--results", type=Path, default=harness.RESULTS, help="folder written to")
        add("--name", help="first part of the file names; by default affinity_COMMAND")
        add("--hardware", help="second part; by default the machine's")
    for name in ("exact", "bandwidth"):
        parsers[name].add_argument(
            "--repeats", type=int, default=3 if name == "exact" else 5, help="of each side"
        )
    parsers["exact"].add_argument("--with-float32", action="store_true", help="give scikit-learn float32 too")
    parsers["bandwidth"].add_argument(
        "--list-users", type=int, default=100_000, help="rows of the lists, 64 entries each"
    )
    add = parsers["distributed"].add_argument
    add("--kinds", nargs="+", choices=["dense", "lists"], default=["dense", "lists"], help="what actors keep")
    add("--actors", nargs="+", type=int, default=[2, 4], help="numbers of them")
    add("--kill-round", type=int, default=17, help="round in which one of the first number dies")
    add = parsers["sparse"].add_argument
    add("--clusters", type=int, default=20_000, help="planted")
    add("--neighbours", type=int, default=64, help="k")
    add("--most-neighbours", type=int, default=256, help="longest list")
    add = parsers["curve"].add_argument
    add("--neighbours", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256], help="k")
    add("--growth", type=int, default=4, help="longest list, in k, where lists grow")
    add = parsers["scaling"].add_argument
    add("--sizes", nargs="+", type=int, default=[1000, 2000, 4000, 8000, 16_000], help="users")
    add("--scikit-most", type=int, default=8000, help="most users for scikit-learn")
    add("--dense-most", type=int, default=16_000, help="most users for dense")
    side = commands.add_parser("_side")  # what `measure` starts
    side.add_argument("job", type=lambda text: Job(**json.loads(text)))
    side.add_argument("out", type=Path)
    return parser.parse_args(argv)


def _users(text: str) -> int | None:
    return None if text == "all" else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    args = parse(argv)
    if args.command == "_side":
        print(json.dumps(run_side(args.job, args.out)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.command == "sparse":
            path = Path(folder) / "planted.npy"
            write_planted(path, plant(args.users, args.clusters, args.seed), args.width, args.seed)
            about = f"drawn, {args.clusters:,} planted clusters, {args.users:,} x {args.width}"
            setup = Setup(args, path, args.users, {"vectors": about})
        else:
            if args.command == "scaling":
                args.users = max(args.sizes)
            setup = prepare(args, Path(folder))
        COMMANDS[args.command](setup)
    return 0


if __name__ == "__main__":
    sys.exit(main())
