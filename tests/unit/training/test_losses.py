"""The train stage with every loss that can be configured. One worker, no Ray."""

from pathlib import Path
from typing import Any

import pytest

from distributed_mi.core.errors import ConfigError
from distributed_mi.training import launcher
from distributed_mi.training.config import ScalingConfig, TrainConfig
from tests.model_batches import LOSSES
from tests.unit.training.workspaces import HitsOfLastItem, make_prepared, tiny_config


def no_ray() -> None:
    raise AssertionError("one worker must not need Ray")


def train(folder: Path, config: TrainConfig) -> Any:
    workspace = make_prepared(folder)
    return launcher.run(
        config,
        ScalingConfig(num_workers=1, threads_per_worker=1),
        workspace,
        validate=HitsOfLastItem(workspace, config.max_history),
        start_ray=no_ray,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(tmp_path: Path, loss: str) -> None:
    model: dict[str, Any] = {"name": "comirec_sa", "num_interests": 2, "loss": LOSSES[loss]}
    if loss == "gbce":  # see losses/pairwise.py
        model = {"name": "youtube_dnn", "loss": LOSSES[loss]}
    stats = train(tmp_path, tiny_config(model=model, max_steps=200, checkpoint_every=200)).stats
    assert stats["loss"]["last"] < stats["loss"]["first"]
    assert stats["best_value"] > 0.3  # guessing finds one of 60 items among 10 in a sixth of the cases


def test_a_loss_over_the_catalogue_learns_in_bfloat16(tmp_path: Path) -> None:
    model = {"name": "remi", "num_interests": 2, "loss": LOSSES["argmax"]}
    engine = {"precision": "bf16", "name": "ddp"}
    stats = train(tmp_path, tiny_config(model=model, engine=engine, checkpoint_every=60)).stats
    assert stats["best_value"] > 0.3


def test_a_correction_that_the_loss_would_ignore_is_refused(tmp_path: Path) -> None:
    model = {"name": "youtube_dnn", "loss": {"name": "bpr"}}
    with pytest.raises(ConfigError, match=r"train\.negatives\.log_q: the loss of youtube_dnn"):
        train(tmp_path, tiny_config(model=model, negatives={"log_q": True, "name": "popularity"}))


def test_in_batch_takes_the_popularity_correction(tmp_path: Path) -> None:
    losses = []
    for log_q in (False, True):
        config = tiny_config(
            model={"name": "youtube_dnn", "loss": {"name": "in_batch"}},
            negatives={"log_q": log_q, "name": "popularity", "num_negatives": 1},
            max_steps=1,
        )
        losses.append(train(tmp_path / str(log_q), config).stats["loss"]["first"])
    assert losses[0] != losses[1]
