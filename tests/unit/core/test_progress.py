"""Progress: plain lines off a terminal, a bar on one."""

import logging
import sys

import pytest

from distributed_mi.core import progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="distributed_mi")
    monkeypatch.setattr(logging.getLogger("distributed_mi"), "propagate", True)
    return caplog


def test_plain_line_has_count_share_rate_time_left_and_note(
    clock: Clock, lines: pytest.LogCaptureFixture
) -> None:
    with progress.track("train", 1000, "steps") as bar:
        clock.now += 20
        bar.advance(250, "loss 1.5")
        # 250 in 20 s is 12.5/s; 750 left at that rate are 60 s
        assert lines.messages == ["train: 250/1,000 (25%) steps, 20 s, 12.5/s, 60 s left loss 1.5"]


def test_lines_come_every_interval_and_once_at_the_end(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with progress.track("embed", 100, "items") as bar:
        for _ in range(100):
            clock.now += progress.PLAIN_INTERVAL_S / 20
            bar.advance()
    # 100 advances over 5 intervals: a line at each, and the last one
    assert len(lines.messages) == 6
    assert lines.messages[-1] == "embed: 100/100 (100%) items, 50 s, 2.0/s"


def test_unknown_total_has_no_share_and_no_time_left(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with progress.track("prepare", None, "rows") as bar:
        clock.now += 2
        bar.advance(3000)
    assert lines.messages == ["prepare: 3,000 rows, 2 s, 1,500.0/s"]


def test_no_work_and_no_time_divide_by_nothing(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with progress.track("prepare", 0, "rows"):
        pass
    assert lines.messages == ["prepare: 0 rows, 0 s, 0.0/s"]


def test_an_error_inside_is_not_reported_as_the_end(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="inside"), progress.track("prepare", 3, "rows"):
        raise RuntimeError("inside")
    assert lines.messages == []


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], lines: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with progress.track("train", 4, "steps") as bar:
        bar.advance(3, "loss 1.5")
        bar.advance()
    shown = capfd.readouterr().err
    assert "train" in shown
    assert "4/4" in shown
    assert "steps/s" in shown
    assert "loss 1.5" in shown
    assert lines.messages == []
