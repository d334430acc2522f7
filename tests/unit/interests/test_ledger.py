"""What a run costs, by hand; what it is expected to cost before it starts; and energy counters."""

import json
from pathlib import Path
from typing import Any

import pytest

from distributed_mi.core.artifacts import Workspace
from distributed_mi.core.errors import WorkspaceError
from distributed_mi.interests import energy, ledger, plan
from distributed_mi.interests.backends.base import Response, estimate_tokens
from distributed_mi.interests.config import Prices
from distributed_mi.interests.ladder import Outcome, Reply
from distributed_mi.interests.ledger import Account, Ledger
from tests.unit.interests.fakes import answers_per_user, make_workspace
from tests.unit.interests.test_stage import scripted, start


def outcome(*steps: str, cached: int = 0) -> Outcome:
    replies = tuple(Reply(s, s, Response(0, "x", 1000, 100, cached, "stop"), 0.5) for s in steps)
    return Outcome(0, replies=replies)


def test_sums_and_money_by_hand() -> None:
    account = Account()
    account.count([outcome("first", cached=400), outcome("first", "larger_budget"), outcome()])
    assert (account.exemplars, account.requests, account.retries) == (3, 3, 1)
    assert (account.num_prompt_tokens, account.num_cached_tokens, account.num_answer_tokens) == (
        3000,
        400,
        300,
    )
    account.engine_seconds, account.joules = 1800.0, 7.2e6
    prices = Prices(
        input_per_million=1.0,
        cached_input_per_million=0.1,
        output_per_million=4.0,
        engine_hour=2.0,
        kilowatt_hour=0.25,
    )
    # 2600 fresh + 400 cached + 300 out + half an hour + two kilowatt-hours
    wanted = 0.0026 + 0.00004 + 0.0012 + 1.0 + 0.5
    assert account.money(prices) == pytest.approx(wanted)
    report = account.report(prices)
    assert report["money"] == pytest.approx(wanted, abs=1e-6)
    assert report["money_per_exemplar"] == pytest.approx(wanted / 3, abs=1e-6)
    # without a price of their own, cached tokens cost what others cost
    assert Account(num_prompt_tokens=10, num_cached_tokens=4).money(
        Prices(input_per_million=1e6)
    ) == pytest.approx(10.0)


def test_accounts_add_up_with_and_without_energy() -> None:
    total = Account()
    total.add(Account(exemplars=2, seconds=1.5))
    assert total.joules is None
    total.add(Account(exemplars=3, joules=5.0))
    total.add(Account(joules=2.0))
    assert (total.exemplars, total.seconds, total.joules) == (5, 1.5, 7.0)


def test_runs_are_kept_and_a_broken_entry_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = Workspace(str(tmp_path)).stage("interests")
    first = Ledger(directory, "vllm", "m", Prices(output_per_million=10.0))
    first.write()
    assert ledger.read_runs(directory) == []  # nothing was done
    for run in (first, Ledger(directory, "vllm", "m", Prices(output_per_million=20.0))):
        run.account.count([outcome("first")])
        run.write()
        run.write()
    Path(directory.base, "ledger", "broken.json").write_text("{")
    both = first.cumulative()
    assert (both["runs"], both["requests"]) == (2, 2)
    # each by the prices of its day
    assert both["money"] == pytest.approx(0.001 + 0.002)
    assert "broken.json" in caplog.text
    text = ledger.render(ledger.read_runs(directory))
    assert text.splitlines()[-1].startswith("all")
    assert "0.0030 USD" in text
    assert "no run" in ledger.render([])


def test_a_dry_run_asks_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=80)
    log = tmp_path / "log"
    log.mkdir()
    config = scripted(log=str(log), prices={"input_per_million": 1.0, "output_per_million": 2.0})
    files = sorted(str(p) for p in (tmp_path / "w").rglob("*"))
    facts = plan.dry_run(config, workspace)
    assert sorted(str(p) for p in (tmp_path / "w").rglob("*")) in (
        files,
        sorted([*files, str(tmp_path / "w" / "interests")]),
    )
    assert answers_per_user(log) == {}
    assert (facts["exemplars"], facts["prompts"], facts["done"], facts["from_cache"]) == (40, 40, 0, 0)
    assert facts["sampled_prompts"] == 32
    assert facts["seconds"] is None
    assert facts["num_answer_tokens"] == 40 * config.max_answer_tokens
    money = (facts["num_prompt_tokens"] + 2 * facts["num_answer_tokens"]) / 1e6
    assert facts["money"] == pytest.approx(money, abs=1e-4)
    text = plan.render(facts)
    assert "prompts to send       40" in text
    assert "unknown: --ask-sample" in text


def test_a_sample_that_was_asked_is_not_paid_for_again(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w", num_users=80)
    log = tmp_path / "log"
    log.mkdir()
    config = scripted(log=str(log))
    facts = plan.dry_run(config, workspace, ask=True)
    assert sum(answers_per_user(log).values()) == 32
    assert facts["num_answer_tokens"] == 40 * 5  # the scripted backend says five each
    assert facts["seconds"] is not None
    later = plan.dry_run(config, workspace)
    assert (later["from_cache"], later["prompts"]) == (32, 8)
    start(config, workspace)
    assert sum(answers_per_user(log).values()) == 40
    done = plan.dry_run(config, workspace)
    assert done["complete"]
    assert "nothing to send" in plan.render(done)
    # the next generation knows from the ledger how long answers are
    other = plan.dry_run(scripted(log=str(log), max_history=4), workspace)
    assert other["answers_estimated_from"] == "earlier runs"
    assert other["num_answer_tokens"] == 40 * 5


def test_a_dry_run_needs_the_stages_before(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="distributed-mi prepare"):
        plan.dry_run(scripted(), Workspace(str(tmp_path)))


def test_tokens_are_estimated_rather_high() -> None:
    assert estimate_tokens("") == 0
    assert estimate_tokens("abcd") == 2
    assert estimate_tokens("é") == 1


def test_energy_of_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages count, their parts do not; a counter that wrapped is left out."""
    counters: dict[str, Any] = {"intel-rapl:0": 5_000_000, "intel-rapl:0:0": 9, "intel-rapl:1": 7_000_000}

    def write() -> None:
        for name, value in counters.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "energy_uj").write_text(f"{value}\n")

    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "_open_nvml", lambda: None)
    assert energy.EnergyMeter().joules() is None
    write()
    meter = energy.EnergyMeter()
    assert meter.joules() == 0.0
    counters["intel-rapl:0"] += 2_500_000
    counters["intel-rapl:0:0"] += 2_000_000
    counters["intel-rapl:1"] = 3
    write()
    assert meter.joules() == pytest.approx(2.5)
    json.dumps(Account(joules=meter.joules()).report(Prices()))
