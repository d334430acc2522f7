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

from distributed_mi.core.artifacts import Manifest, StageRun, Workspace, list_files
from distributed_mi.core.errors import ConfigError, StageError, UnknownNameError, WorkspaceError
from distributed_mi.interests.backends.base import Response
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar, HistoryItem
from distributed_mi.interests.parse import ParsedInterest
from distributed_mi.interests.stage import _titles_as_interests, run
from distributed_mi.interests.work import Work
from tests.unit.interests.fakes import (
    NUM_ITEMS,
    SCRIPTED,
    ScriptedBackend,
    answers_per_user,
    encode,
    make_workspace,
    no_ray,
)

ROOT = Path(__file__).resolve().parents[3]


def scripted(**fields: Any) -> InterestsConfig:
    script = {k: fields.pop(k) for k in list(fields) if k not in InterestsConfig.model_fields}
    return InterestsConfig(
        backend={"name": SCRIPTED, **script},
        **{"commit_every": 4, "in_flight": 4, "short_history": 3, **fields},
    )


def start(config: InterestsConfig, workspace: Workspace) -> Manifest:
    return run(config, workspace, encode=encode, start_ray=no_ray)


def answered_users(workspace: Workspace) -> list[int]:
    return sorted(workspace.stage("interests").read("answers", "answers")["user_index"].to_pylist())


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
    steps = {"first": 0, "continued": 0, "larger_budget": 0, "shorter_history": 0, "keyphrase": 20}
    assert manifest.stats["steps"] == steps
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
        "continued": 0,
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
    commit, shards = Work._commit, []

    def stop_at_the_third(self: Work) -> None:
        shards.append(self)
        if len(shards) > 2:
            raise KeyboardInterrupt
        commit(self)

    monkeypatch.setattr(Work, "_commit", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        start(scripted(log=str(log)), workspace)
    monkeypatch.setattr(Work, "_commit", commit)
    before = answers_per_user(log)
    assert set(before.values()) == {1}
    assert len(before) == 12
    manifest = start(scripted(log=str(log), commit_every=3), workspace)  # also with another shard size
    after = answers_per_user(log)
    assert sum(n == 2 for n in after.values()) == 4  # what stood in no shard
    assert {u for u, n in after.items() if n == 2} <= set(before)
    assert manifest.rows["answers"] == 20
    assert answered_users(workspace) == list(range(0, 40, 2))


def test_kill_9_of_the_driver_loses_nothing_that_was_committed(workspace: Workspace, log: Path) -> None:
    config = scripted(kill_once_at=20, log=str(log))
    script = f"""
from distributed_mi.core.artifacts import Workspace
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.stage import run
from tests.unit.interests.fakes import encode, no_ray
config = InterestsConfig.model_validate_json({config.model_dump_json()!r})
run(config, Workspace({workspace.url!r}), encode=encode, start_ray=no_ray)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert workspace.stage("interests").manifest() is None
    before = answers_per_user(log)
    assert set(before.values()) <= {1}
    assert 20 not in before
    assert len(before) % 4 == 0
    again = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
    assert again.returncode == 0
    assert answers_per_user(log) == dict.fromkeys(range(0, 40, 2), 1)
    assert answered_users(workspace) == list(range(0, 40, 2))


def test_a_broken_shard_is_answered_again(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(texts: Sequence[str]) -> np.ndarray:
        raise RuntimeError("encoder")

    with pytest.raises(RuntimeError):
        run(scripted(), workspace, encode=fail, start_ray=no_ray)
    generation = next(p for p in Path(workspace.stage("interests").base).iterdir() if len(p.name) == 16)
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


# cache, duplicates, ledger


def backend_calls(log: Path) -> int:
    return sum(answers_per_user(log).values())


def test_what_was_paid_for_is_not_paid_for_again(tmp_path: Path, log: Path) -> None:
    """Another workspace, the same exemplars and two more: only these are asked for."""
    cache = str(tmp_path / "cache")
    script: dict[str, Any] = {"truncate": [2], "prose": [4], "log": str(log), "cache": cache}
    first = start(scripted(**script), make_workspace(tmp_path / "first", num_users=36))
    asked = backend_calls(log)
    assert asked == 18 + 2
    assert first.stats["ledger"]["requests"] == asked
    assert first.stats["ledger"]["retries"] == 2
    same = make_workspace(tmp_path / "same", num_users=36)
    again = start(scripted(**script), same)
    assert backend_calls(log) == asked
    assert again.stats["content"] == first.stats["content"]
    assert again.stats["steps"] == first.stats["steps"]
    assert again.stats["ledger"]["requests"] == 0
    assert again.stats["ledger"]["replies_from_cache"] == asked
    more = make_workspace(tmp_path / "more", num_users=40)
    start(scripted(**script), more)
    assert backend_calls(log) == asked + 2
    assert answered_users(more) == list(range(0, 40, 2))


@pytest.mark.parametrize("change", [{"max_interests": 7}, {"max_answer_tokens": 400}, {"always_prose": [38]}])
def test_what_decides_an_answer_decides_about_the_cache(
    workspace: Workspace, tmp_path: Path, log: Path, change: dict[str, Any]
) -> None:
    """Schema, budget, and settings of the backend: each makes another answer."""
    cache = str(tmp_path / "cache")
    start(scripted(log=str(log), cache=cache), workspace)
    start(scripted(log=str(log), cache=cache, max_failed_fraction=1.0, **change), workspace)
    assert backend_calls(log) >= 40


def test_errors_are_not_cached(workspace: Workspace, tmp_path: Path, log: Path) -> None:
    config = scripted(refuse=[6], log=str(log), max_history=6, short_history=6, max_failed_fraction=1.0)
    first = start(config, workspace)
    assert (first.stats["failed"], first.stats["ledger"]["errors"]) == (1, 1)
    other = make_workspace(tmp_path / "other", num_users=40)
    second = start(config.model_copy(update={"cache": f"{workspace.url}/answer_cache"}), other)
    assert second.stats["ledger"]["requests"] == 1


def test_exemplars_with_one_prompt_are_asked_once(tmp_path: Path, log: Path) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=4 * NUM_ITEMS, history=1)
    manifest = start(scripted(log=str(log), truncate=[2]), workspace)
    assert manifest.rows["answers"] == 2 * NUM_ITEMS
    assert manifest.stats["ledger"]["duplicates"] == 2 * NUM_ITEMS - NUM_ITEMS // 2
    assert len(answers_per_user(log)) == NUM_ITEMS // 2
    assert answered_users(workspace) == list(range(0, 4 * NUM_ITEMS, 2))
    rows = workspace.stage("interests").read("interests", "interests").to_pylist()
    texts: dict[int, list[str]] = {}
    for row in rows:
        texts.setdefault(row["user_index"], []).append(row["text"])
    assert texts[4] == texts[4 + NUM_ITEMS]
    assert manifest.stats["num_answer_tokens"] == manifest.stats["ledger"]["num_answer_tokens"]


def test_a_cache_that_cannot_be_written_or_read_costs_no_answer(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    folder.write_text("a file, not a folder")
    manifest = start(scripted(cache=str(folder)), workspace)
    assert manifest.rows["answers"] == 20
    assert manifest.stats["cache_unwritten"] == 20
    assert sum("cannot be written" in r.message for r in caplog.records) == 1


def test_the_ledger_survives_runs_and_kills(workspace: Workspace, tmp_path: Path) -> None:
    prices = {"input_per_million": 2.0, "output_per_million": 10.0, "currency": "EUR"}
    first = start(scripted(truncate=[2], prices=prices), workspace)
    ledger = first.stats["ledger"]
    # 21 requests of 10 and 5 tokens
    assert (ledger["num_prompt_tokens"], ledger["num_answer_tokens"]) == (210, 105)
    assert ledger["money"] == pytest.approx(210 * 2e-6 + 105 * 1e-5)
    assert ledger["money_per_exemplar"] == pytest.approx(ledger["money"] / 20, abs=1e-9)
    assert ledger["currency"] == "EUR"
    second = start(scripted(prices=prices, max_history=4), workspace)
    both = second.stats["ledger_of_all_runs"]
    assert (both["runs"], both["exemplars"], both["requests"]) == (2, 40, 41)
    assert both["money"] == pytest.approx(ledger["money"] + second.stats["ledger"]["money"], abs=1e-6)


def test_a_full_disk_is_named_and_what_is_committed_stays(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = StageRun.write_table, []

    def full(self: StageRun, relative: str, table: Any, name: str) -> Any:
        if name == "answers" and len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(relative)
        return write(self, relative, table, name)

    monkeypatch.setattr(StageRun, "write_table", full)
    with pytest.raises(StageError, match=r"cannot write .*No space left on device.*go on"):
        start(scripted(), workspace)
    monkeypatch.setattr(StageRun, "write_table", write)
    manifest = start(scripted(), workspace)
    assert manifest.rows["answers"] == 20


@pytest.mark.parametrize("template", ["categories", "language"])
def test_other_templates(workspace: Workspace, template: str) -> None:
    manifest = start(scripted(template=template, language="Danish"), workspace)
    assert manifest.rows["answers"] == 20
    prompt = workspace.stage("interests").read("answers", "answers")["prompt"][0].as_py()
    assert ("category it belongs to" in prompt) == (template == "categories")
    assert ("written in Danish" in prompt) == (template == "language")


def test_what_was_cut_is_recorded(workspace: Workspace) -> None:
    manifest = start(scripted(max_title_chars=10, max_prompt_tokens=200), workspace)
    assert manifest.stats["titles_shortened"] > 0
    assert manifest.stats["titles_changed"] >= manifest.stats["titles_shortened"]
    assert manifest.stats["items_left_out"] > 0


class StopsLate(ScriptedBackend):
    """Answers one prompt at a time, then finds that its key is wrong."""

    def collect(self) -> list[Response]:
        if len(self.calls) == 6:
            raise StageError("401: wrong key")
        held, self._held = self._held[:1], self._held[1:]
        return self.generate(held)


def test_what_was_answered_before_a_stop_is_kept(workspace: Workspace, log: Path) -> None:
    name = "tests.unit.interests.test_stage:StopsLate"
    config = InterestsConfig(backend={"name": name, "log": str(log)}, short_history=3)
    with pytest.raises(StageError, match="wrong key"):
        start(config, workspace)
    assert backend_calls(log) == 6
    with pytest.raises(StageError, match="wrong key"):
        start(config, workspace)
    assert set(answers_per_user(log).values()) == {1}
    assert backend_calls(log) == 12
