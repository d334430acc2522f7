"""Which fields of a loss go together."""

from typing import Any

import pytest

from distributed_mi.core.config import describe, validate
from distributed_mi.core.errors import ConfigError
from distributed_mi.core.registry import resolve


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("comirec_sa", {"loss": {"name": "bpr", "beta": 2.0}}, 'beta belongs to name = "hard_negatives"'),
        ("comirec_sa", {"loss": {"calibration": 0.5}}, 'calibration belongs to name = "gbce"'),
        ("youtube_dnn", {"loss": {"choice": "argmax"}}, 'choice belongs to name = "full_softmax"'),
        ("comirec_sa", {"loss": {"name": "full_softmax", "power": 2.0}}, "power belongs to choice"),
        (
            "comirec_sa",
            {"loss": {"name": "full_softmax"}, "mask_accidental_hits": False},
            "no accidental hits",
        ),
        ("remi", {"loss": {"beta": 2.0}}, "has ihn_beta beside"),
        ("remi", {"loss": {"name": "bpr"}, "ihn_beta": 3.0}, "ihn_beta belongs to loss.name"),
        ("remi", {"loss": {"name": "soft"}}, "loss.name"),
        ("youtube_dnn", {"loss": {"name": "gbce", "calibration": 1.5}}, "loss.calibration"),
    ],
)
def test_a_field_that_would_be_idle_or_wrong_is_refused(
    model: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(resolve("model", model).Config, settings)


def test_what_was_checked_once_passes_again() -> None:
    """A checkpoint holds every field, also those that its loss does not read."""
    owner = resolve("model", "remi")
    config = validate(owner.Config, {"loss": {"name": "gbce", "calibration": 0.5}})
    assert validate(owner.Config, config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("model", "default"),
    [("youtube_dnn", "sampled_softmax"), ("comirec_sa", "sampled_softmax"), ("remi", "hard_negatives")],
)
def test_help_gives_the_default_of_each_model(model: str, default: str) -> None:
    docs = {doc.name: doc for doc in describe(resolve("model", model).Config)}
    assert docs["loss.name"].default == f'"{default}"'
    assert {"loss.beta", "loss.calibration", "loss.choice", "loss.power"} <= set(docs)
