"""The helpers of the affinity benchmark by hand, one side in its own process, one command from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import affinity_setup, bench_affinity
from benchmarks.affinity_bandwidth import copier, random_lists
from benchmarks.affinity_data import fit_power, net_similarity, plant, write_blobs, write_planted
from benchmarks.affinity_job import Job, Measured, measure, read_vectors
from benchmarks.affinity_setup import verdict
from benchmarks.affinity_sides import nearest_members, run_side, unlisted_share


def test_exponent_of_an_exact_power_law() -> None:
    # 3 * n^2 at 10, 20, 40
    exponent, factor = fit_power([10, 20, 40], [300, 1200, 4800])
    assert (exponent, factor) == (pytest.approx(2.0), pytest.approx(3.0))


def test_exponent_by_least_squares_in_the_logarithms() -> None:
    # log2: sizes 0, 1, 2 -> values 0, 2, 1; slope = (-1 * 0 + 0 * 2 + 1 * 1) / 2, mean 1 at size log 1: constant 0.5
    exponent, factor = fit_power([1, 2, 4], [1, 4, 2])
    assert (exponent, factor) == (pytest.approx(0.5), pytest.approx(2**0.5))


@pytest.mark.parametrize(("sizes", "values"), [([5, 5], [1, 2]), ([1, 2], [0, 1])])
def test_no_exponent_without_two_sizes_and_positive_values(sizes: list[int], values: list[int]) -> None:
    with pytest.raises(ValueError, match="two different sizes"):
        fit_power(sizes, values)


def test_planted_clusters_have_the_asked_sizes() -> None:
    found = plant(1000, 50, seed=3)
    sizes = np.bincount(found)
    assert len(found) == 1000
    assert len(sizes) == 50
    assert sizes.min() >= 4
    assert sizes.max() > 2 * sizes.min()  # uneven
    assert (np.diff(found) < 0).any()  # not in order of cluster
    assert np.array_equal(found, plant(1000, 50, seed=3))
    assert (np.bincount(plant(200, 50, seed=0)) == 4).all()
    with pytest.raises(ValueError, match="at least 200 users"):
        plant(199, 50, seed=0)


def test_planted_vectors_lie_around_their_centres(tmp_path: Path) -> None:
    labels = plant(2000, 10, seed=0)
    write_planted(tmp_path / "v.npy", labels, 16, seed=0)
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.dtype == np.float32
    means = np.stack([vectors[labels == c].mean(axis=0) for c in range(10)])
    assert np.std(vectors - means[labels]) == pytest.approx(1.0, abs=0.03)
    assert np.std(means) == pytest.approx(3.0, rel=0.25)


def test_net_similarity_by_definition() -> None:
    # 0 and 5 are exemplars: users 1, 2 and 4 are 1, 2 and 1 away, squared 1, 4 and 1; two preferences of -10
    vectors = np.array([[0.0], [1.0], [2.0], [5.0], [6.0]], dtype=np.float32)
    net = net_similarity(vectors, np.array([0, 3]), np.array([0, 0, 0, 1, 1]), -10.0)
    assert net == -26.0


def test_nearest_member_of_each_cluster_and_none_of_an_empty_one() -> None:
    vectors = np.array([[0.0], [1.0], [10.0], [12.0]], dtype=np.float32)
    centres = np.array([[0.9], [50.0], [10.1]])
    assert nearest_members(vectors, centres, np.array([0, 0, 2, 2])).tolist() == [1, 2]


def test_share_of_users_without_a_listed_exemplar() -> None:
    # user 1 is the exemplar; 0 lists it, 2 lists 0 only, 3 lists nobody: 2 of 4
    starts, columns = np.array([0, 2, 3, 4, 4]), np.array([2, 1, 0, 0])
    assert unlisted_share(starts, columns, np.array([1])) == 0.5


def test_nobody_lists_himself_and_a_copy_is_whole() -> None:
    lists = random_lists(50, 8, seed=0)
    assert (lists.columns_M.reshape(50, 8) != np.arange(50)[:, None]).all()
    assert lists.columns_M.min() >= 0
    assert lists.columns_M.max() < 50
    source, target = np.arange(1001, dtype=np.float32), np.zeros(1001, dtype=np.float32)
    copier(source, target, 2)()
    assert np.array_equal(source, target)


def test_verdict_says_which_way() -> None:
    assert verdict(12.34, 10, at_least=True, unit="x") == "12.3x, bar at least 10x: met"
    assert verdict(0.7, 0.6) == "0.7, bar at most 0.6: MISSED"


def test_rows_are_cut_and_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    np.save(path, np.arange(12, dtype=np.float32).reshape(4, 3))
    assert read_vectors(path, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="5 users wanted, 4 rows there"):
        read_vectors(path, 5)
    np.save(path, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="float32"):
        read_vectors(path, 2)


def test_a_side_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    write_blobs(tmp_path / "v.npy", 200, 8, seed=0)
    found = measure(Job("lists", str(tmp_path / "v.npy"), 200, preference=-1.0, threads=1))
    assert found.seconds > 0
    assert found.peak_bytes > 50 << 20  # torch is in there
    assert found.facts["exemplars"] == len(found.exemplars_E)
    assert np.array_equal(found.own_exemplars[found.exemplars_E], found.exemplars_E)
    with pytest.raises(RuntimeError, match="exit status 1"):
        measure(Job("no such method", str(tmp_path / "v.npy"), 200))


def test_exact_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(job: Job) -> Measured:
        facts = run_side(job, tmp_path / "found.npz")
        found = np.load(tmp_path / "found.npz")
        return Measured(job, facts, found["exemplars"], found["labels"])

    monkeypatch.setattr(affinity_setup, "measure", here)
    arguments = ["exact", "--users", "150", "--width", "8", "--repeats", "2", "--threads", "1"]
    results = ["--preference=-2", "--results", str(tmp_path / "results"), "--hardware", "test"]
    assert bench_affinity.main([*arguments, *results]) == 0
    (path,) = (tmp_path / "results").glob("affinity_exact_test_*.json")
    document = json.loads(path.read_text())
    sides = [sample["side"] for sample in document["samples"]]
    assert {s: sides.count(s) for s in sides} == {"ours, lists": 2, "ours, dense": 2, "scikit-learn": 2}
    assert document["extra"]["ours, lists, labels equal scikit-learn's"] == "yes"
    assert "Favours" in document["notes"]
    assert "| scikit-learn |" in path.with_suffix(".md").read_text()
