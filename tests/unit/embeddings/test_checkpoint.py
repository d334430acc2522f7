"""Saving and loading a table in one process; tests/parity/test_sharded_table.py changes the number of workers."""

from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch
from safetensors.torch import load_file

from distributed_mi.core.errors import CheckpointError
from distributed_mi.embeddings import checkpoint
from distributed_mi.embeddings.checkpoint import load_table, save_table
from distributed_mi.embeddings.optimizer import SGD
from distributed_mi.embeddings.table import LocalItemTable

FS = pafs.LocalFileSystem()


@pytest.fixture
def trained() -> LocalItemTable:
    table = LocalItemTable(30, 4, seed=1)
    for step in range(3):
        table.rows(torch.arange(step, 30, 2)).square().sum().backward()
        table.step(0.1)
    return table


def assert_same(a: LocalItemTable, b: LocalItemTable, names: list[str]) -> None:
    for name in names:
        assert torch.equal(a.state()[1][name], b.state()[1][name]), name


def test_weights_and_optimizer_come_back_bit_for_bit(trained: LocalItemTable, tmp_path: Path) -> None:
    files = save_table(trained, FS, str(tmp_path), 0, 1)
    assert list(files) == ["table-00000-of-00001-0000.safetensors"]
    other = LocalItemTable(30, 4, seed=9)
    load_table(other, FS, str(tmp_path), files, with_optimizer=True)
    assert_same(trained, other, ["weight", "mean", "mean_square", "num_updates"])


def test_large_tables_are_cut_into_files(
    trained: LocalItemTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A row is at most 8 (id) + 3 * 16 (weight, two moments) + 4 (count) = 60 bytes, so a file holds 10.
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 600)
    files = save_table(trained, FS, str(tmp_path), 0, 1)
    ranges = [load_file(tmp_path / name)["id_range"].tolist() for name in sorted(files)]
    assert ranges == [[0, 1, 10], [10, 1, 10], [20, 1, 10]]
    other = LocalItemTable(30, 4, seed=9)
    load_table(other, FS, str(tmp_path), files, with_optimizer=True)
    assert_same(trained, other, ["weight", "mean"])


def test_weights_load_without_the_optimizer_and_into_another_one(
    trained: LocalItemTable, tmp_path: Path
) -> None:
    files = save_table(trained, FS, str(tmp_path), 0, 1, with_optimizer=False)
    assert set(load_file(tmp_path / next(iter(files)))) == {"id_range", "weight"}
    other = LocalItemTable(30, 4, seed=9, optimizer=SGD())
    load_table(other, FS, str(tmp_path), files, with_optimizer=False)
    assert_same(trained, other, ["weight"])
    with pytest.raises(CheckpointError, match="holds no mean"):
        load_table(LocalItemTable(30, 4), FS, str(tmp_path), files, with_optimizer=True)


def test_a_damaged_file_is_named(trained: LocalItemTable, tmp_path: Path) -> None:
    files = save_table(trained, FS, str(tmp_path), 0, 1)
    name = next(iter(files))
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_table(trained, FS, str(tmp_path), files, with_optimizer=False)


def test_a_file_that_is_no_table_is_named(trained: LocalItemTable, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not a table")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a safetensors file"):
        load_table(
            trained,
            FS,
            str(tmp_path),
            {"x.safetensors": checkpoint.sha256(b"not a table")},
            with_optimizer=False,
        )


def test_a_missing_file_is_named(trained: LocalItemTable, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"y\.safetensors is missing"):
        load_table(trained, FS, str(tmp_path), {"y.safetensors": "0" * 64}, with_optimizer=False)


@pytest.mark.parametrize(
    ("rows", "dim", "message"),
    [(29, 4, "id 29 is outside"), (30, 5, "rows of shape"), (31, 4, "row 30 is missing")],
)
def test_a_table_of_another_size_is_refused(
    trained: LocalItemTable, tmp_path: Path, rows: int, dim: int, message: str
) -> None:
    files = save_table(trained, FS, str(tmp_path), 0, 1)
    with pytest.raises(CheckpointError, match=message):
        load_table(LocalItemTable(rows, dim), FS, str(tmp_path), files, with_optimizer=False)
