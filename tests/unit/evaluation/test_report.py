import io

import numpy as np
import pytest

from distributed_mi.evaluation import plots
from distributed_mi.evaluation.report import format_table, leakage_sentence, to_markdown
from tests.unit.evaluation import tiny


def content(run: str, recall: float, **kwargs) -> dict:
    return {
        "model": "remi",
        "run": run,
        "protocol": "by-user 8:1:1",
        "split": "test",
        "num_users": 1234,
        "skipped_users": 0,
        "metrics": {
            "recall@20": {"value": recall, "ci95": [recall - 0.01, recall + 0.01]},
            "coverage@20": {"value": 0.5, "ci95": None},
            "category_diversity@20": {"value": None, "ci95": None},
        },
        "leakage": tiny.LEAKAGE,
        "checkpoint": {"step": 3500},
        "config": {"bootstrap_samples": 1000},
        "seconds": 1.0,
        **kwargs,
    }


def test_table_sets_runs_side_by_side_with_the_leakage_line() -> None:
    lines = format_table([content("popular", 0.02), content("remi", 0.0812)]).splitlines()
    assert lines[0].split() == ["metric", "popular", "remi"]
    row = next(line for line in lines if line.startswith("recall@20"))
    assert "0.0812 [0.0712, 0.0912]" in row
    assert next(line for line in lines if line.startswith("category")).split()[1:] == ["n/a", "n/a"]
    assert lines[-1] == tiny.LEAKAGE["text"]
    assert sum("Protocol" in line for line in lines) == 1


def test_table_of_runs_with_other_metrics_and_protocols() -> None:
    other = content("b", 0.1, metrics={"mrr@5": {"value": 0.25, "ci95": None}}, protocol="leave-one-out")
    text = format_table([content("a", 0.1), other])
    assert next(line for line in text.splitlines() if line.startswith("mrr@5")).split() == [
        "mrr@5",
        "n/a",
        "0.2500",
    ]
    assert text.count("Protocol:") == 2
    assert format_table([]) == "no reports"


def test_a_failed_or_missing_leakage_check_is_said() -> None:
    assert (
        leakage_sentence({"passed": False, "text": "Leakage check FAILED: 3."}) == "Leakage check FAILED: 3."
    )
    assert leakage_sentence({"passed": False}) == "Leakage check FAILED."
    assert "not recorded" in leakage_sentence({})


def test_markdown_names_model_step_and_intervals() -> None:
    text = to_markdown(content("remi", 0.0812), ["metrics.png"])
    assert "Model `remi`, checkpoint of step 3,500, 1,234 test users" in text
    assert "| recall@20 | 0.0812 | 0.0712 to 0.0912 |" in text
    assert "![metrics](metrics.png)" in text


def size_of(png: bytes) -> tuple[int, ...]:
    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png").shape


def test_plots_are_png_files_of_a_legible_size(rng: np.random.Generator) -> None:
    lines = [{"kind": "train", "step": s, "loss": 3.0 / s} for s in range(1, 50)]
    lines += [{"kind": "validation", "step": s, "metrics": {"recall@50": 0.1}} for s in (10, 20)]
    pictures = [
        plots.metrics(content("remi", 0.08)),
        plots.training_curve(lines, "remi"),
        plots.exemplar_clusters(rng.integers(1, 200, size=70)),
    ]
    for png in pictures:
        height, width, _ = size_of(png)
        assert width == 1050
        assert height >= 200


def test_validation_curves_read_validation_lines_only() -> None:
    lines = [
        {"kind": "train", "step": 5, "loss": 1.0},
        {"kind": "validation", "step": 10, "metrics": {"recall@50": 0.1, "ndcg@50": 0.05}},
        {"kind": "validation", "step": 20, "metrics": {"recall@50": 0.2, "ndcg@50": 0.06}},
    ]
    assert plots.validation_curves(lines) == {
        "recall@50": [(10, 0.1), (20, 0.2)],
        "ndcg@50": [(10, 0.05), (20, 0.06)],
    }


def test_plots_without_training_or_exemplars(workspace) -> None:
    assert set(plots.draw_all(content("two", 0.1), workspace, "two")) == {"metrics.png", "training_curve.png"}
    workspace.fs.delete_file(workspace.stage("train/two").path("metrics.jsonl"))
    assert set(plots.draw_all(content("two", 0.1), workspace, "two")) == {"metrics.png"}


def test_plots_do_not_touch_pyplot() -> None:
    import subprocess
    import sys

    code = (
        "import sys, numpy as np; from distributed_mi.evaluation import plots; "
        "assert 'matplotlib' not in sys.modules; plots.exemplar_clusters(np.array([3, 1])); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [500, 2, 1]])
def test_cluster_plot_of_extreme_sizes(sizes: list[int]) -> None:
    assert size_of(plots.exemplar_clusters(np.array(sizes)))[1] == 1050
