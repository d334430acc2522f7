"""Energy that devices of this machine say they have used: GPUs through NVML, processors through Linux's powercap."""

from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made; None where no device tells."""

    def __init__(self) -> None:
        self._nvml = _open_nvml()
        self._begin = self._read()

    def joules(self) -> float | None:
        """Sum over all devices that were there from the beginning. A counter that wrapped in between is left out."""
        now = self._read()
        used = [now[name] - begin for name, begin in self._begin.items() if now.get(name, -1.0) >= begin]
        return sum(used) if used else None

    def _read(self) -> dict[str, float]:
        return _read_powercap(_POWERCAP) | (_read_nvml(self._nvml) if self._nvml is not None else {})


def _read_powercap(folder: Path) -> dict[str, float]:
    """Joules of each package; its parts are in it and not counted again."""
    found = {}
    for path in sorted(folder.glob("intel-rapl:*/energy_uj")):
        if path.parent.name.count(":") > 1:
            continue
        try:
            found[path.parent.name] = int(path.read_text(encoding="ascii")) / 1e6
        except (OSError, ValueError):  # root's alone on most machines
            continue
    return found


def _open_nvml() -> Any:
    """The library, ready to be asked; None without it, without a driver, or without a device."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _read_nvml(nvml: Any) -> dict[str, float]:
    found = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        try:
            found[f"gpu-{index}"] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except nvml.NVMLError:  # older than Volta
            continue
    return found
