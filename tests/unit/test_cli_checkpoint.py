"""`distributed-mi checkpoint inspect | verify | export`, through the entry point."""

import json
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch
from safetensors import safe_open

from distributed_mi import cli
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.training.checkpoint import load_model
from tests.unit.training.toys import NUM_ROWS, ToyBatches, build, config

FS = pafs.LocalFileSystem()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `checkpoints/` with steps 8 and 12, and of `model/`."""
    folder = tmp_path_factory.mktemp("run")
    trainer, run = build(config(), folder)
    trainer.train()
    run.store.export(12, str(folder / "model"), run.table)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_inspect_prints_what_a_checkpoint_is(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "inspect", str(trained / "checkpoints")]) == 0
    text = capsys.readouterr().out
    for wanted in ("step        12", "remi (", f"{NUM_ROWS} rows x 8, adam", "1 worker(s)"):
        assert wanted in text
    assert "step-000000008, step-000000012" in text
    assert '"stop_reason": "max_steps"' in text
    assert "dense_optimizer.safetensors" in text
    assert cli.main(["checkpoint", "inspect", str(trained / "model")]) == 0
    assert "without the optimizer's state" in capsys.readouterr().out


def test_inspect_as_json(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "inspect", str(trained / "checkpoints/step-000000008"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 8
    for name, file in facts["files"].items():
        assert file["bytes"] == (trained / "checkpoints/step-000000008" / name).stat().st_size


@pytest.mark.parametrize("folder", ["checkpoints", "model", "checkpoints/step-000000008"])
def test_verify_passes_what_is_whole(trained: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "verify", f"file://{trained / folder}"]) == 0
    assert "all as they were written" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["dense.safetensors", "dense_optimizer.safetensors", "table-00000-of-00001-0000.safetensors"]
)
@pytest.mark.parametrize("damage", ["bit", "gone", "cut"])
def test_verify_names_the_file_that_is_damaged(
    copy: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = copy / "checkpoints/step-000000008" / name
    data = bytearray(victim.read_bytes())
    if damage == "gone":
        victim.unlink()
    else:
        data[-1] ^= 1
        victim.write_bytes(data if damage == "bit" else data[:-5])
    assert cli.main(["checkpoint", "verify", str(copy / "checkpoints")]) == 1
    assert f"step-000000008/{name}" in capsys.readouterr().err


def test_verify_finds_rows_that_no_file_holds(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = copy / "model/manifest.json"
    values = json.loads(manifest.read_text())
    del values["files"]["table-00000-of-00001-0000.safetensors"]
    manifest.write_text(json.dumps(values))
    assert cli.main(["checkpoint", "verify", str(copy / "model")]) == 1
    assert f"holds 0 of {NUM_ROWS} item rows" in capsys.readouterr().err


def test_verify_refuses_rows_of_another_table(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = copy / "model/manifest.json"
    values = json.loads(manifest.read_text())
    values["model"]["num_rows"] -= 1
    manifest.write_text(json.dumps(values))
    assert cli.main(["checkpoint", "verify", str(copy / "model")]) == 1
    assert "holds rows of another table" in capsys.readouterr().err


def test_an_exported_file_can_be_read_without_this_project(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.safetensors"
    source = trained / "checkpoints/step-000000012"
    assert cli.main(["checkpoint", "export", str(source), str(out)]) == 0
    model = load_model(FS, str(source))
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["model"])["num_rows"] == NUM_ROWS
        weight = file.get_tensor("weight")
        names = set(file.keys()) - {"weight"}
        dense = {n.removeprefix("dense."): file.get_tensor(n) for n in names}
    assert torch.equal(weight, model.items.rows(torch.arange(NUM_ROWS)))
    assert dense.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(dense[name], value), name
    assert [p.name for p in out.parent.iterdir()] == ["model.safetensors"]


def test_an_exported_folder_is_a_model(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert cli.main(["checkpoint", "export", str(trained / "checkpoints"), str(out)]) == 0
    names = {p.name for p in out.iterdir()}
    assert names == {p.name for p in (trained / "model").iterdir()}
    batch = ToyBatches(WorkerGroup.alone())(3)[0]
    ours, theirs = (load_model(FS, str(p)).encode(batch.history) for p in (out, trained / "model"))
    assert torch.equal(ours.interests_BKD, theirs.interests_BKD)
    assert cli.main(["checkpoint", "verify", str(out)]) == 0


@pytest.mark.parametrize("out", ["model", "model.safetensors"])
def test_export_overwrites_nothing(
    trained: Path, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / out).write_text("mine")
    assert cli.main(["checkpoint", "export", str(trained / "model"), str(tmp_path / out)]) == 1
    assert "exists; nothing was written" in capsys.readouterr().err
    assert (tmp_path / out).read_text() == "mine"


def test_a_damaged_checkpoint_is_not_exported(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = copy / "model/table-00000-of-00001-0000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    for out in (copy / "out", copy / "out.safetensors"):
        assert cli.main(["checkpoint", "export", str(copy / "model"), str(out)]) == 1
        assert victim.name in capsys.readouterr().err
        assert not (out / "manifest.json").exists()
        assert not out.is_file()


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_path_without_a_checkpoint_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step-000000004").mkdir()  # begun, not complete
    assert cli.main(["checkpoint", command, str(tmp_path)]) == 1
    assert "no complete checkpoint at" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify", "export"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", command, "--help"]) == 0
    assert "checkpoints/" in capsys.readouterr().out
