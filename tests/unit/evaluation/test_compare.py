import itertools
import json
import shutil

import numpy as np
import pytest

from distributed_mi.core.errors import InputError
from distributed_mi.evaluation import compare as comparing
from distributed_mi.evaluation import report as reporting
from distributed_mi.evaluation import stage
from distributed_mi.evaluation.config import EvaluateConfig
from tests.unit.evaluation import tiny

CONFIG = EvaluateConfig(metrics=["recall@5", "hit_rate@5", "coverage@5"], bootstrap_samples=50)


def evaluate(workspace, run: str, config: EvaluateConfig = CONFIG) -> str:
    stage.run(config, workspace, run_name=run, load=tiny.load, run_on_workers=tiny.in_this_process)
    return f"{workspace.root}/evaluate/{run}/report.json"


@pytest.fixture
def reports(workspace) -> tuple[str, str]:
    tiny.train(workspace, "other", seed=8)
    return evaluate(workspace, "two"), evaluate(workspace, "other")


def test_differences_are_those_of_the_reports(reports) -> None:
    comparison = comparing.compare(*reports, samples=100, permutations=200)
    a, b = (reporting.read(path)["metrics"] for path in reports)
    assert [m.metric for m in comparison.metrics] == [
        "recall@5",
        "hit_rate@5",
    ]  # coverage has no value per user
    for m in comparison.metrics:
        assert m.difference == pytest.approx(b[m.metric]["value"] - a[m.metric]["value"])
        assert m.ci95[0] <= m.difference <= m.ci95[1]
        assert 0 < m.p_value <= 1
    recall, hit_rate = comparison.metrics
    assert recall.p_mcnemar is None
    assert hit_rate.p_mcnemar is not None
    assert (comparison.run_a, comparison.run_b, comparison.num_users) == ("two", "other", 25)


def test_swapping_the_reports_turns_the_signs(reports) -> None:
    forward, back = comparing.compare(*reports), comparing.compare(*reversed(reports))
    for f, b in zip(forward.metrics, back.metrics, strict=True):
        assert f.difference == pytest.approx(-b.difference)
        assert f.p_value == pytest.approx(b.p_value, abs=1e-12)


def test_a_run_against_itself_has_no_difference(reports) -> None:
    for m in comparing.compare(reports[0], reports[0]).metrics:
        assert (m.difference, m.ci95, m.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_folder_works_and_text_names_leakage(reports) -> None:
    comparison = comparing.compare(reports[0].removesuffix("/report.json"), reports[1])
    text = comparing.render(comparison)
    assert tiny.LEAKAGE["text"] in text
    assert "recall@5" in text
    assert comparison.to_markdown().count("| recall@5 |") == 1
    assert json.loads(comparing.render(comparison, as_json=True))["num_users"] == 25


def test_sign_flip_equals_full_enumeration() -> None:
    differences = np.array([0.5, -0.25, 1.0, 0.75, 0.125, 0.5, -1.0, 0.25])
    observed = abs(differences.sum())
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    exact = np.mean([s >= observed for s in sums])
    p = comparing.sign_flip_p_values(differences[:, None], permutations=20_000, seed=3)[0]
    assert p == pytest.approx(exact, abs=0.012)  # 3 standard errors of 20,000 draws


def test_sign_flip_of_a_clear_difference_is_the_smallest_possible() -> None:
    p = comparing.sign_flip_p_values(np.full((60, 1), 0.1), permutations=999, seed=3)[0]
    assert p == pytest.approx(1 / 1000)


def test_mcnemar_by_hand() -> None:
    # 5 users only B hits, 1 only A: two-sided binomial p = 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64.
    a = np.array([0, 0, 0, 0, 0, 1, 1, 0], float)
    b = np.array([1, 1, 1, 1, 1, 0, 1, 0], float)
    assert comparing.mcnemar(a, b) == pytest.approx(14 / 64)
    assert comparing.mcnemar(a, a) == 1.0


def test_other_protocol_is_refused(workspace, reports) -> None:
    other = evaluate(workspace, "other", CONFIG.model_copy(update={"exclude_seen": True}))
    with pytest.raises(InputError, match="differ in protocol"):
        comparing.compare(reports[0], other)


def test_other_users_are_refused(workspace, reports, tmp_path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(reports[0].removesuffix("/report.json"), kept)
    tiny.prepare(workspace, test_users=24)
    tiny.train(workspace, "two")
    with pytest.raises(InputError, match=r"not made on the same users.*24 in both"):
        comparing.compare(str(kept), evaluate(workspace, "two"))


def test_missing_and_foreign_files_are_refused(reports, tmp_path) -> None:
    with pytest.raises(InputError, match="no report at"):
        comparing.compare(str(tmp_path / "nothing.json"), reports[0])
    foreign = tmp_path / "foreign.json"
    foreign.write_text("{}")
    with pytest.raises(InputError, match="metrics"):
        comparing.compare(str(foreign), reports[0])
    foreign.write_text("{")
    with pytest.raises(InputError, match="is not a report"):
        comparing.compare(str(foreign), reports[0])
    alone = tmp_path / "report.json"
    shutil.copy(reports[0], alone)
    with pytest.raises(InputError, match="stands alone"):
        comparing.compare(str(alone), reports[0])
