"""The measuring tool itself: who is called when, ratios by hand, memory of a known size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Comparison, Spread, compare, hardware_name, markdown, measure_command, write

MACHINE = {
    "cpu": "Intel(R) Xeon(R) Platinum",
    "cores": 2,
    "memory_gib": 23.5,
    "gpu": [],
    "os": "Linux",
    "python": "3.11.9",
    "packages": {"torch": "2.13.0"},
    "environment": {"OMP_NUM_THREADS": "1"},
    "load_average": [0.5, 0.4, 0.3],
    "commit": "abc",
    "uncommitted_changes": True,
    "command": "python benchmarks/bench_x.py",
    "date": "2026-11-22",
}
RESULT = Comparison(
    "step", 2, {"ours": [1.0, 2.0, 6.0], "reference": [2.0, 2.0, 3.0]}, {"users per step": 128}
)


class Sides:
    """Two sides that take 3 s and 1 s of a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def side(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds

    def compare(self, **options: int) -> Comparison:
        work = {"ours": lambda: self.side("ours", 3.0), "reference": lambda: self.side("reference", 1.0)}
        return compare(work, unit="step", clock=lambda: self.now, **options)


def test_only_the_repeats_after_the_warm_up_count() -> None:
    sides = Sides()
    result = sides.compare(repeats=5, warmup=2)
    assert result.samples_s == {"ours": [3.0] * 5, "reference": [1.0] * 5}
    assert sides.calls.count("ours") == sides.calls.count("reference") == 7


def test_sides_alternate_and_none_always_comes_first() -> None:
    sides = Sides()
    sides.compare(repeats=32, warmup=0)
    rounds = [sides.calls[i : i + 2] for i in range(0, 64, 2)]
    assert all(sorted(r) == ["ours", "reference"] for r in rounds)
    first = sum(r[0] == "ours" for r in rounds)
    assert 8 <= first <= 24


@pytest.mark.parametrize("options", [{"repeats": 2}, {"repeats": 3, "warmup": -1}])
def test_too_few_repeats_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="3 repeats"):
        Sides().compare(**options)
    with pytest.raises(ValueError, match="needs a side"):
        compare({}, unit="step")


def test_ratio_is_paired_by_repeat() -> None:
    # 1/2, 2/2, 6/3: median 1, from 0.5 to 2. (The ratio of the medians would be 2/2 with no spread.)
    assert RESULT.ratio("ours", "reference") == Spread(1.0, 0.5, 2.0)
    assert RESULT.seconds("ours") == Spread(2.0, 1.0, 6.0)


def test_markdown_states_the_numbers_and_everything_needed_to_repeat_them() -> None:
    text = markdown("train_step", RESULT, MACHINE, "One thread each.")
    assert "| ours | 2,000 (1,000 to 6,000) | 1 | 3 |" in text
    assert "| reference | 2,000 (2,000 to 3,000) | 1 (0.5 to 2) | 3 |" in text
    for part in (
        "One thread each.",
        "users per step: 128",
        "2 cores",
        "torch 2.13.0",
        "OMP_NUM_THREADS=1",
        "abc with un",
    ):
        assert part in text


def test_files_are_named_for_theme_hardware_and_month(tmp_path: Path) -> None:
    path = write("train_step", RESULT, notes="n", hardware="2core-test", folder=tmp_path)
    document = json.loads(path.with_suffix(".json").read_text())
    assert path.name == f"train_step_2core-test_{document['machine']['date'][:7].replace('-', '')}.md"
    assert document["samples_s"] == RESULT.samples_s
    assert document["ratios"] == {"ours / reference": {"median": 1.0, "low": 0.5, "high": 2.0}}
    assert document["machine"]["python"].startswith("3.")
    assert str(tmp_path) not in path.read_text()


def test_machine_states_the_commit_of_this_checkout() -> None:
    machine = harness.describe_machine()
    if (harness.ROOT / ".git").exists():
        command = ["git", "rev-parse", "HEAD"]
        head = subprocess.run(
            command, cwd=harness.ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        assert machine["commit"] == head
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0.1
    assert machine["cpu"]


def test_private_folders_stay_out_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(harness.ROOT / "benchmarks" / "bench_x.py"), "--steps=3"])
    assert harness.describe_machine()["command"].endswith(" benchmarks/bench_x.py --steps=3")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "2core-xeon"),
        ({"cpu": "Something else"}, "2core-cpu"),
        ({"gpu": ["NVIDIA H200", "NVIDIA H200"]}, "2x-nvidia-h200"),
    ],
)
def test_hardware_name_fits_a_file_name(change: dict, name: str) -> None:
    assert hardware_name({**MACHINE, **change}) == name


ALLOCATE = "b = bytearray(%d << 20); b[::4096] = b'x' * len(b[::4096])"
MIB = 1 << 20


def test_memory_of_a_command_is_its_own_and_not_the_callers() -> None:
    ballast = bytearray(b"x") * (300 * MIB)  # the caller is large
    use = measure_command([sys.executable, "-S", "-c", ALLOCATE % 100])
    assert len(ballast) == 300 * MIB
    assert use.returncode == 0
    assert 100 * MIB <= use.peak_process_bytes < 150 * MIB


def test_memory_of_several_processes_is_added_up() -> None:
    child = f"{ALLOCATE % 60}; import time; time.sleep(1)"
    start = f"subprocess.Popen([sys.executable, '-S', '-c', {child!r}])"
    parent = f"import subprocess, sys; p = [{start} for _ in range(2)]; [x.wait() for x in p]"
    use = measure_command([sys.executable, "-S", "-c", parent])
    assert 60 * MIB <= use.peak_process_bytes < 110 * MIB
    assert 120 * MIB <= use.peak_tree_bytes < 220 * MIB
    assert use.wall_seconds >= 1


def test_exit_status_output_and_environment_of_a_command() -> None:
    code = "import os, sys; print(os.environ['X']); print('e', file=sys.stderr); sys.exit(3)"
    use = measure_command([sys.executable, "-S", "-c", code], env={"X": "seen"})
    assert use.returncode == 3
    assert sorted(use.output.split()) == ["e", "seen"]


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program-here"):
        measure_command(["no-such-program-here"])
