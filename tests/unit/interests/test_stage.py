"""The whole stage without Ray: tables, skipping, resuming after a kill, failures, and the limits on them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from distributed_mi.core.artifacts import Manifest, Workspace, list_files
from distributed_mi.core.errors import ConfigError, StageError, UnknownNameError, WorkspaceError
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.parse import ParsedInterest
from distributed_mi.interests.stage import _titles_as_interests, run
from distributed_mi.interests.work import Work
from tests.unit.interests.fakes import SCRIPTED, answers_per_user, encode, make_workspace, no_ray

ROOT = Path(__file__).resolve().parents[3]


def scripted(**fields: Any) -> InterestsConfig:
    script = {k: fields.pop(k) for k in list(fields) if k not in InterestsConfig.model_fields}
    return InterestsConfig(
        backend={"name": SCRIPTED, **script}, **{"commit_every": 4, "short_history": 3, **fields}
    )


def start(config: InterestsConfig, workspace: Workspace) -> Manifest:
    return run(config, workspace, encode=encode, start_ray=no_ray)


def answered_users(workspace: Workspace) -> list[int]:
    return workspace.stage("interests").read("answers", "answers")["user_index"].to_pylist()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "w", num_users=40)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def test_keyphrase_is_the_default_and_needs_no_ray(workspace: Workspace) -> None:
    manifest = start(InterestsConfig(), workspace)
    assert manifest.rows["answers"] == 20
    assert manifest.stats["steps"] == {"first": 0, "larger_budget": 0, "shorter_history": 0, "keyphrase": 20}
    assert manifest.stats["failed"] == 0
    assert answered_users(workspace) == list(range(0, 40, 2))
    stage = workspace.stage("interests")
    interests = stage.read("interests", "interests").to_pylist()
    vectors = stage.read("interest_vectors", "interest_vectors").to_pylist()
    assert [(v["user_index"], v["interest_index"]) for v in vectors] == [
        (i["user_index"], i["interest_index"]) for i in interests
    ]
    for interest, vector in zip(interests, vectors, strict=True):
        assert vector["vector"] == encode([interest["text"]])[0].tolist()
    assert {i["user_index"] for i in interests} == set(range(0, 40, 2))


def test_support_is_in_the_history_and_covers_it(workspace: Workspace) -> None:
    start(InterestsConfig(), workspace)
    sequences = workspace.stage("prepare").read("sequences/train", "sequences").to_pylist()
    history = {s["user_index"]: set(s["item_indices"]) for s in sequences}
    supported: dict[int, set[int]] = {}
    for row in workspace.stage("interests").read("interests", "interests").to_pylist():
        supported.setdefault(row["user_index"], set()).update(row["item_indices"])
    assert supported == {u: history[u] for u in range(0, 40, 2)}


def test_an_item_without_title_is_called_by_its_id(workspace: Workspace) -> None:
    start(InterestsConfig(), workspace)
    prompts = "".join(workspace.stage("interests").read("answers", "answers")["prompt"].to_pylist())
    assert '"item B007" (7)' in prompts


def test_same_input_same_identity_and_the_second_run_is_skipped(workspace: Workspace, tmp_path: Path) -> None:
    first = start(InterestsConfig(), workspace)

    def never(texts: Sequence[str]) -> np.ndarray:
        raise AssertionError("encoded again")

    assert run(InterestsConfig(), workspace, encode=never, start_ray=no_ray) == first
    other = start(InterestsConfig(), make_workspace(tmp_path / "other", num_users=40))
    assert other.identity == first.identity


def test_equal_texts_are_encoded_once(workspace: Workspace) -> None:
    seen: list[str] = []

    def counting(texts: Sequence[str]) -> np.ndarray:
        seen.extend(texts)
        return encode(texts)

    manifest = run(scripted(), workspace, encode=counting, start_ray=no_ray)
    # One text of its own for each of 20 users, and "second" for all of them.
    assert len(seen) == len(set(seen)) == manifest.stats["distinct_texts"] == 21
    assert manifest.rows["interest_vectors"] == 40


def test_each_step_is_counted(workspace: Workspace) -> None:
    config = scripted(
        truncate=[2], prose=[4, 6], always_prose=[8], poison=[10], none=[12], max_failed_fraction=0.1
    )
    manifest = start(config, workspace)
    assert manifest.stats["steps"] == {
        "first": 15,
        "larger_budget": 1,
        "shorter_history": 2,
        "keyphrase": 2,
    }
    assert manifest.stats["failed"] == 2
    assert manifest.stats["answered_by_titles"] == 1
    assert answered_users(workspace) == list(range(0, 40, 2))
    rows = {r["user_index"]: r for r in workspace.stage("interests").read("answers", "answers").to_pylist()}
    assert (rows[8]["backend"], rows[8]["model"], rows[8]["step"]) == (
        "keyphrase",
        "keyphrase-2",
        "keyphrase",
    )
    lines = (Path(workspace.stage("interests").base) / "failures.jsonl").read_text().splitlines()
    failures = {f["user_index"]: f["attempts"] for f in map(json.loads, lines)}
    assert set(failures) == {8, 10}
    assert [a["reason"] for a in failures[8]] == ["not_json", "not_json"]
    assert "bad prompt" in failures[10][0]["detail"]


def test_an_answer_without_interests_gives_the_titles(workspace: Workspace) -> None:
    start(scripted(none=[12]), workspace)
    rows = workspace.stage("interests").read("interests", "interests").to_pylist()
    titles = {
        r["item_index"]: r["title"] or f"item {r['item_id']}"
        for r in workspace.stage("prepare").read("catalogue", "catalogue").to_pylist()
    }
    mine = [r for r in rows if r["user_index"] == 12]
    assert [r["text"] for r in mine] == [titles[r["item_indices"][0]] for r in mine]
    assert len(mine) == 6


def test_an_answer_without_interests_skips_items_without_title(workspace: Workspace) -> None:
    """Item 7, alone or beside others, is known by its id only."""
    items = {7: HistoryItem(7, "item B007", has_title=False), 8: HistoryItem(8, "jazz album")}
    both, alone = (Exemplar(0, tuple(items[i] for i in history)) for history in ((8, 7), (7,)))
    config = InterestsConfig()
    assert _titles_as_interests(both, config) == (ParsedInterest("jazz album", (8,)),)
    unnamed = ParsedInterest("items without title or category", (7,))
    assert _titles_as_interests(alone, config) == (unnamed,)


def test_too_many_failures_stop_the_stage_and_raising_the_limit_goes_on(workspace: Workspace) -> None:
    bad = list(range(0, 40, 4))
    with pytest.raises(StageError, match=r"max_failed_fraction") as caught:
        start(scripted(always_prose=bad, max_failed_fraction=0.1), workspace)
    assert "3 of 20" not in str(caught.value)  # it stops at the shard that crosses the limit, not after all
    samples = Path(workspace.stage("interests").base) / "failures.jsonl"
    assert str(samples) in str(caught.value)
    assert len(samples.read_text().splitlines()) >= 2
    assert workspace.stage("interests").manifest() is None
    manifest = start(scripted(always_prose=bad, max_failed_fraction=1.0), workspace)
    assert manifest.stats["failed"] == 10
    assert answered_users(workspace) == list(range(0, 40, 2))


@pytest.mark.parametrize(("fraction", "stops"), [(0.049, True), (0.05, False)])
def test_the_limit_is_inclusive(workspace: Workspace, fraction: float, stops: bool) -> None:
    config = scripted(always_prose=[0], max_failed_fraction=fraction)  # 1 of 20
    if stops:
        with pytest.raises(StageError, match="1 of 20"):
            start(config, workspace)
    else:
        assert start(config, workspace).stats["failed"] == 1


def test_no_samples_stay_behind_when_the_next_result_has_no_failures(workspace: Workspace) -> None:
    samples = Path(workspace.stage("interests").base) / "failures.jsonl"
    start(scripted(always_prose=[0], max_failed_fraction=0.5), workspace)
    assert samples.exists()
    start(scripted(), workspace)
    assert not samples.exists()


def test_a_run_that_is_stopped_goes_on_where_it_was(
    workspace: Workspace, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Work._commit

    def stop_at_the_third(self: Work, place: int, outcomes: Any) -> None:
        if place >= 8:
            raise KeyboardInterrupt
        commit(self, place, outcomes)

    monkeypatch.setattr(Work, "_commit", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        start(scripted(log=str(log)), workspace)
    monkeypatch.setattr(Work, "_commit", commit)
    assert answers_per_user(log) == dict.fromkeys(range(0, 24, 2), 1)
    manifest = start(scripted(log=str(log), commit_every=3), workspace)  # also with another shard size
    under_way = range(16, 24, 2)
    assert answers_per_user(log) == {u: 2 if u in under_way else 1 for u in range(0, 40, 2)}
    assert manifest.rows["answers"] == 20
    assert answered_users(workspace) == list(range(0, 40, 2))


def test_kill_9_of_the_driver_loses_nothing_that_was_committed(workspace: Workspace, log: Path) -> None:
    config = scripted(kill_once_at=20, log=str(log))
    script = f"""
from distributed_mi.core.artifacts import Workspace
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.parse import ParsedInterest
from distributed_mi.interests.stage import _titles_as_interests, run
from tests.unit.interests.fakes import encode, no_ray
config = InterestsConfig.model_validate_json({config.model_dump_json()!r})
run(config, Workspace({workspace.url!r}), encode=encode, start_ray=no_ray)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert workspace.stage("interests").manifest() is None
    assert answers_per_user(log) == dict.fromkeys(range(0, 16, 2), 1)
    again = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
    assert again.returncode == 0
    assert answers_per_user(log) == dict.fromkeys(range(0, 40, 2), 1)
    assert answered_users(workspace) == list(range(0, 40, 2))


def test_a_broken_shard_is_answered_again(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(texts: Sequence[str]) -> np.ndarray:
        raise RuntimeError("encoder")

    with pytest.raises(RuntimeError):
        run(scripted(), workspace, encode=fail, start_ray=no_ray)
    generation = next(p for p in Path(workspace.stage("interests").base).iterdir() if p.is_dir())
    shards = list_files(workspace.fs, str(generation / "answers"), ".parquet")
    assert len(shards) == 5
    Path(shards[2]).write_bytes(b"not parquet")
    start(scripted(), workspace)
    assert answered_users(workspace) == list(range(0, 40, 2))


def test_another_configuration_is_another_generation(workspace: Workspace) -> None:
    first = start(scripted(), workspace)
    assert start(scripted(commit_every=7, num_actors=3), workspace).generation == first.generation
    second = start(scripted(max_history=4), workspace)
    assert second.generation != first.generation


@pytest.mark.parametrize("bad", [np.zeros((3, 2)), np.full((21, 3), np.nan), np.zeros(21)])
def test_wrong_vectors_are_refused(workspace: Workspace, bad: np.ndarray) -> None:
    with pytest.raises(StageError, match="text encoder"):
        run(scripted(), workspace, encode=lambda texts: bad, start_ray=no_ray)


def test_missing_stages_unknown_backends_and_unknown_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="prepare"):
        start(InterestsConfig(), Workspace(str(tmp_path)))
    with pytest.raises(UnknownNameError, match="keyphrase"):
        start(InterestsConfig(backend={"name": "keyphrases"}), Workspace(str(tmp_path)))
    with pytest.raises(ConfigError, match="phrases_per_interest"):
        start(
            InterestsConfig(backend={"name": "keyphrase", "phrases_per_interests": 2}),
            Workspace(str(tmp_path)),
        )


def test_an_exemplar_without_sequence_is_named(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, num_users=4)
    sequences = list_files(workspace.fs, workspace.stage("prepare").path("sequences/train"))
    pq.write_table(pq.read_table(sequences[0]).slice(0, 2), sequences[0])
    with pytest.raises(StageError, match="user_index 2"):
        start(InterestsConfig(), workspace)
