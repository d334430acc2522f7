"""The driver's bar follows what a worker writes."""

import time
from pathlib import Path

import pytest

from distributed_mi.training import follow


def test_the_bar_shows_what_the_worker_wrote(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "INTERVAL_S", 0.01)
    monkeypatch.setattr("distributed_mi.core.progress.PLAIN_INTERVAL_S", 0.0)
    caplog.set_level("INFO")
    url = str(tmp_path / "progress.json")
    with follow.following(url, follow.Follow("train x", 40, "steps")):
        bar = follow.FileBar(url)
        for count in (10, 20):
            bar.advance(count, f"loss of {count}")
            limit = time.monotonic() + 10
            while f"loss of {count}" not in caplog.text:
                assert time.monotonic() < limit
                time.sleep(0.01)
    assert "train x: 10/40" in caplog.text
    assert "train x: 30/40" in caplog.text
    assert "loss of 20" in caplog.text


def test_nothing_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with follow.following(str(tmp_path / "none.json"), follow.Follow("train x", 40, "steps")):
        pass
    assert "train x: 0/40" in caplog.text
