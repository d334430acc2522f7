"""Engines: the same losses and parameters from all of them, and state that moves between them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.training.engine import DeepSpeedEngine, PlainEngine
from tests.unit.training.toys import USERS, ToyBatches, build, config

ENGINES: list[dict[str, Any]] = [
    {"name": "ddp"},
    {"name": "deepspeed", "zero_stage": 0},
    {"name": "deepspeed", "zero_stage": 1},
    {"name": "deepspeed", "zero_stage": 2},
]


def losses(run: Any, first: int, last: int) -> list[float]:
    out = []
    for step in range(first, last):
        out.append(float(run.engine.step(run.batches(step), USERS).sum()))
        run.table.step(1e-2)
    return out


@pytest.mark.parametrize("engine", ENGINES[1:], ids=str)
def test_deepspeed_gives_the_losses_of_plain_torch(tmp_path: Path, engine: dict[str, Any]) -> None:
    _, plain = build(config(engine=ENGINES[0]), tmp_path)
    _, other = build(config(engine=engine), tmp_path)
    assert isinstance(plain.engine, PlainEngine)
    assert isinstance(other.engine, DeepSpeedEngine)
    torch.testing.assert_close(losses(other, 0, 30), losses(plain, 0, 30), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("target", ENGINES, ids=str)
@pytest.mark.parametrize("source", [ENGINES[0], ENGINES[2]], ids=str)
def test_state_moves_between_engines(tmp_path: Path, source: dict[str, Any], target: dict[str, Any]) -> None:
    _, old = build(config(engine=source), tmp_path)
    losses(old, 0, 10)
    _, new = build(config(engine=target, seed=3), tmp_path)
    new.engine.load_state(old.engine.dense_state(), old.engine.optimizer_state())
    new.table.assign(*old.table.state())
    for name, value in old.engine.optimizer_state().items():
        torch.testing.assert_close(new.engine.optimizer_state()[name], value, rtol=0, atol=0)
    torch.testing.assert_close(losses(new, 10, 20), losses(old, 10, 20), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("engine", ENGINES[:3], ids=str)
def test_a_step_in_parts_equals_the_step_in_one(tmp_path: Path, engine: dict[str, Any]) -> None:
    """ComiRec-SA's loss is a mean over users, so cutting a step only changes the order of a sum."""
    model = {"name": "comirec_sa", "num_interests": 2}
    _, whole = build(config(engine=engine, model=model), tmp_path)
    _, parts = build(config(engine=engine | {"accumulation": 3}, model=model), tmp_path)
    torch.testing.assert_close(losses(parts, 0, 10), losses(whole, 0, 10), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", [ENGINES[0], ENGINES[1], ENGINES[2]], ids=str)
def test_clipping_bounds_the_first_sgd_like_change(tmp_path: Path, engine: dict[str, Any]) -> None:
    """Adam's moments after one step are (1 - beta1) g, so their norm shows that of the applied gradient."""
    _, run = build(config(engine=engine | {"gradient_clipping": 1e-3}), tmp_path)
    losses(run, 0, 1)
    moments = [v for n, v in run.engine.optimizer_state().items() if n.endswith("exp_avg")]
    norm = torch.cat([m.flatten() for m in moments]).norm() / 0.1
    assert norm == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("name", ["ddp", "deepspeed"])
def test_bf16_follows_fp32_within_its_precision_and_keeps_parameters_in_float32(
    tmp_path: Path, name: str
) -> None:
    _, exact = build(config(engine={"name": name}), tmp_path)
    _, run = build(config(engine={"name": name, "precision": "bf16"}), tmp_path)
    expected, curve = losses(exact, 0, 20), losses(run, 0, 20)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert curve != expected
    torch.testing.assert_close(curve, expected, rtol=0.03, atol=0.03)  # 8 bits of mantissa: 0.4 % a product


def test_default_is_no_clipping(tmp_path: Path) -> None:
    """DeepSpeed clips at 1.0 when its configuration does not say otherwise."""
    _, run = build(config(), tmp_path)
    assert run.engine.engine.gradient_clipping() == 0.0


def test_shares_cover_the_step_once() -> None:
    for size, parts in [(1, 1), (2, 1), (3, 2), (2, 3)]:
        rows = [b.history.item_ids_BL for r in range(size) for b in ToyBatches(_Fake(r, size), parts)(0)]
        whole = ToyBatches(WorkerGroup.alone())(0)[0].history.item_ids_BL
        assert sorted(torch.cat(rows).tolist()) == sorted(whole.tolist())


class _Fake(WorkerGroup):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, torch.device("cpu"), None)
