"""Names -> classes, imported on demand."""

import subprocess
import sys
from pathlib import Path

import pytest

from distributed_mi.core import registry
from distributed_mi.core.errors import ConfigError, UnknownNameError


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kind of its own in a package of its own: three files, one broken, one shared."""
    folder = tmp_path / "distributed_mi_probe" / "plain"
    folder.mkdir(parents=True)
    (folder / "first.py").write_text("class P:\n    value = 1\n\nPLAIN = P\n")
    (folder / "second.py").write_text("raise RuntimeError('imported')\n")
    (folder / "hollow.py").write_text("x = 1\n")
    (folder / "base.py").write_text("raise RuntimeError('imported')\n")
    (folder / "needs.py").write_text("import distr\n")
    monkeypatch.setitem(registry.KINDS, "plain", ("plain", "PLAIN"))
    monkeypatch.setattr(registry, "_PACKAGE_ROOT", folder.parent)
    monkeypatch.setattr(
        "distributed_mi.__path__", [*sys.modules["distributed_mi"].__path__, str(folder.parent)]
    )
    return folder


def test_choices_are_file_names_without_importing(plain: Path) -> None:
    assert registry.choices("plain") == ["first", "hollow", "needs", "second"]
    assert not [m for m in sys.modules if m.startswith("distributed_mi.plain")]


def test_resolve_imports_exactly_one_file(plain: Path) -> None:
    assert registry.resolve("plain", "first").value == 1
    assert "distributed_mi.plain.second" not in sys.modules


def test_unknown_name_lists_the_known_and_the_nearest(plain: Path) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry.resolve("plain", "frist")
    assert (
        str(caught.value)
        == 'unknown plain "frist". Did you mean "first"? Known: first, hollow, needs, second'
    )
    assert isinstance(caught.value, ConfigError)


def test_name_like_no_other_has_no_suggestion(plain: Path) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry.resolve("plain", "zzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_a_folder_or_path_is_not_a_name(plain: Path) -> None:
    with pytest.raises(UnknownNameError):
        registry.resolve("plain", "../core/errors")


def test_file_without_the_export_is_named(plain: Path) -> None:
    with pytest.raises(UnknownNameError, match="has no attribute PLAIN"):
        registry.resolve("plain", "hollow")


def test_a_missing_library_is_not_taken_for_a_missing_file(plain: Path) -> None:
    """`distr` begins like `distributed_mi...`; it is the library that is missing."""
    with pytest.raises(ModuleNotFoundError, match="distr"):
        registry.resolve("plain", "needs")


def test_outside_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text("class Mine:\n    value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.resolve("model", "my_models:Mine").value == 3
    with pytest.raises(UnknownNameError, match="no attribute Yours"):
        registry.resolve("model", "my_models:Yours")
    with pytest.raises(UnknownNameError, match="no module my_package_that_is_not"):
        registry.resolve("model", "my_package_that_is_not.file:Mine")


def test_asking_for_choices_imports_no_heavy_library() -> None:
    code = (
        "import sys\nfrom distributed_mi.core.registry import KINDS, choices\n"
        "[choices(k) for k in KINDS]\n"
        "print(sorted({'torch', 'ray', 'transformers', 'vllm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
