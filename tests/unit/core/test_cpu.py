"""Work shared by threads that wait awake: every piece once, errors, nesting, torch's own threads."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from distributed_mi.core import cpu
from distributed_mi.core.crew import PATIENCE, Crew


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(cpu, "_num_cores", lambda: 3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_slices_cover_all_rows_once_and_results_come_in_order() -> None:
    found = cpu.map_slices(lambda rows: (rows, threading.get_ident()), 10, 1 << 20)
    slices, threads = zip(*found, strict=True)
    assert [n for s in slices for n in range(s.start, s.stop)] == list(range(10))
    assert len(set(threads)) == 3
    assert threads[0] == threading.get_ident()


@pytest.mark.usefixtures("three_threads")
def test_little_work_stays_here_and_less_little_work_where_helpers_are_awake() -> None:
    numbers = 1 << 15
    assert cpu.map_slices(lambda rows: rows, 10, numbers) == [slice(0, 10)]
    with cpu.threads_for_kernels():
        assert len(cpu.map_slices(lambda rows: rows, 10, numbers)) == 3
        assert cpu.map_slices(lambda rows: rows, 10, 10) == [slice(0, 10)]
    assert cpu.map_slices(lambda rows: rows, 10, numbers) == [slice(0, 10)]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_an_error_arrives_when_all_pieces_have_ended_and_harms_no_later_work(wrong: int) -> None:
    ended = []

    def work(piece: int) -> int:
        time.sleep(0.01 * piece)
        if piece == wrong:
            raise KeyError(piece)
        ended.append(piece)
        return piece

    with pytest.raises(KeyError, match=str(wrong)):
        cpu.map_pieces(work, [0, 1, 2])
    assert sorted([*ended, wrong]) == [0, 1, 2]
    assert cpu.map_pieces(lambda piece: piece * 2, [5, 6, 7]) == [10, 12, 14]


def test_the_first_of_several_errors_is_raised_and_the_others_are_forgotten() -> None:
    def work(piece: int) -> int:
        raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match="piece 1"):
        cpu.map_pieces(lambda piece: work(piece) if piece else 0, [0, 1, 2])
    assert cpu.map_pieces(lambda piece: piece, [0, 1, 2]) == [0, 1, 2]


def test_pieces_within_a_piece_are_done_where_they_are_asked_for() -> None:
    def work(piece: int) -> list[int]:
        here = threading.get_ident()
        inner = cpu.map_pieces(lambda n: (n, threading.get_ident()), [piece, piece + 1])
        assert {thread for _, thread in inner} == {here}
        return [n for n, _ in inner]

    assert cpu.map_pieces(work, [0, 10]) == [[0, 1], [10, 11]]


def test_several_callers_at_once_get_their_own_results() -> None:
    found: dict[int, list[int]] = {}

    def call(caller: int) -> None:
        for _ in range(200):
            found[caller] = cpu.map_pieces(lambda piece: piece + caller, [0, 1, 2])

    threads = [threading.Thread(target=call, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {100 * n: [100 * n, 100 * n + 1, 100 * n + 2] for n in range(4)}


def test_helpers_record_no_gradients_and_torch_has_one_thread_in_each_piece() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        weight = torch.ones(2, requires_grad=True)
        found = cpu.map_pieces(lambda _: (torch.get_num_threads(), (weight * 2).requires_grad), [0, 1, 2])
        assert [threads for threads, _ in found] == [1, 1, 1]
        assert [recorded for _, recorded in found[1:]] == [False, False]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            cpu.map_pieces(lambda piece: 1 // piece, [0, 1])
        assert torch.get_num_threads() == 2
        with cpu.threads_for_kernels():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stay_awake", [True, False])
@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_helpers_find_every_job_whether_they_sleep_or_watch(stay_awake: bool, pause: float) -> None:
    """Sleeping begins while jobs arrive, which is where one could be missed."""
    crew = Crew()
    for job in range(2_000 if not pause else 20):
        assert crew.map(lambda piece, job=job: piece + job, [0, 1], stay_awake=stay_awake) == [job, job + 1]
        time.sleep(pause)


def test_jobs_that_arrive_as_a_helper_falls_asleep_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew()
    for job in range(3_000):
        monkeypatch.setattr("distributed_mi.core.crew.PATIENCE", job % 60)
        assert crew.map(lambda piece, job=job: piece + job, [0, 1], stay_awake=True) == [job, job + 1]
    assert PATIENCE > 60


def test_scipys_products_keep_to_the_calling_thread_and_numpys_do_not() -> None:
    """Kernels that share a batch take products in several threads at once."""
    script = """
from threadpoolctl import ThreadpoolController
import numpy, scipy.linalg.cython_blas
def threads():
    found = [c for c in ThreadpoolController().lib_controllers if c.user_api == "blas"]
    for library in found:
        yield ("numpy" in library.filepath, library.num_threads)
for library in ThreadpoolController().lib_controllers:
    library.set_num_threads(2)
from distributed_mi.core.blas import use_one_thread
use_one_thread()
after = dict(threads())
assert after[False] == 1, after
assert after.get(True, 2) == 2, after
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=dict(os.environ))


def test_a_forked_child_has_a_crew_of_its_own() -> None:
    script = """
import os
from distributed_mi.core import cpu
assert cpu.map_pieces(lambda n: n, [1, 2]) == [1, 2]
child = os.fork()
if child == 0:
    os._exit(cpu.map_pieces(lambda n: n + 1, [1, 2]) != [2, 3])
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert cpu.map_pieces(lambda n: n + 2, [1, 2]) == [3, 4]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=dict(os.environ))
