"""Names in a configuration file -> classes, imported on demand.

`resolve("model", "comirec_sa")` imports exactly `distributed_mi.models.comirec_sa` and returns its `MODEL`. Nothing
is registered by hand: the file name is the registered name. `"my_package.my_file:MyModel"` names an outside class.
"""

import difflib
import importlib
from pathlib import Path
from typing import Any

from distributed_mi.core.errors import UnknownNameError

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent

KINDS: dict[str, tuple[str, str]] = {
    "model": ("models", "MODEL"),
    "reader": ("data/readers", "READER"),
    "backend": ("interests/backends", "BACKEND"),
    "metric": ("evaluation/metrics", "METRIC"),
    "index": ("serving/indexes", "INDEX"),
}
"""kind -> folder below the package, and the attribute that a file of that folder exports."""

_SHARED_FILES = frozenset({"__init__", "base", "fused", "fused_kernels", "kernels", "layers", "objective"})


def choices(kind: str) -> list[str]:
    """Names that `resolve` knows for a kind, sorted; no file is imported."""
    folder, _ = KINDS[kind]
    return sorted(p.stem for p in (_PACKAGE_ROOT / folder).glob("*.py") if p.stem not in _SHARED_FILES)


def require_known(kind: str, name: str) -> None:
    """Refuse a name without a file of that kind; no file is imported.

    Raises:
        UnknownNameError: gives the nearest name and the known ones.
    """
    known = choices(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise UnknownNameError(f'unknown {kind} "{name}".{hint} Known: {", ".join(known)}')


def resolve(kind: str, name: str) -> Any:
    """Return the class behind a name.

    Args:
        kind: one of `KINDS`.
        name: a file name of that kind's folder without `.py`, or `package.module:Attribute`.

    Raises:
        UnknownNameError: there is no such file, module or attribute; the message lists what there is.
    """
    folder, attribute = KINDS[kind]
    if ":" in name:
        module_name, attribute = name.split(":", 1)
    else:
        require_known(kind, name)
        module_name = "distributed_mi." + folder.replace("/", ".") + "." + name
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise UnknownNameError(f'{kind} "{name}": there is no module {error.name}') from error
        raise
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise UnknownNameError(f"{kind} {name!r}: {module_name} has no attribute {attribute}") from error
