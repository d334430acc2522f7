"""The answer cache: what goes in comes out, also with many writers, damaged files and rows, and a full disk."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distributed_mi.interests.backends.base import Response
from distributed_mi.interests.cache import AnswerCache
from distributed_mi.interests.ladder import Reply


def replies(*names: str, text: str = "") -> list[Reply]:
    return [
        Reply(name, "first", Response(7, text or f"answer to {name}", 10, 5, 3, "length"), 0.5)
        for name in names
    ]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "not" / "there" / "yet")


def test_what_was_stored_is_found_by_another(url: str) -> None:
    cache = AnswerCache(url)
    assert cache.lookup(["a"]) == {}
    assert cache.store(replies("a", "b"), "vllm", "m@1") == 2
    for reader in (cache, AnswerCache(url)):
        found = reader.lookup(["b", "c", "a", "a"])
        # what the backend had cached is not part of an answer
        assert found == {n: Response(-1, f"answer to {n}", 10, 5, 0, "length") for n in ("a", "b")}
    assert AnswerCache(url).unreadable == 0


def test_errors_and_what_is_there_are_not_stored(url: str) -> None:
    cache = AnswerCache(url)
    failed = Reply("x", "first", Response(1, finish_reason="error", error="too long"))
    assert cache.store([failed], "b", "m") == 0
    assert cache.store(replies("a"), "b", "m") == 1
    assert cache.store(replies("a", text="other"), "b", "m") == 0
    assert len(list(Path(url).iterdir())) == 1
    assert cache.lookup(["a"])["a"].text == "answer to a"


def test_what_others_store_meanwhile_is_seen(url: str) -> None:
    first, second = AnswerCache(url), AnswerCache(url)
    assert first.lookup(["a"]) == {}
    second.store(replies("a"), "b", "m")
    assert set(first.lookup(["a"])) == {"a"}


def test_many_writers_at_once_lose_nothing(url: str) -> None:
    """Also of the same answers: two rows of which either will do."""
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        cache = AnswerCache(url)
        barrier.wait()
        for i in range(5):
            cache.store(replies(f"own {number} {i}", f"shared {i}", text=f"by {number}"), "b", "m")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    cache = AnswerCache(url)
    keys = [f"own {n} {i}" for n in range(8) for i in range(5)]
    found = cache.lookup([*keys, *(f"shared {i}" for i in range(5))])
    assert len(found) == 45
    assert all(found[f"own {n} {i}"].text == f"by {n}" for n in range(8) for i in range(5))
    assert cache.unreadable == 0


def test_damaged_segments_and_rows_are_passed_over_and_left(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c", "d"):
        AnswerCache(url).store(replies(name), "b", "m")
    paths = sorted(Path(url).iterdir())
    paths[0].write_bytes(b"no parquet")
    pq.write_table(pq.read_table(paths[1]).drop_columns(["digest"]), paths[1])
    forged = pq.read_table(paths[2])
    pq.write_table(forged.set_column(1, "text", [["something else"]]), paths[2])
    Path(url, "half.parquet.1234.tmp").write_bytes(b"killed amid writing")
    cache = AnswerCache(url)
    assert set(cache.lookup(["a", "b", "c", "d"])) == {"d"}
    assert cache.unreadable == 3
    assert all(p.exists() for p in paths)
    assert "damaged" in caplog.text
    # what could not be read is asked for again and stored anew
    assert cache.store(replies("a", "c"), "b", "m") == 2
    assert set(AnswerCache(url).lookup(["a", "c", "d"])) >= {"a", "d"}


def test_a_disk_that_is_full_is_said_once_and_counted(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distributed_mi.interests.cache.write_table", full)
    cache = AnswerCache(url)
    assert cache.store(replies("a", "b"), "b", "m") == 0
    assert cache.store(replies("c"), "b", "m") == 0
    assert cache.unwritten == 3
    assert sum("No space left" in r.message for r in caplog.records) == 1
    monkeypatch.undo()
    assert cache.store(replies("a"), "b", "m") == 1
