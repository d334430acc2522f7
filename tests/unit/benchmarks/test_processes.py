"""Sides of a benchmark in processes of their own."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.processes import OwnProcess

HERE = "tests.unit.benchmarks.test_processes"


def make_counter(payload: dict[str, Any]) -> Callable[[], Any]:
    calls = []

    def call() -> Any:
        print("a library that prints")  # noqa: T201
        calls.append(payload["add"])
        if len(calls) > 2:
            raise ValueError("no third call")
        return {"process": os.getpid(), "sum": sum(calls)}

    return call


def test_calls_are_made_in_one_other_process_until_one_fails() -> None:
    with OwnProcess(f"{HERE}:make_counter", {"add": 3}) as side:
        first, second = side(), side()
        assert (first["sum"], second["sum"]) == (3, 6)
        assert first["process"] == second["process"] != os.getpid()
        with pytest.raises(RuntimeError, match=r"make_counter: the process ended with 1"):
            side()


def test_a_side_that_cannot_be_made_is_told_at_once() -> None:
    with pytest.raises(RuntimeError, match=r"no_such_side: the process ended with 1"):
        OwnProcess(f"{HERE}:no_such_side", {})
