"""Memory of this machine or container."""

import pytest

from distributed_mi.core import machine


def test_available_memory_is_read() -> None:
    available = machine.available_memory_bytes()
    assert available is None or available > 1 << 20


def test_the_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_meminfo_available", lambda: 500)
    for cgroup, wanted in ((300, 300), (900, 500), (None, 500)):
        monkeypatch.setattr(machine, "_cgroup_available", lambda found=cgroup: found)
        assert machine.available_memory_bytes() == wanted
    monkeypatch.setattr(machine, "_meminfo_available", lambda: None)
    assert machine.available_memory_bytes() is None
