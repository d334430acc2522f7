"""Who may import whom: an AST walk over the package against the tables below.

Stages do not import each other, arithmetic does not know Ray, heavy libraries are imported where they are used. Imports
inside functions count for the first two; a module-level import of a heavy library counts for the third.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "distributed_mi"

ALLOWED: dict[str, tuple[str, ...]] = {
    "core": (),
    "losses": ("core",),
    "embeddings": ("core",),
    "models": ("core", "losses", "embeddings.table", "embeddings.config"),
    "data": ("core",),
    "text": ("core",),
    "exemplars": ("core",),
    "interests": ("core",),
    "training": ("core", "data.batches", "losses", "embeddings", "models"),
    "evaluation": ("core", "data.batches", "embeddings", "models.base"),
    "serving": ("core", "data.batches", "embeddings", "models.base"),
}
"""Package -> what it may import from inside the project, itself apart."""

JOINERS = frozenset({"cli", "experiment", "pipeline"})
"""Top-level modules that join the stages and may import anything of the package."""

NEVER = frozenset({"jobs", "benchmarks", "tests"})
"""Nothing in the package imports these."""

RAY_FILES = frozenset(
    {
        "pipeline.py",
        "exemplars/distributed.py",
        "interests/pool.py",
        "training/worker.py",
        "training/launcher.py",
        "training/elastic.py",
        "training/tune.py",
        "serving/deployment.py",
        *(f"{package}/stage.py" for package in ALLOWED),
    }
)
"""The only files that may import Ray, at whatever depth."""

OWNED: dict[str, tuple[str, ...]] = {
    "transformers": ("text",),
    "vllm": ("interests/backends/vllm.py",),
    "deepspeed": ("training/zero.py",),
    "faiss": ("serving",),
    "hnswlib": ("serving",),
    "numba": (
        "core/vector_math.py",
        "core/watching.py",
        "exemplars/kernels.py",
        "embeddings/kernels.py",
        "embeddings/topk_kernels.py",
        "losses/kernels.py",
        "models/fused_kernels.py",
        "models/kernels.py",
    ),
}
"""Heavy library -> files or folders that own it: nobody else imports it at module level."""

NOWHERE_ELSE = frozenset({"vllm", "deepspeed", "numba"})
"""Owned libraries that no other file imports, not even inside a function."""

COMPILED = frozenset({"core/vector_math.py", "core/watching.py"})
"""Files of `core` that only compiled kernels import, and so may import what compiles them."""

LIGHT = frozenset({"pydantic", "pydantic_core", "numpy", "pyarrow"})
"""What `core` may import at module level beside the standard library."""


@dataclass(frozen=True)
class Import:
    """One imported name."""

    name: str
    """Absolute dotted name; for `from a.b import c` it is `a.b.c`."""
    line: int
    at_module_level: bool


def imports(tree: ast.AST, at_module_level: bool = True) -> Iterator[Import]:
    """Every import of a file, also `import_module("...")` of a literal; type-checking blocks are not module level."""
    for node in ast.iter_child_nodes(tree):
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _only_for_types(node)
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (Import(f"{base}.{a.name}", node.lineno, at_module_level) for a in node.names)
        elif isinstance(node, ast.Call) and (name := _dynamic_import(node)):
            yield Import(name, node.lineno, at_module_level)
        yield from imports(node, at_module_level and not inner)


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _dynamic_import(call: ast.Call) -> str | None:
    function = ast.unparse(call.func)
    if function.split(".")[-1] not in {"import_module", "__import__"} or not call.args:
        return None
    first = call.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def begins(name: str, prefixes: tuple[str, ...], separator: str = ".") -> bool:
    """Whether a dotted name or a path is one of `prefixes` or lies below one."""
    return any(name == p or name.startswith(p + separator) for p in prefixes)


def violations(relative: str, source: str) -> list[str]:
    """What a file of the package (path relative to it) imports against the rules."""
    found = []
    for item in imports(ast.parse(source)):
        found += [f"{relative}:{item.line}: {text}" for text in _judge(relative, item)]
    return found


def _judge(relative: str, item: Import) -> Iterator[str]:
    package, _, rest = relative.partition("/")
    top, _, inside = item.name.partition(".")
    if item.name.startswith("."):
        yield "relative import"
    elif top in NEVER:
        yield f"the package imports {top}"
    elif top == "ray" and relative not in RAY_FILES:
        yield (
            "imports ray; only "
            + ", ".join(sorted(RAY_FILES - {f"{p}/stage.py" for p in ALLOWED}))
            + ", */stage.py"
        )
    elif (
        top in OWNED
        and not begins(relative, OWNED[top], "/")
        and (item.at_module_level or top in NOWHERE_ELSE)
    ):
        yield f"imports {top}, which belongs to {', '.join(OWNED[top])}"
    elif top == "distributed_mi":
        yield from _judge_inside(package if rest else relative.removesuffix(".py"), inside)
    elif relative in COMPILED:
        return
    elif package == "core" and item.at_module_level and top not in LIGHT | set(sys.stdlib_module_names):
        yield f"core imports {top} at module level; only {', '.join(sorted(LIGHT))} and the standard library"
    elif relative.endswith("/config.py") and item.at_module_level and top == "torch":
        yield "a configuration model imports torch; `--help` must stay fast"


def _judge_inside(importer: str, name: str) -> Iterator[str]:
    if importer == "__init__":
        yield "distributed_mi/__init__.py imports nothing"
    elif importer not in JOINERS and name != "__version__":
        if importer not in ALLOWED:
            yield f"{importer} has no row in the table of allowed imports"
        elif not begins(name, (importer, *ALLOWED[importer])):
            yield f"{importer} may import {', '.join(ALLOWED[importer]) or 'nothing'} and not {name}"


FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


def test_every_folder_has_a_row() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders <= set(ALLOWED)
    assert {Path(f).stem for f in FILES if "/" not in f} <= JOINERS | {"__init__", "__main__"}


@pytest.mark.parametrize("relative", FILES)
def test_file_imports_only_what_it_may(relative: str) -> None:
    assert violations(relative, (PACKAGE / relative).read_text(encoding="utf-8")) == []


def test_jobs_and_benchmarks_are_not_imported_by_each_other() -> None:
    for folder, other in (("jobs", "benchmarks"), ("benchmarks", "jobs")):
        for path in (ROOT / folder).rglob("*.py"):
            tops = {i.name.split(".")[0] for i in imports(ast.parse(path.read_text(encoding="utf-8")))}
            assert not tops & {other, "tests"}, path


PLANTED = [
    (
        "text/stage.py",
        "from distributed_mi.data.stage import run",
        "text may import core and not data.stage.run",
    ),
    ("text/stage.py", "def f():\n    import distributed_mi.data.stage", "not data.stage"),
    ("text/stage.py", "if TYPE_CHECKING:\n    from distributed_mi.data import stage", "not data.stage"),
    ("text/x.py", "import importlib\nimportlib.import_module('distributed_mi.data.stage')", "not data.stage"),
    ("models/x.py", "from distributed_mi.embeddings import sharded", "not embeddings.sharded"),
    (
        "models/x.py",
        "from distributed_mi.embeddings.table_of_mine import T",
        "not embeddings.table_of_mine.T",
    ),
    ("evaluation/x.py", "from distributed_mi.models.remi import MODEL", "not models.remi.MODEL"),
    ("evaluation/x.py", "from distributed_mi import training", "not training"),
    ("core/x.py", "from distributed_mi.data import batches", "core may import nothing and not data.batches"),
    ("core/x.py", "import torch", "core imports torch at module level"),
    ("core/x.py", "class A:\n    import torch", "core imports torch at module level"),
    ("data/x.py", "from ..core import errors", "relative import"),
    ("data/x.py", "from jobs import prepare", "the package imports jobs"),
    ("data/x.py", "import ray.data", "imports ray"),
    ("data/x.py", "def f():\n    from ray import data", "imports ray"),
    ("cli.py", "import ray", "imports ray"),
    ("text/config.py", "from torch import nn", "imports torch"),
    ("training/loop.py", "import deepspeed", "imports deepspeed, which belongs to"),
    ("training/loop.py", "def f():\n    import deepspeed", "imports deepspeed, which belongs to"),
    (
        "interests/stage.py",
        "try:\n    import vllm\nexcept ImportError:\n    pass",
        "imports vllm, which belongs to",
    ),
    ("models/x.py", "from transformers import AutoModel", "imports transformers, which belongs to text"),
    ("exemplars/neighbours.py", "import faiss", "imports faiss, which belongs to serving"),
    (
        "exemplars/lists.py",
        "from numba import njit",
        "imports numba, which belongs to core/vector_math.py, core/watching.py, exemplars/kernels.py",
    ),
    (
        "exemplars/lists.py",
        "def f():\n    import numba",
        "imports numba, which belongs to core/vector_math.py, core/watching.py, exemplars/kernels.py",
    ),
    ("exemplars/problem.py", "def f():\n    import ray", "imports ray"),
    ("__init__.py", "from distributed_mi.core import config", "imports nothing"),
    ("novel/x.py", "from distributed_mi.core import config", "novel has no row"),
]


@pytest.mark.parametrize(("relative", "source", "message"), PLANTED, ids=[f"{p}-{m}" for p, _, m in PLANTED])
def test_a_planted_violation_is_caught(relative: str, source: str, message: str) -> None:
    found = violations(relative, source)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        (
            "text/stage.py",
            "import ray\nfrom distributed_mi.core import schema\nfrom distributed_mi.text.encoder import E",
        ),
        ("models/x.py", "import torch\nfrom distributed_mi.embeddings import table"),
        ("models/x.py", "from distributed_mi.embeddings.table import ItemTable"),
        ("evaluation/stage.py", "from distributed_mi.models.base import Recommender"),
        ("interests/backends/vllm.py", "def f():\n    import vllm"),
        ("serving/x.py", "def f():\n    import faiss"),
        ("evaluation/x.py", "def f():\n    import transformers"),
        ("core/artifacts.py", "from distributed_mi import __version__"),
        ("core/progress.py", "def f():\n    from rich.console import Console"),
        ("cli.py", "from distributed_mi.data import stage"),
        ("pipeline.py", "def f():\n    import ray"),
        ("exemplars/x.py", "import rayon"),
        ("exemplars/distributed.py", "import ray\nfrom ray.exceptions import RayError"),
        ("exemplars/neighbours.py", "def f():\n    import faiss"),
        ("exemplars/kernels.py", "from numba import njit"),
        ("embeddings/topk_kernels.py", "from numba import njit"),
    ],
)
def test_what_is_allowed_passes(relative: str, source: str) -> None:
    assert violations(relative, source) == []
