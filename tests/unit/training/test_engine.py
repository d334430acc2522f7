"""Engines: the same losses and parameters from all of them, and state that moves between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.models.base import Recommender
from distributed_mi.training import zero
from distributed_mi.training.config import EngineConfig
from distributed_mi.training.engine import PlainEngine
from distributed_mi.training.zero import DeepSpeedEngine
from tests.distributed import run_on_ranks
from tests.unit.training.toys import USERS, ToyBatches, build, config

ENGINES: list[dict[str, Any]] = [
    {"name": "ddp"},
    {"name": "deepspeed", "zero_stage": 0},
    {"name": "deepspeed", "zero_stage": 1},
    {"name": "deepspeed", "zero_stage": 2},
    {"name": "deepspeed", "zero_stage": 3},
]
VARIANTS: list[dict[str, Any]] = [
    {"precision": precision, "accumulation": accumulation, "gradient_clipping": clipping}
    for precision, accumulation, clipping in [
        ("fp32", 1, 0.0),
        ("fp32", 2, 0.05),
        ("bf16", 1, 0.05),
        ("bf16", 2, 0.0),
    ]
]
MODELS: dict[str, dict[str, Any]] = {
    "layers": {"name": "comirec_sa", "num_interests": 2},
    "parameters of the model itself": {"name": "youtube_dnn"},
}


@pytest.fixture(autouse=True)
def _spread_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters of these models are so small that stage 3 would leave all of them whole."""
    monkeypatch.setattr(zero, "KEPT_WHOLE", 0)


def losses(run: Any, first: int, last: int) -> list[float]:
    out = []
    for step in range(first, last):
        out.append(float(run.engine.step(run.batches(step), USERS).sum()))
        run.table.step(1e-2)
    return out


def trained(engine: dict[str, Any], model: dict[str, Any], folder: Path, group: Any = None) -> dict[str, Any]:
    """Losses of six steps and the dense parameters after them, JSON-ready."""
    _, run = build(config(engine=engine, model=model), folder, group=group)
    curve = torch.tensor(losses(run, 0, 6), dtype=torch.float64)
    curve = run.group.all_reduce_sum(curve)
    return {"losses": curve.tolist(), "dense": {n: v.tolist() for n, v in run.engine.dense_state().items()}}


def assert_same(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert got["dense"].keys() == expected["dense"].keys()
    pairs = [(got["losses"], expected["losses"])]
    pairs += [(got["dense"][n], v) for n, v in expected["dense"].items()]
    for a, b in pairs:
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("clipping", [0.0, 0.05])
def test_plain_engine_descends_as_torch_adam_does(
    tmp_path: Path, clipping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(by_torch: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        settings = {"gradient_clipping": clipping}
        _, run = build(config(engine=settings, model=MODELS["layers"]), tmp_path)
        assert run.engine._compiled
        run.engine._compiled = not by_torch
        losses(run, 0, 12)
        return run.engine.dense_state(), run.engine.optimizer_state()

    for compiled, torch_s in zip(run(False), run(True), strict=True):
        assert compiled.keys() == torch_s.keys()
        for name, value in compiled.items():
            torch.testing.assert_close(value, torch_s[name], rtol=1e-5, atol=1e-6)


def test_plain_engine_goes_on_from_a_state_that_is_loaded_between_steps(tmp_path: Path) -> None:
    _, old = build(config(model=MODELS["layers"]), tmp_path)
    losses(old, 0, 5)
    state = old.engine.dense_state(), old.engine.optimizer_state()
    curves = []
    for steps_before in (0, 3):
        _, new = build(config(model=MODELS["layers"], seed=steps_before), tmp_path)
        losses(new, 0, steps_before)
        new.engine.load_state(*state)
        new.table.zero_grad()
        new.table.assign(*old.table.state())
        curves.append((losses(new, 5, 9), new.engine.optimizer_state()))
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=0)
    assert float(curves[0][1]["pooling.inner_DA.step"]) == 9


@pytest.mark.parametrize("accumulation", [1, 2])
def test_plain_engine_does_without_autograd_only_what_a_model_offers(
    tmp_path: Path, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for offered in (True, False):
        with monkeypatch.context() as patch:
            settings = {"accumulation": accumulation}
            if not offered:
                patch.setattr(Recommender, "has_own_gradients", classmethod(lambda cls: False))
            _, run = build(config(engine=settings), tmp_path)
            by_autograd = []
            patch.setattr(type(run.model), "forward", _counted(type(run.model).forward, by_autograd))
            curve = losses(run, 0, 6)
            assert len(by_autograd) == (0 if offered else 6 * accumulation)
            weights = (run.engine.dense_state(), run.table.state()[1]["weight"])
            found.append([curve, *weights, run.engine.term_names])
    assert found[0].pop() == found[1].pop() == ["recommendation", "routing"]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def _counted(function: Any, calls: list[int]) -> Any:
    def counting(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return counting


def test_a_parameter_without_a_gradient_stays_and_its_steps_are_not_counted(tmp_path: Path) -> None:
    _, run = build(config(model=MODELS["layers"]), tmp_path)
    name, idle = next(iter(run.engine.parameters.items()))
    before = idle.detach().clone()
    losses(run, 0, 1)
    moved = idle.detach().clone()
    idle.requires_grad_(False)
    losses(run, 1, 3)
    assert not torch.equal(before, moved)
    assert torch.equal(moved, idle.detach())
    steps = {n: float(v) for n, v in run.engine.optimizer_state().items() if n.endswith(".step")}
    assert steps.pop(f"{name}.step") == 1
    assert set(steps.values()) == {3}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("engine", "model"),
    [*((e, "layers") for e in ENGINES[1:]), (ENGINES[4], "parameters of the model itself")],
    ids=str,
)
def test_deepspeed_gives_the_numbers_of_plain_torch(
    tmp_path: Path, engine: dict[str, Any], variant: dict[str, Any], model: str
) -> None:
    expected = trained(ENGINES[0] | variant, MODELS[model], tmp_path)
    assert_same(trained(engine | variant, MODELS[model], tmp_path), expected, 1e-5)


def all_engines(group: WorkerGroup, payload: dict[str, Any]) -> list[Any]:
    """On two workers: every engine with the asked variants, then the state of stage 3 moved to stage 3, 1 and plain."""
    zero.KEPT_WHOLE = 0
    folder = Path(payload["folder"])
    out: list[Any] = []
    for model in payload["models"]:
        out += [trained(e | v, MODELS[model], folder, group) for e in ENGINES for v in payload["variants"]]
    out.append(_moved(folder, group))
    return out


def _moved(folder: Path, group: WorkerGroup) -> list[list[float]]:
    model = MODELS["layers"]
    _, old = build(config(engine=ENGINES[4], model=model), folder, group=group)
    losses(old, 0, 4)
    dense, optimizer = old.engine.dense_state(), old.engine.optimizer_state()
    out = []
    for target in (ENGINES[4], ENGINES[2], ENGINES[0]):
        _, new = build(config(engine=target, seed=3, model=model), folder, group=group)
        new.engine.load_state(dense, optimizer)
        new.table.assign(*old.table.state())
        for name, value in optimizer.items():
            torch.testing.assert_close(new.engine.optimizer_state()[name], value, rtol=0, atol=0)
        with new.engine.whole_model() as whole:  # one worker encodes more often than the other
            for _ in range(1 + group.rank):
                whole.encode_rows(ToyBatches(group)(0)[0].history, torch.ones(USERS // 2, 5, 8))
        out.append(group.all_reduce_sum(torch.tensor(losses(new, 4, 8), dtype=torch.float64)).tolist())
    return [*out, group.all_reduce_sum(torch.tensor(losses(old, 4, 8), dtype=torch.float64)).tolist()]


@pytest.mark.parametrize(
    ("models", "variants"),
    [(["layers"], VARIANTS[1:2]), pytest.param(list(MODELS), VARIANTS, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_two_workers_give_the_numbers_of_one_with_every_engine(
    tmp_path: Path, models: list[str], variants: list[dict[str, Any]]
) -> None:
    """In bf16 a difference in the last bit of a sum may move a rounding: there two workers are compared among
    themselves and to the one loosely."""
    payload = {"folder": str(tmp_path), "models": models, "variants": variants}
    ranks = run_on_ranks("tests.unit.training.test_engine:all_engines", 2, tmp_path / "ranks", payload)
    assert ranks[0] == ranks[1]
    found = iter(ranks[0])
    for model in (MODELS[m] for m in models):
        alone = [trained(ENGINES[0] | v, model, tmp_path) for v in variants]
        plain = [next(found) for _ in variants]
        others = [[next(found) for _ in variants] for _ in ENGINES[1:]]
        for group in (plain, *others):
            for variant, got, one, two in zip(variants, group, alone, plain, strict=True):
                exact = variant["precision"] == "fp32"
                assert_same(got, one, 1e-5 if exact else 0.05)
                assert_same(got, two, 1e-5 if exact else 0.02)
    moved = next(found)
    for curve in moved[:-1]:
        torch.testing.assert_close(curve, moved[-1], atol=1e-5, rtol=1e-5)


def test_the_engine_follows_name_and_stage(tmp_path: Path) -> None:
    assert isinstance(build(config(), tmp_path)[1].engine, PlainEngine)
    assert isinstance(build(config(engine=ENGINES[1]), tmp_path)[1].engine, DeepSpeedEngine)
    assert [EngineConfig(zero_stage=s).uses_deepspeed for s in (0, 1, 2, 3)] == [False, True, True, True]
    assert EngineConfig(name="deepspeed").uses_deepspeed
    with pytest.raises(ValidationError, match='zero_stage 2 needs name = "deepspeed" or "auto"'):
        EngineConfig(name="ddp", zero_stage=2)


@pytest.mark.parametrize("target", ENGINES, ids=str)
@pytest.mark.parametrize("source", [ENGINES[0], ENGINES[2], ENGINES[4]], ids=str)
def test_state_moves_between_engines(tmp_path: Path, source: dict[str, Any], target: dict[str, Any]) -> None:
    _, old = build(config(engine=source), tmp_path)
    losses(old, 0, 10)
    _, new = build(config(engine=target, seed=3), tmp_path)
    new.engine.load_state(old.engine.dense_state(), old.engine.optimizer_state())
    new.table.assign(*old.table.state())
    for name, value in old.engine.optimizer_state().items():
        torch.testing.assert_close(new.engine.optimizer_state()[name], value, rtol=0, atol=0)
    torch.testing.assert_close(losses(new, 10, 20), losses(old, 10, 20), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("engine", [*ENGINES[:3], ENGINES[4]], ids=str)
def test_a_step_in_parts_equals_the_step_in_one(tmp_path: Path, engine: dict[str, Any]) -> None:
    """ComiRec-SA's loss is a mean over users, so cutting a step only changes the order of a sum."""
    model = {"name": "comirec_sa", "num_interests": 2}
    _, whole = build(config(engine=engine, model=model), tmp_path)
    _, parts = build(config(engine=engine | {"accumulation": 3}, model=model), tmp_path)
    torch.testing.assert_close(losses(parts, 0, 10), losses(whole, 0, 10), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
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
    _, run = build(config(engine={"name": "deepspeed"}), tmp_path)
    assert run.engine.engine.gradient_clipping() == 0.0


def test_shares_cover_the_step_once() -> None:
    for size, parts in [(1, 1), (2, 1), (3, 2), (2, 3)]:
        rows = [b.history.item_ids_BL for r in range(size) for b in ToyBatches(_Fake(r, size), parts)(0)]
        whole = ToyBatches(WorkerGroup.alone())(0)[0].history.item_ids_BL
        assert sorted(torch.cat(rows).tolist()) == sorted(whole.tolist())


class _Fake(WorkerGroup):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, torch.device("cpu"), None)
