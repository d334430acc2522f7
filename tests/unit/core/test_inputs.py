"""Where inputs are: paths, folders, globs and URLs, and what identifies them."""

import os
from pathlib import Path

import fsspec
import pyarrow.fs as pafs
import pytest

from distributed_mi.core.artifacts import expand_inputs, fingerprint_files, resolve_url
from distributed_mi.core.errors import InputError, WorkspaceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.csv", "a.csv", "c.jsonl", "deep/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def relative(folder: Path, found: list[str]) -> list[str]:
    return [str(Path(p).relative_to(folder)) for p in found]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.csv", ["a.csv"]),
        ("*.csv", ["a.csv", "b.csv"]),
        ("**/*.csv", ["a.csv", "b.csv", "deep/d.csv"]),
        ("[ab].csv", ["a.csv", "b.csv"]),
        ("?.jsonl", ["c.jsonl"]),
        ("", ["a.csv", "b.csv", "c.jsonl", "deep/d.csv"]),
    ],
)
def test_paths_folders_and_globs_in_name_order(folder: Path, pattern: str, expected: list[str]) -> None:
    assert relative(folder, expand_inputs(f"{folder}/{pattern}")) == expected


def test_relative_glob_and_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert relative(folder, expand_inputs("*.jsonl")) == ["c.jsonl"]
    assert relative(folder, expand_inputs("~/*.jsonl")) == ["c.jsonl"]
    assert relative(folder, expand_inputs("~/a.csv")) == ["a.csv"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    (tmp_path / "logs[1].csv").write_text("x")
    assert relative(tmp_path, expand_inputs(f"{tmp_path}/logs[1].csv")) == ["logs[1].csv"]


def test_hidden_and_marker_files_of_a_folder_are_left_out(folder: Path) -> None:
    for name in ("_SUCCESS", ".a.csv.crc", "deep/_metadata"):
        (folder / name).write_text("")
    assert relative(folder, expand_inputs(str(folder))) == ["a.csv", "b.csv", "c.jsonl", "deep/d.csv"]


@pytest.mark.parametrize("missing", ["nowhere.csv", "*.parquet", "empty"])
def test_nothing_there_names_what_was_asked_for(folder: Path, missing: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"no such file: .*" + missing.replace("*", r"\*")):
        expand_inputs(f"{folder}/{missing}")


def test_fingerprint_changes_with_content_time_and_number_of_files(folder: Path) -> None:
    first = fingerprint_files(str(folder))
    assert first == fingerprint_files(str(folder))
    assert [f["name"] for f in first] == ["a.csv", "b.csv", "c.jsonl", "d.csv"]
    os.utime(folder / "a.csv", ns=(1, 1))
    touched = fingerprint_files(str(folder))
    assert touched != first
    (folder / "b.csv").write_text("longer than before")
    grown = fingerprint_files(str(folder))
    assert grown != touched
    (folder / "c.jsonl").unlink()
    assert len(fingerprint_files(str(folder))) == 3


def test_fingerprint_does_not_hold_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same files elsewhere (another mount of one data set) are the same input."""
    other = tmp_path_factory.mktemp("other") / "a.csv"
    other.write_text("a.csv")
    os.utime(other, ns=(7, 7))
    os.utime(folder / "a.csv", ns=(7, 7))
    assert fingerprint_files(str(other)) == fingerprint_files(f"{folder}/a.csv")


def test_fingerprint_on_a_store_without_times_changes_when_the_file_is_written_again() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/fingerprint/a.csv", b"1")
    first = fingerprint_files("memory://fingerprint")
    assert first == fingerprint_files("memory://fingerprint/a.csv")
    store.pipe("/fingerprint/a.csv", b"2")
    assert fingerprint_files("memory://fingerprint") != first


def test_urls_open_through_pyarrow_or_fsspec(tmp_path: Path) -> None:
    filesystem, path = resolve_url(f"file://{tmp_path}/x/")
    assert isinstance(filesystem, pafs.LocalFileSystem)
    assert path == f"{tmp_path}/x"
    filesystem, path = resolve_url("memory://bucket/x/")
    assert filesystem.type_name == "py::fsspec+memory"
    assert path == "/bucket/x"


def test_local_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_url("x/../y")[1] == str(tmp_path / "y")


@pytest.mark.parametrize("url", ["nosuchscheme://bucket/x", "file://bad host/x"])
def test_url_that_cannot_be_opened_is_named(url: str) -> None:
    with pytest.raises(WorkspaceError, match=f"cannot open {url}"):
        resolve_url(url)
