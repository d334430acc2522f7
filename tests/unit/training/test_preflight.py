"""Memory before a run: bytes by hand, what is refused and with which advice, the dry run of the command line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distributed_mi.cli import main
from distributed_mi.core.errors import ConfigError, WorkspaceError
from distributed_mi.core.registry import choices
from distributed_mi.training import launcher, preflight
from distributed_mi.training.config import ScalingConfig, TrainConfig
from distributed_mi.training.preflight import Node, Probe, Sizes, judge, predict
from tests.unit.training.workspaces import HitsOfLastItem, add_semantics, make_prepared, tiny_config

SIZES = Sizes(num_rows=1_000_001, num_events=5_000_000, num_users=100_000)
NOTHING = Probe(num_parameters=1_000, fixed_bytes=0.0, bytes_per_user=0.0)
GB = 10**9


def remi(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"dim": 64, "model": {"name": "remi"}} | values)


def test_bytes_of_table_optimizer_and_dense_part_by_hand() -> None:
    need = predict(remi(), SIZES, 1, NOTHING)
    assert need.device["item table"] == 1_000_001 * (64 * 4 + 8)
    assert need.device["its optimizer state"] == 1_000_001 * (2 * 64 * 4 + 4)
    assert need.device["dense parameters and Adam"] == 16_000
    assert need.mapped == 8 * 5_000_000 + 40 * 100_000
    four = predict(remi(), SIZES, 4, NOTHING)
    assert four.device["item table"] == 250_001 * (64 * 4 + 8)


@pytest.mark.parametrize(
    ("table", "state"),
    [({"name": "row_adagrad"}, 4), ({"name": "adagrad"}, 256), ({"name": "sgd"}, 0), ({"name": "adam"}, 516)],
    ids=str,
)
def test_each_optimizer_has_its_state(table: dict[str, Any], state: int) -> None:
    need = predict(remi(table=table), SIZES, 1, NOTHING)
    assert need.device["its optimizer state"] == 1_000_001 * state
    assert "dense gradient of the table" not in need.device


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_a_softmax_over_all_items_needs_a_gradient_of_all_rows(loss: str) -> None:
    config = remi(model={"name": "remi", "loss": {"name": loss}}, table={"name": "row_adagrad"})
    need = predict(config, SIZES, 2, Probe.measure(config, SIZES))
    held = need.device.get("dense gradient of the table", 0)
    assert held == (500_001 * 64 * 4 if loss == "full_softmax" else 0)


def test_the_state_of_a_table_is_what_the_table_holds(tmp_path: Path) -> None:
    from distributed_mi.embeddings.optimizer import make_optimizer
    from distributed_mi.embeddings.table import LocalItemTable

    for name in ("adam", "adagrad", "row_adagrad", "sgd"):
        config = remi(table={"name": name}, dim=24)
        table = LocalItemTable(33, 24, optimizer=make_optimizer(config.table))
        ids, tensors = table.state()
        held = sum(t.numel() * t.element_size() for t in [ids, *tensors.values()])
        need = predict(config, replace(SIZES, num_rows=33), 1, NOTHING).device
        assert need["item table"] + need["its optimizer state"] == held


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, 16_000), (1, 8_000 + 6_000), (2, 4_000 + 8_000), (3, 10_000)]
)
def test_zero_spreads_the_dense_part(stage: int, expected: int) -> None:
    need = predict(remi(engine={"zero_stage": stage}), SIZES, 2, NOTHING)
    assert need.device["dense parameters and Adam"] == expected


def test_sequences_of_an_object_store_count_and_mapped_ones_do_not() -> None:
    mapped = predict(remi(), SIZES, 1, NOTHING)
    store = predict(remi(), replace(SIZES, mapped=False), 1, NOTHING)
    difference = sum(store.host.values()) - sum(mapped.host.values())
    assert (difference, store.mapped) == (2 * mapped.mapped, 0)


@pytest.mark.parametrize("name", [n for n in choices("model") if n != "most_popular"])
def test_every_model_can_be_probed_and_a_step_grows_with_its_users(name: str) -> None:
    sizes = replace(SIZES, text_dim=12, num_interests=100) if name == "eimf" else SIZES
    probe = Probe.measure(remi(model={"name": name}, dim=16), sizes)
    assert probe.num_parameters > 0
    assert probe.bytes(64) > probe.bytes(8) > 0
    wider = Probe.measure(remi(model={"name": name}, dim=512), sizes)
    assert wider.bytes(64) > 8 * probe.bytes(64)


def test_the_probe_predicts_a_larger_batch() -> None:
    config = remi(model={"name": "comirec_sa"}, dim=16, negatives={"num_negatives": 40})
    probe = Probe.measure(config, SIZES)
    model = config.model.resolve()(
        config.model.settings(), items=preflight.LocalItemTable(64, 16), max_history=20, text_dim=0
    )
    kept = preflight._kept_bytes(model, preflight._batch(model, config, SIZES, 50))
    assert probe.bytes(50) == pytest.approx(2 * kept, rel=0.1)
    assert kept > 4 * 50 * 20 * (16 + 16 + 64)  # rows, keys and hidden layer of full histories


def test_a_run_that_fits_is_not_refused_and_the_table_says_why() -> None:
    verdict = judge(remi(), ScalingConfig(num_workers=2), SIZES, [Node(20 * GB, 2)])
    assert verdict.refusal == ""
    assert "this machine: 2 worker(s) need 2." in verdict.text
    assert "free are 20.0 GB" in verdict.text
    assert "item table" in verdict.text
    assert judge(remi(), ScalingConfig(num_workers=2), SIZES, [Node(None, 2)]).refusal == ""


def test_what_cannot_fit_is_refused_with_workers_width_and_optimizer_that_would() -> None:
    """10^8 rows of 64: 26.4 GB of rows, 51.6 GB of Adam's state."""
    sizes = replace(SIZES, num_rows=100_000_001)
    node = Node(24 * GB, 2)
    verdict = judge(remi(), ScalingConfig(num_workers=2), sizes, [node])
    assert "this machine: 2 worker(s) need 8" in verdict.refusal
    assert "--force" in verdict.refusal
    words = verdict.refusal.split()
    workers = next(int(w.split("=")[1]) for w in words if w.startswith("scaling.num_workers="))
    width = next(int(w.split("=")[1].rstrip(".;")) for w in words if w.startswith("train.dim="))

    def fits(workers: int, node: Node, **values: Any) -> bool:
        scaling = ScalingConfig(num_workers=workers)
        return judge(remi(**values), scaling, sizes, [node]).refusal == ""

    alone = replace(node, workers=1)
    assert fits(workers, alone)
    assert not fits(workers - 1, alone)
    assert fits(2, node, dim=width)
    assert not fits(2, node, dim=width + 8)
    assert "row_adagrad" not in verdict.refusal  # the rows alone are too much
    smaller = judge(remi(), ScalingConfig(num_workers=2), sizes, [Node(40 * GB, 2)])
    assert "train.table.name=row_adagrad here" in smaller.refusal


def test_each_machine_is_looked_at_and_gpus_hold_what_the_model_needs() -> None:
    scaling = ScalingConfig(num_workers=3)
    nodes = [Node(30 * GB, 2), Node(1 * GB, 1)]
    assert "machine 2: 1 worker(s) need" in judge(remi(), scaling, SIZES, nodes).refusal
    gpu = ScalingConfig(num_workers=1, gpus_per_worker=1)
    sizes = replace(SIZES, num_rows=10_000_001)
    fits = judge(remi(), gpu, sizes, [Node(4 * GB, 1, gpu_bytes=16 * GB)])
    assert fits.refusal == ""
    assert "on the GPU" in fits.text
    assert judge(remi(), gpu, sizes, [Node(4 * GB, 1, gpu_bytes=6 * GB)]).refusal != ""


def test_the_stage_refuses_and_force_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_prepared(tmp_path)
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: 1 << 20)
    config = tiny_config(max_steps=2, validate_every=2)
    scaling = ScalingConfig(num_workers=1, threads_per_worker=1)
    validate = HitsOfLastItem(workspace, config.max_history)

    def run(config: TrainConfig) -> Any:
        return launcher.run(config, scaling, workspace, validate=validate, start_ray=lambda: None)

    with pytest.raises(ConfigError, match=r"this machine: 1 worker\(s\) need .* free are 1\.0 MB"):
        run(config)
    stats = run(config.model_copy(update={"force": True})).stats
    assert stats["predicted_memory"]["host_bytes"] > 1 << 20


def test_sizes_come_from_the_manifests(tmp_path: Path) -> None:
    workspace = make_prepared(tmp_path)
    sizes = Sizes.read(tiny_config(), workspace)
    assert (sizes.num_rows, sizes.text_dim, sizes.mapped) == (61, 0, True)
    eimf = tiny_config(model={"name": "eimf"})
    with pytest.raises(WorkspaceError, match="interests"):
        Sizes.read(eimf, workspace)
    add_semantics(workspace)
    sizes = Sizes.read(eimf, workspace)
    assert (sizes.text_dim, sizes.num_interests) == (6, 3)


def test_the_dry_run_prints_the_table_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_prepared(tmp_path / "w")
    (tmp_path / "tiny.toml").write_text(f'workspace = "{tmp_path}/w"\n')
    arguments = ["train", str(tmp_path / "tiny.toml"), "--dry-run"]
    assert main(arguments) == 0
    assert "predicted memory of each of" in capsys.readouterr().out
    assert not (tmp_path / "w" / "train").exists()
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: 1 << 20)
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
