"""The evaluation of a workspace's interests: who is scored on what, the labels of numbers, files, and comparisons."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import InputError, WorkspaceError
from distributed_mi.interests import quality_report
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.evaluate import evaluate, render
from distributed_mi.interests.quality import SEMANTIC
from distributed_mi.interests.quality_compare import compare, render_comparison
from distributed_mi.interests.quality_users import Population, Users
from distributed_mi.interests.stage import run
from tests.unit.interests import quality_workspace as made
from tests.unit.interests.fakes import SCRIPTED, no_ray

FAST = {"bootstrap_samples": 100}


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[Callable]:
    """Plots take longer than all the rest; the real function for the one test that looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        plots = quality_report.plots
        patch.setattr(quality_report, "plots", lambda report, per_user: {})
        yield plots


def populations(workspace: Workspace, **kwargs: Any) -> dict[str, Population]:
    settings = {"history_fraction": 0.8, "max_users": 1000, "seed": 7, **kwargs}
    return {p.name: p for p in Users(workspace, **settings).read()}


@pytest.fixture(scope="module")
def by_user(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return made.make(tmp_path_factory.mktemp("by-user"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return made.make(tmp_path_factory.mktemp("leave-one-out"), "leave-one-out")


# Who is scored, on which items.


def test_by_user_cuts_training_sequences_in_time_and_says_that_they_were_seen(by_user: Workspace) -> None:
    found = populations(by_user)
    assert {n: p.saw_whole_history for n, p in found.items()} == {
        "exemplars": True,
        "members": True,
        "newcomers": False,
    }
    assert found["exemplars"].users == list(range(0, 64, 4))
    assert found["members"].users == [u for u in range(64) if u % 4]
    assert found["newcomers"].users == list(range(64, 80))
    for p in found.values():
        assert {len(x) for x in p.history} == {12}  # four fifths of 15
        for user, later in zip(p.users, p.later, strict=True):
            events = made.events_of(user, 15)
            assert set(later) == set(events[12:]) - set(events[:12])


def test_leave_one_out_takes_the_labels_of_both_splits(held_out: Workspace) -> None:
    found = populations(held_out)
    for p in (found["exemplars"], found["members"]):
        assert not p.saw_whole_history
        assert {len(x) for x in p.history} == {13}
        for user, later in zip(p.users, p.later, strict=True):
            events = made.events_of(user, 15)
            assert set(later) == set(events[13:]) - set(events[:13])
    assert found["newcomers"].users == []
    assert "all users" in found["newcomers"].reason


def test_global_temporal_takes_what_lies_after_the_cuts(tmp_path: Path) -> None:
    found = populations(made.make(tmp_path, "global-temporal"))
    for p in (found["exemplars"], found["members"]):
        assert not p.saw_whole_history
        for user, history, later in zip(p.users, p.history, p.later, strict=True):
            events = made.events_of(user, 15)
            num_history = len(history)
            assert history == events[:num_history]
            assert num_history == 15 - (4 if user % 3 else 0) - (3 if user % 2 else 0)
            assert set(later) == set(events[num_history:]) - set(events[:num_history])
    newcomers = found["newcomers"]
    assert newcomers.users == list(range(72, 80))  # in validation they have no history, in test they do
    assert {len(x) for x in newcomers.history} == {12}


def test_members_have_the_exemplar_of_their_cluster_and_newcomers_the_nearest(by_user: Workspace) -> None:
    found = populations(by_user)
    assignment = {
        r["user_index"]: r["exemplar_user_index"]
        for r in by_user.stage("exemplars").read("assignment", "assignment").to_pylist()
    }
    assert found["members"].exemplars == [assignment[u] for u in found["members"].users]
    items = made.encode([i["title"] or "" for i in made.catalogue()])

    def vector(user: int, length: int) -> np.ndarray:
        return items[np.array(made.events_of(user, length)[:length]) - 1].mean(axis=0)

    exemplars = {u: vector(u, 15) for u in range(0, 64, 4)}
    for user, exemplar in zip(found["newcomers"].users, found["newcomers"].exemplars, strict=True):
        own = items[np.array(made.events_of(user, 15)[:12]) - 1].mean(axis=0)
        distances = {u: ((own - v) ** 2).sum() for u, v in exemplars.items()}
        assert distances[exemplar] == pytest.approx(min(distances.values()))


def test_users_are_drawn_when_there_are_too_many(by_user: Workspace) -> None:
    found = populations(by_user, max_users=10)
    assert {n: (p.available, len(p.users)) for n, p in found.items()} == {
        "exemplars": (16, 10),
        "members": (48, 10),
        "newcomers": (16, 10),
    }
    again = populations(by_user, max_users=10)
    assert {n: p.users for n, p in again.items()} == {n: p.users for n, p in found.items()}
    other = populations(by_user, max_users=10, seed=8)
    assert {n: p.users for n, p in other.items()} != {n: p.users for n, p in found.items()}


def test_newcomers_need_mean_vectors(tmp_path: Path) -> None:
    found = populations(made.make(tmp_path, user_vectors="sequence"))
    assert (found["newcomers"].users, found["members"].users != []) == ([], True)
    assert "embed.user_vectors" in found["newcomers"].reason


# The report.


def test_report_of_by_user_labels_what_was_seen(by_user: Workspace) -> None:
    report = evaluate(by_user, **FAST)
    assert (report["split"], report["backend"], report["num_exemplars"]) == ("by-user", "keyphrase", 16)
    assert report["num_others"] == 15
    assert report["held_out_events_of_training_users"] is False
    sections = report["populations"]
    assert [sections[n]["saw_whole_history"] for n in sections] == [True, True, False]
    assert all(bool(s["caveat"]) == s["saw_whole_history"] for s in sections.values())
    for name, text in (("terminal", render(report)), ("file", read(by_user, "report.md"))):
        for shown in ("exemplars (SEEN)", "members (SEEN)", "describe, not whether"):
            assert shown in text, name
        assert "newcomers (SEEN)" not in text
        assert f"{report['chance']['mrr']:.4f}" in text


def test_planted_topics_make_every_population_better_than_chance(
    by_user: Workspace, held_out: Workspace
) -> None:
    for workspace, names in ((by_user, ("exemplars", "members", "newcomers")), (held_out, ("members",))):
        report = evaluate(workspace, **FAST)
        for name in names:
            section = report["populations"][name]
            assert section["scores"]["rank_percentile"]["value"] > 0.65, name
            if name != "newcomers":  # 16 users, each with one random exemplar
                low, high = section["random_exemplar"]["rank_percentile"]["ci95"]
                assert low < 0.5 < high, name
                for against in ("over_random_exemplar", "lift"):
                    over = section[against]["rank_percentile"]
                    assert over["difference"] > 0.1, (name, against)
                    assert over["p_value"] < 0.05, (name, against)


def test_report_of_leave_one_out_has_no_label_and_counts_who_is_left_out(held_out: Workspace) -> None:
    report = evaluate(held_out, **FAST)
    assert "SEEN" not in render(report)
    found = populations(held_out)
    for name in ("exemplars", "members"):
        section = report["populations"][name]
        without = sum(not set(x) - {made.NAMELESS} for x in found[name].later)
        assert without > 0
        assert section["without_later_items"] == without
        assert section["users"] == len(found[name].users) - without
        assert section["scores"]["mrr"]["num_users"] == section["users"]
    newcomers = report["populations"]["newcomers"]
    assert (newcomers["users"], newcomers["scores"]["mrr"]["value"]) == (0, None)
    assert "newcomers: not scored, all users" in render(report)


def test_items_of_which_only_the_id_is_known_are_left_out_and_counted(held_out: Workspace) -> None:
    report = evaluate(held_out, **FAST)
    found = populations(held_out)
    for name in ("exemplars", "members"):
        expected = sum(made.NAMELESS in later for later in found[name].later)
        assert report["populations"][name]["later_items_without_text"] == expected
    assert any(made.NAMELESS in later for p in found.values() for later in p.later)


def test_files_tables_and_manifest(
    by_user: Workspace, no_plots: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_report, "plots", no_plots)
    report = evaluate(by_user, num_others=14, **FAST)
    stage = by_user.stage("interests/quality")
    files = {p.name for p in Path(stage.base).iterdir() if p.is_file()}
    assert files == {
        "manifest.json",
        "report.json",
        "report.md",
        "rank_percentile.png",
        "within_exemplars.png",
    }
    assert json.loads(read(by_user, "report.json")) == report
    for name in ("rank_percentile.png", "within_exemplars.png"):
        assert (Path(stage.base) / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in read(by_user, "report.md")
    assert stage.require().stats["members"]["saw_whole_history"] is True
    for name in ("exemplars", "members", "newcomers"):
        table = stage.read(name, "per_user")
        values = table["rank_percentile"].to_numpy()
        expected = report["populations"][name]["scores"]["rank_percentile"]["value"]
        assert np.nanmean(values) == pytest.approx(expected)
    assert by_user.stage("interests").manifest() is not None  # the stage above it is still complete


def test_second_call_reads_the_report_and_other_settings_make_another(by_user: Workspace) -> None:
    first = evaluate(by_user, **FAST)
    before = by_user.stage("interests/quality").require()
    assert evaluate(by_user, **FAST) == first
    assert by_user.stage("interests/quality").require() == before
    assert evaluate(by_user, num_others=5, **FAST)["num_others"] == 5
    assert by_user.stage("interests/quality").require().generation != before.generation


def test_coverage_is_of_what_the_prompt_held(tmp_path: Path) -> None:
    """Keyphrase interests name every item that they were made from, however short the prompt."""
    for length in (50, 4):
        workspace = made.make(tmp_path / str(length), interests=InterestsConfig(max_history=length))
        within = evaluate(workspace, **FAST)["within"]
        assert within["coverage"]["value"] == 1.0
        assert within["coverage"]["num_users"] == 16
    scripted = InterestsConfig(backend={"name": SCRIPTED})
    workspace = made.make(tmp_path / "scripted", interests=scripted)
    distinct = [len(set(made.events_of(u, 15))) for u in range(0, 64, 4)]
    # It names the two oldest of the items shown.
    assert evaluate(workspace, **FAST)["within"]["coverage"]["value"] == pytest.approx(
        np.mean([2 / n for n in distinct])
    )


def test_one_exemplar_gives_a_report_without_scores(
    tmp_path: Path, no_plots: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_report, "plots", no_plots)
    report = evaluate(made.make(tmp_path, one_in=1000), **FAST)
    assert (report["num_exemplars"], report["num_others"], report["chance"]) == (1, 0, {})
    for section in report["populations"].values():
        assert "one exemplar only" in section["reason"]
        assert section["scores"]["rank_percentile"] == {"value": None, "ci95": None, "num_users": 0}
    assert report["within"]["coverage"] == {"value": 1.0, "ci95": None, "num_users": 1}
    assert "one exemplar only" in render(report)


def test_everybody_an_exemplar_leaves_no_members(tmp_path: Path) -> None:
    report = evaluate(made.make(tmp_path, one_in=1), **FAST)
    assert report["populations"]["members"]["reason"] == "there are no members"
    assert report["populations"]["exemplars"]["users"] > 0


def test_without_resamples_there_are_no_intervals(by_user: Workspace) -> None:
    report = evaluate(by_user, bootstrap_samples=0)
    assert report["populations"]["members"]["scores"]["mrr"]["ci95"] is None
    assert "rank_percentile  " in render(report)


def test_missing_and_stale_stages_and_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="distributed-mi prepare"):
        evaluate(Workspace(str(tmp_path / "empty")))
    workspace = made.make(tmp_path / "w")
    with pytest.raises(ValueError, match="num_others"):
        evaluate(workspace, num_others=0)
    made_again = made.make(tmp_path / "other", one_in=5)
    manifests = [Path(w.stage("exemplars").manifest_path) for w in (made_again, workspace)]
    manifests[1].write_bytes(manifests[0].read_bytes())
    with pytest.raises(WorkspaceError, match=r"stage interests .* another result of exemplars"):
        evaluate(workspace)


def test_new_interests_make_a_new_report(tmp_path: Path) -> None:
    workspace = made.make(tmp_path)
    first = evaluate(workspace, **FAST)
    run(
        InterestsConfig(backend={"name": SCRIPTED}),
        workspace,
        encode=made.encode,
        start_ray=no_ray,
    )
    second = evaluate(workspace, **FAST)
    assert (first["backend"], second["backend"]) == ("keyphrase", SCRIPTED)
    assert json.loads(read(workspace, "report.json")) == second


# Comparing two backends.


@pytest.fixture(scope="module")
def two_backends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Workspace]:
    folder = tmp_path_factory.mktemp("two")
    a = made.make(folder / "a", interests=InterestsConfig(backend={"name": SCRIPTED}))
    b = made.make(folder / "b")
    for workspace in (a, b):
        evaluate(workspace, **FAST)
    return a, b


def place(workspace: Workspace) -> str:
    return workspace.stage("interests/quality").base


def test_compare_prefers_the_backend_that_knows_the_topics(two_backends: tuple) -> None:
    a, b = two_backends
    found = compare(place(a), f"{place(b)}/report.json", samples=200, permutations=500)
    assert (found["a"]["backend"], found["b"]["backend"]) == (SCRIPTED, "keyphrase")
    reports = [json.loads(read(w, "report.json")) for w in (a, b)]
    for name, section in found["populations"].items():
        assert set(SEMANTIC) <= set(section["metrics"])
        d = section["metrics"]["rank_percentile"]
        values = [r["populations"][name]["scores"]["rank_percentile"]["value"] for r in reports]
        assert d["difference"] == pytest.approx(values[1] - values[0])
        assert d["difference"] > 0.05, name
        assert section["saw_whole_history"] is (name != "newcomers")
        lift = section["metrics"]["rank_percentile_lift"]
        lifts = [r["populations"][name]["lift"]["rank_percentile"]["difference"] for r in reports]
        if lift["num_users"] == d["num_users"]:
            assert lift["difference"] == pytest.approx(lifts[1] - lifts[0])
    assert "coverage" in found["populations"]["exemplars"]["metrics"]
    text = render_comparison(json.loads(json.dumps(found, allow_nan=False)))
    assert "A = tests.unit.interests.fakes:ScriptedBackend, B = keyphrase" in text
    assert "members (SEEN)" in text


def test_comparing_a_report_with_itself_finds_nothing(two_backends: tuple) -> None:
    found = compare(place(two_backends[0]), place(two_backends[0]), samples=50, permutations=50)
    d = found["populations"]["members"]["metrics"]["mrr"]
    assert (d["difference"], d["p_value"]) == (0.0, 1.0)


def test_reports_that_cannot_be_compared_are_refused(two_backends: tuple, tmp_path: Path) -> None:
    a = place(two_backends[0])
    with pytest.raises(InputError, match="interests evaluate"):
        compare(a, str(tmp_path))
    other = made.make(tmp_path / "settings")
    evaluate(other, bootstrap_samples=101)
    with pytest.raises(InputError, match="differ in settings"):
        compare(a, place(other))
    others = made.make(tmp_path / "users", length=16)
    evaluate(others, **FAST)
    with pytest.raises(InputError, match="not the same users"):
        compare(a, place(others))


def read(workspace: Workspace, name: str) -> str:
    return (Path(workspace.stage("interests/quality").base) / name).read_text(encoding="utf-8")
