"""The one logging set-up."""

import logging
import re
from collections.abc import Iterator

import pytest

from distributed_mi.core.logging import setup


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Handlers and levels as before, for the tests that follow."""
    root, own = logging.getLogger(), logging.getLogger("distributed_mi")
    handlers, levels = list(root.handlers), (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def test_setup_twice_adds_one_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(logging.getLogger().handlers)
    setup()
    once = len(logging.getLogger().handlers)
    setup("WARNING")
    assert once <= before + 1
    assert len(logging.getLogger().handlers) == once
    assert sum(getattr(h, "_distributed_mi", False) for h in logging.getLogger().handlers) == 1


def test_second_call_changes_the_level_and_libraries_stay_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMI_LOG_LEVEL", raising=False)
    setup()
    assert logging.getLogger("distributed_mi.data").isEnabledFor(logging.INFO)
    assert not logging.getLogger("some_library").isEnabledFor(logging.INFO)
    setup("ERROR")
    assert not logging.getLogger("distributed_mi.data").isEnabledFor(logging.INFO)


def test_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMI_LOG_LEVEL", "DEBUG")
    setup("ERROR")
    assert logging.getLogger("distributed_mi").isEnabledFor(logging.DEBUG)


def test_line_has_time_level_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().handlers[:] = []
    setup()
    logging.getLogger("distributed_mi.data.stage").info("%s rows", "7")
    assert re.fullmatch(r"\d\d:\d\d:\d\d I 7 rows\n", capsys.readouterr().err)
