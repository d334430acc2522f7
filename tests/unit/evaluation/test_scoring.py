import numpy as np
import pytest

from distributed_mi.core.config import describe, validate
from distributed_mi.core.errors import ConfigError, UnknownNameError
from distributed_mi.evaluation import scoring
from distributed_mi.evaluation.config import EvaluateConfig, MetricSpec, parse_metric


def test_parse_metric() -> None:
    assert parse_metric("recall@20") == MetricSpec("recall", 20)
    assert parse_metric("package.module:Mine@5") == MetricSpec("package.module:Mine", 5)
    assert str(MetricSpec("ndcg", 3)) == "ndcg@3"


@pytest.mark.parametrize("text", ["recall", "recall@", "recall@0", "recall@-1", "recall@x", "@5", ""])
def test_malformed_metrics_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must look like name@k"):
        parse_metric(text)


def test_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"Known: .*hit_rate.*recall"):
        parse_metric("precision@5")


def test_configuration_reports_bad_metrics_as_field_errors() -> None:
    with pytest.raises(ConfigError, match=r'evaluate\.metrics: .*unknown metric "precision"'):
        validate(EvaluateConfig, {"metrics": ["precision@5"]}, where="evaluate")
    with pytest.raises(ConfigError, match="named twice"):
        validate(EvaluateConfig, {"metrics": ["recall@5", "recall@5"]})


def test_every_field_is_documented_and_batch_size_does_not_redo() -> None:
    assert all(field.doc for field in describe(EvaluateConfig))
    assert "users_per_batch" not in EvaluateConfig().result_fields()


def test_longest_list() -> None:
    assert scoring.longest(["recall@20", "ndcg@50", "mrr@5"]) == 50


def test_interval_is_near_the_normal_one() -> None:
    # 2,000 users, mean 0.3: the standard error of a 0/1 mean is sqrt(0.3 * 0.7 / 2000) = 0.01025.
    values = np.repeat([1.0, 0.0], [600, 1400])
    low, high = scoring.intervals({"m": values}, samples=2000, seed=1)["m"]
    assert low == pytest.approx(0.3 - 1.96 * 0.01025, abs=0.002)
    assert high == pytest.approx(0.3 + 1.96 * 0.01025, abs=0.002)


def test_intervals_are_seeded_and_do_not_depend_on_the_block_size(monkeypatch) -> None:
    values = {"m": np.random.default_rng(0).random(50)}
    whole = scoring.intervals(values, samples=40, seed=1)
    assert scoring.intervals(values, samples=40, seed=2) != whole
    monkeypatch.setattr(scoring, "_DRAWS_AT_ONCE", 130)
    low, high = scoring.intervals(values, samples=40, seed=1)["m"]
    assert (low, high) == pytest.approx(whole["m"], abs=1e-12)


def test_constant_metric_has_an_interval_of_width_0() -> None:
    assert scoring.intervals({"m": np.full(9, 0.5)}, samples=20, seed=1) == {"m": (0.5, 0.5)}
    assert scoring.intervals({"m": np.full(9, 0.5)}, samples=0, seed=1) == {}
