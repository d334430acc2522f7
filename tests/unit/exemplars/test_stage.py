"""The exemplars stage: tables, statistics, skipping, bad input, memory refused before it starts."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distributed_mi.core.artifacts import Manifest, StageKey, Workspace
from distributed_mi.core.config import ConfigModel
from distributed_mi.core.errors import InputError, StageError
from distributed_mi.exemplars import preflight, problem, similarity, stage
from distributed_mi.exemplars.config import ExemplarsConfig
from distributed_mi.exemplars.messages import DenseMessages
from distributed_mi.exemplars.problem import DENSE_PAIR_BYTES

LINE = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]], dtype=np.float32)


def write_inputs(workspace: Workspace, vectors: np.ndarray, users: int | None = None) -> None:
    """Stand-ins for the stages before: users u0, u1, ... with the given vectors, written in reverse order."""
    users = len(vectors) if users is None else users
    prepare = workspace.stage("prepare").open(StageKey("prepare", {}, {"users": users}))
    order = range(users - 1, -1, -1)
    sequences = {
        "user_index": list(order),
        "user_id": [f"u{i}" for i in order],
        "item_indices": [[1]] * users,
        "timestamps": [[0]] * users,
        "num_history": [1] * users,
    }
    prepare.write_table("sequences/train/part-0.parquet", pa.table(sequences), "sequences")
    catalogue = {
        "item_index": [1],
        "item_id": ["i1"],
        "title": ["A <b>title</b>\n# of [two](lines)"],
        "brand": [None],
        "categories": [[]],
        "num_events": [users],
        "num_train_events": [users],
    }
    prepare.write_table("catalogue/part-0.parquet", pa.table(catalogue), "catalogue")
    prepare.commit(rows={"train": users})
    embed = workspace.stage("embed").open(StageKey("embed", {}, {"vectors": vectors.astype(str).tolist()}))
    reverse = list(range(len(vectors) - 1, -1, -1))
    table = {"user_index": reverse, "vector": [vectors[i] for i in reverse]}
    embed.write_table("user_vectors/part-0.parquet", pa.table(table) if reverse else EMPTY, "user_vectors")
    embed.commit(rows={"user_vectors": len(vectors)})


EMPTY = pa.schema([("user_index", pa.int64()), ("vector", pa.list_(pa.float32()))]).empty_table()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    found = Workspace(str(tmp_path))
    write_inputs(found, LINE)
    return found


def test_tables_by_hand(workspace: Workspace) -> None:
    manifest = stage.run(ExemplarsConfig(preference=-5), workspace)
    exemplars = workspace.stage("exemplars").read("exemplars", "exemplars").to_pydict()
    assignment = workspace.stage("exemplars").read("assignment", "assignment").to_pydict()
    assert exemplars == {
        "cluster": [0, 1],
        "user_index": [1, 4],
        "user_id": ["u1", "u4"],
        "num_users": [3, 3],
    }
    assert assignment == {
        "user_index": [0, 1, 2, 3, 4, 5],
        "cluster": [0, 0, 0, 1, 1, 1],
        "exemplar_user_index": [1, 1, 1, 4, 4, 4],
        "similarity": [-1.0, 0.0, -1.0, -1.0, 0.0, -1.0],
    }
    assert manifest.rows == {"exemplars": 2, "assignment": 6, "messages": 6}
    stats = manifest.stats
    assert stats["converged"] is True
    assert stats["net_similarity"] == pytest.approx(-14)
    # greedy takes the most central first, 2 of the two equal ones, then 11: -4 - 1 - 1 - 1 - 10
    assert stats["facility_location_net_similarity"] == pytest.approx(-17)
    assert stats["share"] == pytest.approx(2 / 6)
    assert stats["cluster_sizes"] == {"3": 2}
    assert stats["largest_cluster"] == 3
    assert stats["damping"] == 0.5
    assert stats["preference"] == -5.0
    assert stats["rounds"] > 15


def test_a_second_run_is_skipped_and_another_preference_is_not(workspace: Workspace) -> None:
    first = stage.run(ExemplarsConfig(preference=-5), workspace)
    again = stage.run(ExemplarsConfig(preference=-5, compare_facility_location=False), workspace)
    assert again.created == first.created
    assert again.generation == first.generation
    assert stage.run(ExemplarsConfig(preference=-6), workspace).generation != first.generation


def test_no_clustering_makes_everyone_an_exemplar(workspace: Workspace) -> None:
    manifest = stage.run(ExemplarsConfig(preference="none"), workspace)
    table = workspace.stage("exemplars").read("assignment", "assignment")
    assert table["cluster"].to_pylist() == list(range(6))
    assert table["exemplar_user_index"].to_pylist() == list(range(6))
    assert manifest.stats["share"] == 1.0
    assert manifest.stats["facility_location_net_similarity"] is None


def test_median_preference(workspace: Workspace) -> None:
    manifest = stage.run(ExemplarsConfig(preference="median"), workspace)
    squared = (LINE - LINE.T) ** 2
    assert manifest.stats["preference"] == pytest.approx(-float(np.median(squared)))


def test_without_convergence_every_attempt_is_recorded(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    config = ExemplarsConfig(preference=-5, max_iter=2, retry_damping=(0.9,), retry_max_iter=3)
    with caplog.at_level(logging.WARNING):
        manifest = stage.run(config, workspace)
    assert manifest.stats["converged"] is False
    assert [(a["damping"], a["rounds"]) for a in manifest.stats["attempts"]] == [(0.5, 2), (0.9, 3)]
    assert "no convergence with damping 0.5, 0.9" in caplog.text


def test_a_retry_that_converges_is_good_enough(workspace: Workspace) -> None:
    config = ExemplarsConfig(preference=-5, max_iter=2)
    manifest = stage.run(config, workspace)
    assert manifest.stats["converged"] is True
    assert manifest.stats["damping"] == 0.7


def test_a_user_with_a_nan_is_named(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    vectors = LINE.copy()
    vectors[3] = np.nan
    write_inputs(workspace, vectors)
    with pytest.raises(InputError, match="user u3 has a NaN"):
        stage.run(ExemplarsConfig(), workspace)
    assert workspace.stage("exemplars").manifest() is None


def test_no_users_and_other_users_are_refused(tmp_path: Path) -> None:
    nobody = Workspace(str(tmp_path / "nobody"))
    write_inputs(nobody, LINE[:0])
    with pytest.raises(InputError, match="no user vectors"):
        stage.run(ExemplarsConfig(), nobody)
    others = Workspace(str(tmp_path / "others"))
    write_inputs(others, LINE, users=5)
    with pytest.raises(InputError, match="name different users"):
        stage.run(ExemplarsConfig(), others)


def test_too_little_memory_is_refused_before_the_start(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(
        StageError, match=r"over 6 users needs 0\.5 GB, 0\.0 GB are free\. No method fits.*--force"
    ):
        stage.run(ExemplarsConfig(), workspace)
    assert stage.run(ExemplarsConfig(force=True), workspace).rows["assignment"] == 6


def test_the_refusal_names_a_method_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.Speed, "measure", lambda: preflight.Speed(5e10, 1e10))
    monkeypatch.setattr(similarity, "available_memory_bytes", lambda: 24_000_000_000)
    # all pairs of 2,000,000 users in lists of 192 fit in 2 x 6.1 GB and the vectors; two actors need half as much again
    with pytest.raises(StageError, match=r"method sparse .*exemplars.method=exact fits"):
        preflight.choose(2_000_000, 64, ExemplarsConfig(method="sparse", most_neighbours=1024))


@pytest.mark.parametrize(("users", "wanted"), [(4_905, "exact"), (200_000, "exact"), (10_000_000, "sparse")])
def test_auto_chooses_by_users_and_memory(users: int, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.Speed, "measure", lambda: preflight.Speed(5e10, 1e10))
    monkeypatch.setattr(similarity, "available_memory_bytes", lambda: 1_000_000_000_000)
    method, predicted = preflight.choose(users, 64, ExemplarsConfig())
    assert method == wanted
    assert [n["method"] for n in predicted["needs"]] == ["exact", "exact, all pairs", "distributed", "sparse"]


def test_beauty_is_predicted_to_stay_under_eight_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "available_memory_bytes", lambda: 8_000_000_000)
    method, predicted = preflight.choose(17_890, 384, ExemplarsConfig())
    needs = {n["method"]: n["bytes"] for n in predicted["needs"]}
    assert method == "exact"
    assert needs["exact"] < 1e9
    assert 3.8e9 < needs["exact, all pairs"] < 5e9


def test_memory_of_whole_rows_is_as_promised() -> None:
    """Three float32 matrices and a few numbers a user: what the preflight says and the docstring promises."""
    messages = DenseMessages(np.zeros((300, 300), dtype=np.float32), 0, np.zeros(300), 0.5)
    held = sum(v.nbytes for v in vars(messages).values() if isinstance(v, np.ndarray))
    assert held <= DENSE_PAIR_BYTES * 300 * 300 + 8 * 8 * 300


def test_a_wanted_share_is_found(workspace: Workspace) -> None:
    manifest = stage.run(ExemplarsConfig(share=1 / 3), workspace)
    assert manifest.stats["share"] == pytest.approx(1 / 3)
    assert manifest.stats["preference"] < 0
    assert len(manifest.stats["shares_by_preference"]) >= 1


def blob_vectors(users: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(12, 4)) * 20
    return (centres[np.arange(users) % 12] + rng.normal(size=(users, 4))).astype(np.float32)


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_next_day_says_what_moved(
    tmp_path: Path, warm_start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 users, then 12 more: who was with an exemplar stays, and a warm start needs fewer rounds."""
    monkeypatch.setattr(problem, "DENSE_USERS", 16)
    workspace = Workspace(str(tmp_path))
    write_inputs(workspace, blob_vectors(60))
    first = stage.run(ExemplarsConfig(preference=-30, warm_start=warm_start), workspace)
    assert first.stats["moved"] is None
    assert first.stats["exemplars"] == 12
    write_inputs(workspace, blob_vectors(72))
    second = stage.run(ExemplarsConfig(preference=-30, warm_start=warm_start), workspace)
    moved = second.stats["moved"]
    assert moved["users_in_both"] == 60
    assert moved["exemplars_kept"] + moved["exemplars_gone"] == 12
    assert moved["exemplars_kept"] + moved["exemplars_new"] == second.stats["exemplars"] == 12
    assert moved["users_moved"] <= 5 * moved["exemplars_gone"]
    if warm_start:
        assert second.stats["rounds"] <= first.stats["rounds"]


def test_sparse_gives_the_same_blobs(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    write_inputs(workspace, blob_vectors(96))
    exact = stage.run(ExemplarsConfig(method="exact", preference=-30), workspace)
    found = workspace.stage("exemplars").read("assignment", "assignment")["exemplar_user_index"].to_pylist()
    sparse = stage.run(ExemplarsConfig(method="sparse", preference=-30, neighbours=8), workspace)
    again = workspace.stage("exemplars").read("assignment", "assignment")["exemplar_user_index"].to_pylist()
    assert (exact.stats["method"], sparse.stats["method"]) == ("exact", "sparse")
    assert again == found
    assert sparse.stats["pairs"] < 96 * 95


def test_the_report_shows_the_largest_clusters_and_no_markup_of_titles(workspace: Workspace) -> None:
    stage.run(ExemplarsConfig(preference=-5), workspace)
    folder = Path(workspace.stage("exemplars").base)
    text = (folder / "report.md").read_text()
    assert "2 of 6 users (33.33 %)" in text
    assert "### u1: 3 users" in text
    assert r"* A \<b\>title\</b\> \# of \[two\]\(lines\)" in text
    assert (folder / "cluster_sizes.png").read_bytes().startswith(b"\x89PNG")


def test_configuration_is_checked() -> None:
    assert issubclass(ExemplarsConfig, ConfigModel)
    assert ExemplarsConfig.model_validate({"preference": -10}).preference == -10.0
    for bad in ({"damping": 1.0}, {"damping": 0.4}, {"preference": "mean"}, {"retry_damping": [0.3]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ExemplarsConfig.model_validate(bad)


def test_the_manifest_reads_back(workspace: Workspace) -> None:
    manifest = stage.run(ExemplarsConfig(preference=-5), workspace)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
