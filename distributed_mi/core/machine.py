"""What this machine or container has."""

from pathlib import Path


def available_memory_bytes() -> int | None:
    """Memory that this machine or container still has, in bytes; None where Linux does not say."""
    found = [n for n in (_meminfo_available(), _cgroup_available()) if n is not None]
    return min(found) if found else None


def _meminfo_available() -> int | None:
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> int | None:
    folder = Path("/sys/fs/cgroup")
    limit, used = folder / "memory.max", folder / "memory.current"
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text(encoding="utf-8").strip()
    if text == "max":
        return None
    # file cache that the kernel would give up first does not count as used
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    held = int(used.read_text(encoding="utf-8")) - int(stat.get("inactive_file", 0))
    return max(0, int(text) - held)
