"""The prepare stage on a local Ray: its result against a plain Python reference, skipping, resuming, and bad input."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_mi.core.artifacts import Manifest, Workspace, list_files
from distributed_mi.core.errors import ConfigError, InputError, LeakageError, RejectedRowsError
from distributed_mi.data import stage
from distributed_mi.data.batches import Sequences, TrainSampler
from distributed_mi.data.config import SPLITS, DataConfig
from distributed_mi.data.passes import shard_file

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

SYNTHETIC = {"name": "synthetic", "num_users": 120, "num_items": 60, "num_topics": 6, "seed": 3}


def never() -> None:
    raise AssertionError("Ray was asked for, although there is nothing to do")


def prepare(folder: Path, **config: Any) -> tuple[Manifest, Workspace]:
    workspace = Workspace(str(folder))
    return stage.run(DataConfig.model_validate(config), workspace, start_ray=lambda: None), workspace


def table(workspace: Workspace, folder: str, name: str) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(workspace.stage("prepare").read(folder, name)))


def splits(workspace: Workspace) -> dict[str, list[dict[str, Any]]]:
    return {s: table(workspace, f"sequences/{s}", "sequences").sort("user_index").to_dicts() for s in SPLITS}


def write_log(path: Path, rng: np.random.Generator, num_events: int = 900) -> list[tuple[str, str, int]]:
    """A log with ties in time, repeated items, rare items and short users, in no order; written as CSV."""
    users, items = rng.zipf(1.3, num_events) % 80, rng.zipf(1.5, num_events) % 60
    times = rng.integers(0, 40, num_events)
    rows = [(f"u{u}", f"i{i}", int(t)) for u, i, t in zip(users, items, times, strict=True)]
    path.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows), encoding="utf-8")
    return rows


def comirec(
    rows: list[tuple[str, str, int]], least: int = 5
) -> tuple[list[str], dict[str, list[tuple[str, list[str]]]]]:
    """The published preprocessing (model-facts 3), one event at a time: items in order of id, users of each split."""
    counts: Counter[str] = Counter()
    users: dict[str, list[tuple[str, int]]] = {}
    for user, item, time in rows:
        counts[item] += 1
        users.setdefault(user, []).append((item, time))
    items = [
        i for i, n in sorted(counts.items(), key=lambda pair: -pair[1]) if n >= least
    ]  # sorted is stable
    kept = {u: [e for e in events if e[0] in set(items)] for u, events in users.items()}
    names = [u for u in users if len(kept[u]) >= least]
    random.seed(1230)
    random.shuffle(names)
    one, two = int(0.8 * len(names)), int(0.9 * len(names))
    parts = {"train": names[:one], "validation": names[one:two], "test": names[two:]}
    return items, {
        s: [(u, [i for i, _ in sorted(kept[u], key=lambda e: e[1])]) for u in part]
        for s, part in parts.items()
    }


@pytest.mark.parametrize("num_partitions", [1, 3])
def test_result_is_that_of_the_published_preprocessing(tmp_path, rng, num_partitions):
    rows = write_log(tmp_path / "log.csv", rng)
    items, expected = comirec(rows)
    manifest, workspace = prepare(
        tmp_path / "ws", interactions=str(tmp_path / "log.csv"), num_partitions=num_partitions
    )
    catalogue = table(workspace, "catalogue", "catalogue").sort("item_index")
    assert catalogue["item_id"].to_list() == items
    assert catalogue["item_index"].to_list() == list(range(1, len(items) + 1))
    found = splits(workspace)
    for name in SPLITS:
        got = [(r["user_id"], [items[i - 1] for i in r["item_indices"]]) for r in found[name]]
        assert got == expected[name]
        history = [
            len(r["item_indices"]) if name == "train" else int(0.8 * len(r["item_indices"]))
            for r in found[name]
        ]
        assert [r["num_history"] for r in found[name]] == history
        assert manifest.rows[name] == len(expected[name])
    everyone = [r for name in SPLITS for r in found[name]]
    assert [r["user_index"] for r in everyone] == list(range(len(everyone)))
    assert manifest.rows["events"] == sum(len(r["item_indices"]) for r in everyone)
    train = Counter(i for r in found["train"] for i in r["item_indices"])
    assert dict(enumerate(catalogue["num_train_events"], 1)) == {
        i: train[i] for i in range(1, len(items) + 1)
    }
    assert sum(manifest.stats["removed_events"].values()) == len(rows) - manifest.rows["events"] > 0


def test_second_run_is_skipped_without_ray(tmp_path):
    first, workspace = prepare(tmp_path, reader=SYNTHETIC)
    again = stage.run(DataConfig.model_validate({"reader": SYNTHETIC}), workspace, start_ray=never)
    assert again == first
    other, _ = prepare(tmp_path, reader={**SYNTHETIC, "seed": 4})
    assert other.identity != first.identity


def test_shards_are_whole_users_and_the_same_every_time(tmp_path):
    files = []
    for attempt in ("a", "b"):
        manifest, workspace = prepare(tmp_path / attempt, reader=SYNTHETIC, num_partitions=3)
        assert manifest.rows["users"] == 120
        root = workspace.stage("prepare").path("")
        files.append(
            {p.removeprefix(root): pq.read_table(p) for p in list_files(workspace.fs, root, ".parquet")}
        )
    assert files[0].keys() == files[1].keys()
    assert all(files[0][name] == files[1][name] for name in files[0])
    users = [
        u for name, shard in files[0].items() if "sequences" in name for u in shard["user_id"].to_pylist()
    ]
    assert len(users) == len(set(users)) == 120
    shards = [s for name, s in files[0].items() if "train" in name]
    assert len(shards) == 3
    assert all(s["user_index"].to_pylist() == sorted(s["user_index"].to_pylist()) for s in shards)


@pytest.mark.parametrize("split", ["leave-one-out", "global-temporal"])
def test_other_splits_hold_back_the_right_events_and_pass_the_check(tmp_path, split):
    config = {
        "reader": SYNTHETIC,
        "split": {"name": split},
        "k_core": {"method": "iterative"},
        "num_partitions": 2,
    }
    manifest, workspace = prepare(tmp_path, **config)
    found = splits(workspace)
    leakage = manifest.stats["leakage"]
    assert (leakage["passed"], leakage["protocol"], leakage["label_events_in_train"]) == (True, split, 0)
    labels = sum(len(r["item_indices"]) - r["num_history"] for s in SPLITS[1:] for r in found[s])
    assert leakage["label_events"] == labels > 0
    if split == "leave-one-out":
        assert manifest.rows["validation"] == manifest.rows["test"] == 120
    else:
        latest = max(t for r in found["train"] for t in r["timestamps"])
        first_label = min(r["timestamps"][r["num_history"]] for s in SPLITS[1:] for r in found[s])
        assert latest < first_label
        trained = sum(len(r["item_indices"]) for r in found["train"])
        assert abs(trained / manifest.rows["events"] - 0.8) < 0.01


def test_a_leak_planted_in_the_written_shards_stops_the_stage(tmp_path, monkeypatch):
    honest = stage._Prepare.write

    def leaking(self, core):
        written = honest(self, core)
        test, train = (self.stage_run.read_table(f"sequences/{s}", "sequences") for s in ("test", "train"))
        path = shard_file("sequences/train", 0)
        self.stage_run.write_table(path, pa.concat_tables([train, test[:1]]), "sequences")
        return written

    monkeypatch.setattr(stage._Prepare, "write", leaking)
    with pytest.raises(
        LeakageError, match=r"FAILED for by-user: [1-9]\d* of \d+ label events are in .*, 1 users"
    ):
        prepare(tmp_path, reader=SYNTHETIC)
    assert Workspace(str(tmp_path)).stage("prepare").manifest() is None


BAD = ["{", '{"user": "", "item": "a", "timestamp": 1}', '{"user": "u", "item": "a", "timestamp": -1}', "{"]


def write_bad_log(path: Path) -> None:
    good = [json.dumps({"user": f"u{n % 12}", "item": f"i{n % 7}", "timestamp": n}) for n in range(96)]
    path.write_text("\n".join([*good[:50], *BAD, *good[50:]]) + "\n", encoding="utf-8")


def test_too_many_bad_rows_stop_the_stage_after_writing_them(tmp_path, monkeypatch):
    write_bad_log(tmp_path / "log.jsonl")
    config = {"interactions": str(tmp_path / "log.jsonl"), "k_core": {"method": "none"}}
    with pytest.raises(
        RejectedRowsError, match=r"4 of 100 rows .*2 malformed line.*limit is 1\.00%"
    ) as caught:
        prepare(tmp_path / "ws", **config)
    where = str(caught.value).split("they are in ")[1].split(". The limit")[0]
    (file,) = Path(where).glob("*.parquet")
    rejected = pq.read_table(file).to_pylist()
    assert [(r["source"], r["row"], r["content"]) for r in rejected] == [
        ("log.jsonl", 51 + n, text) for n, text in enumerate(BAD)
    ]
    staged = sorted(Path(where).parent.rglob("_staging/interactions/*"))
    before = [p.stat().st_mtime_ns for p in staged]
    assert staged

    # the limit raised, the run goes on from what was read: the staged files are the old ones
    honest = stage._Prepare.accept_rejected

    def watching(self, outcome, what):
        assert [p.stat().st_mtime_ns for p in staged] == before
        return honest(self, outcome, what)

    with monkeypatch.context() as patch:
        patch.setattr(stage._Prepare, "accept_rejected", watching)
        manifest, workspace = prepare(tmp_path / "ws", **config, max_rejected_fraction=0.04)
    assert manifest.rejected_rows == 4
    assert manifest.stats["rejected_by_reason"] == {
        "empty user id": 1,
        "malformed line": 2,
        "negative timestamp": 1,
    }
    assert table(workspace, "rejected", "rejected").height == 4
    assert not any("_staging" in p for p in list_files(workspace.fs, workspace.stage("prepare").base))
    assert manifest.rows["events"] == 96

    # the limit lowered again, the complete result is not accepted either; raised, it is skipped without Ray
    for limit, accepted in ((0.03, False), (0.04, True)):
        again = DataConfig.model_validate({**config, "max_rejected_fraction": limit})
        if accepted:
            assert stage.run(again, workspace, start_ray=never) == manifest
        else:
            with pytest.raises(
                RejectedRowsError, match=r"4 of 100 rows of the interactions .*2 malformed line.*is 3\.00%"
            ):
                stage.run(again, workspace, start_ray=never)


def test_the_limit_holds_for_each_input_of_a_complete_result(tmp_path):
    log = "".join(
        json.dumps({"user": f"u{n % 12}", "item": f"i{n % 7}", "timestamp": n}) + "\n" for n in range(96)
    )
    (tmp_path / "log.jsonl").write_text(log)
    (tmp_path / "items.jsonl").write_text('{"item": "i0", "title": "Soap"}\n{\n')
    config = {
        "interactions": str(tmp_path / "log.jsonl"),
        "items": str(tmp_path / "items.jsonl"),
        "k_core": {"method": "none"},
    }
    manifest, workspace = prepare(tmp_path / "ws", **config, max_rejected_fraction=0.5)
    assert manifest.rejected_rows == 1  # of 98 in all, but of 2 items
    with pytest.raises(
        RejectedRowsError, match=r"1 of 2 rows of the items could not be used \(1 malformed line\)"
    ):
        stage.run(DataConfig.model_validate(config), workspace, start_ray=never)


def test_a_run_that_died_late_is_finished_by_the_next_and_equals_an_undisturbed_one(tmp_path, monkeypatch):
    config = {"reader": SYNTHETIC, "num_partitions": 2}
    undisturbed, _ = prepare(tmp_path / "calm", **config)

    def die(self, written):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage._Prepare, "check", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "killed", **config)
    assert Workspace(str(tmp_path / "killed")).stage("prepare").manifest() is None
    finished, workspace = prepare(
        tmp_path / "killed", **{**config, "num_partitions": 1}
    )  # also with another cut
    assert finished.identity == undisturbed.identity
    assert splits(workspace) == splits(Workspace(str(tmp_path / "calm")))


def test_single_events_untitled_items_and_unknown_metadata_are_kept_and_counted(tmp_path):
    log = "user,item,timestamp\n" + "".join(f"u{n},i{n % 3},{n}\n" for n in range(9)) + "u9,i0,1\nu9,i0,2\n"
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "items.csv").write_text("item,title\ni0,Soap\ni1,\ni7,Not in the log\n")
    manifest, workspace = prepare(
        tmp_path / "ws",
        interactions=str(tmp_path / "log.csv"),
        items=str(tmp_path / "items.csv"),
        k_core={"method": "none"},
    )
    assert manifest.rows["users"] == 10
    assert manifest.stats["single_event_users"] == 9
    assert manifest.stats["items_without_title"] == 2
    assert manifest.stats["items_without_metadata"] == 1
    catalogue = table(workspace, "catalogue", "catalogue").sort("item_index")
    assert catalogue.select("item_id", "title", "num_events").rows() == [
        ("i0", "Soap", 5),
        ("i1", None, 3),
        ("i2", None, 3),
    ]
    evaluation = [Sequences.read(workspace, s) for s in SPLITS[1:]]
    skipped = sum(s.num_without_history for s in evaluation)
    assert skipped == manifest.stats["evaluation_users_without_history"] > 0


def test_duplicates_and_row_filters_are_counted(tmp_path):
    rows = [
        ("u0", "a", 5, 5),
        ("u0", "a", 1, 5),
        ("u0", "b", 2, 5),
        ("u1", "a", 3, 1),
        ("u1", "b", 9, 5),
        ("u2", "b", 4, 5),
    ]
    (tmp_path / "log.csv").write_text(
        "user,item,timestamp,stars\n" + "".join(f"{u},{i},{t},{r}\n" for u, i, t, r in rows)
    )
    manifest, workspace = prepare(
        tmp_path / "ws",
        interactions=str(tmp_path / "log.csv"),
        reader={"rating": "stars"},
        filters={"min_rating": 3, "end": "1970-01-01T00:00:09", "duplicates": "first"},
        k_core={"method": "none"},
        split={"train_fraction": 0.98, "validation_fraction": 0.01, "name": "leave-one-out"},
        num_partitions=2,
    )
    # u1/a has one star, u1/b is too late, of u0/a the one at 1 s is first
    assert manifest.stats["removed_events"] == {"min_rating": 1, "end": 1, "duplicates": 1}
    assert [r["timestamps"] for r in splits(workspace)["train"]] == [[1000, 2000], [4000]]
    assert manifest.rows["validation"] == manifest.rows["test"] == 0


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"interactions": "{}/nowhere.csv"}, InputError, r"no such file: .*nowhere\.csv"),
        (
            {"interactions": "{}/log.csv", "items": "{}/no-items.csv"},
            InputError,
            r"no such file: .*no-items\.csv",
        ),
        (
            {"interactions": "{}/log.csv", "reader": {"user": "who"}},
            InputError,
            r"log\.csv: no column who; it has user, item",
        ),
        ({"interactions": "{}/log.csv", "filters": {"min_rating": 1}}, InputError, r"data\.reader\.rating"),
        (
            {"interactions": "{}/log.csv", "filters": {"start": "2020-01-01"}},
            InputError,
            r"no event is left of 20 rows: start removed 20$",
        ),
        (
            {"interactions": "{}/log.csv", "k_core": {"min_item_events": 50}},
            InputError,
            r"no event is left of 20 rows: k_core \(rare items\) removed 20$",
        ),
        (
            {"interactions": "{}/log.csv", "k_core": {"min_user_events": 11, "min_item_events": 1}},
            InputError,
            r"no event is left of 20 rows: k_core \(short users\) removed 20$",
        ),
        ({"interactions": "{}/empty.jsonl"}, InputError, "hold no rows"),
        ({}, ConfigError, r"data\.interactions is not set"),
        ({"reader": SYNTHETIC, "interactions": "{}/log.csv"}, ConfigError, "generates its data"),
    ],
)
def test_bad_input_is_explained(tmp_path, config, error, message):
    log = "user,item,timestamp\n" + "".join(f"u{n % 2},i{n % 4},{n}\n" for n in range(20))
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "empty.jsonl").write_text("")
    config = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in config.items()}
    with pytest.raises(error, match=message):
        prepare(tmp_path / "ws", **config)
    assert Workspace(str(tmp_path / "ws")).stage("prepare").manifest() is None


def test_truncated_gzip_among_several_files_keeps_the_rest(tmp_path):
    import gzip

    for name, user in (("a.csv.gz", "u0"), ("b.csv.gz", "u1")):
        body = "user,item,timestamp\n" + "".join(f"{user},i{n % 3},{n}\n" for n in range(3000))
        data = gzip.compress(body.encode())
        (tmp_path / name).write_bytes(data if user == "u0" else data[: len(data) // 2])
    manifest, workspace = prepare(
        tmp_path / "ws", interactions=f"{tmp_path}/*.csv.gz", split={"name": "leave-one-out"}
    )
    assert manifest.stats["rejected_by_reason"] == {"truncated": 1}
    assert table(workspace, "rejected", "rejected")["source"].to_list() == ["b.csv.gz"]
    lengths = {r["user_id"]: len(r["item_indices"]) for r in splits(workspace)["test"]}
    assert lengths["u0"] == 3000
    assert 500 < lengths["u1"] < 3000


def test_beauty_has_the_published_statistics(tmp_path, dmi_data):
    folder = dmi_data / "amazon-beauty-5core"
    manifest, workspace = prepare(
        tmp_path,
        interactions=str(folder / "interactions.parquet"),
        items=str(folder / "items.parquet"),
        reader={"position": "position"},
    )
    # model-facts 2.1
    assert manifest.rows == {
        "events": 198_502,
        "users": 22_363,
        "items": 12_101,
        "train": 17_890,
        "validation": 2_236,
        "test": 2_237,
    }
    assert round(manifest.stats["mean_length"], 3) == 8.876
    assert manifest.stats["leakage"]["passed"]
    assert manifest.stats["items_without_title"] == 7
    raw = pl.read_parquet(folder / "interactions.parquet")
    catalogue = table(workspace, "catalogue", "catalogue").sort("item_index")
    popular = raw["item"].value_counts(sort=True)
    assert catalogue["item_id"][0] == popular["item"][0]
    assert catalogue["num_events"].to_list() == sorted(popular["count"].to_list(), reverse=True)
    rows = raw.sort("user", "position").group_by("user").agg("item")
    truth = dict(rows.rows())
    names = dict(catalogue.select("item_index", "item_id").rows())
    for row in splits(workspace)["test"]:
        assert [names[i] for i in row["item_indices"]] == truth[row["user_id"]]
    sampler = TrainSampler(Sequences.read(workspace, "train"), num_users_per_step=128, max_history=20)
    assert sampler.num_excluded_users == 0


def test_office_has_the_published_sizes(tmp_path, dmi_data):
    manifest, _ = prepare(
        tmp_path, interactions=str(dmi_data / "amazon-office-5core/interactions.parquet"), num_partitions=2
    )
    sizes = [manifest.rows[s] for s in SPLITS]
    assert sizes == [3_924, 490, 491]
    assert (manifest.rows["items"], manifest.rows["events"]) == (2_420, 53_258)


def test_raw_files_go_through_the_whole_stage(tmp_path, dmi_data):
    raw = dmi_data / "raw"
    movies, _ = prepare(
        tmp_path / "ml",
        interactions=str(raw / "ml-100k/u.data"),
        items=str(raw / "ml-100k/u.item"),
        reader={"name": "movielens"},
        k_core={"method": "none"},
    )
    assert (movies.rows["users"], movies.rows["items"], movies.rows["events"]) == (943, 1_682, 100_000)
    gifts, _ = prepare(
        tmp_path / "gifts",
        interactions=str(raw / "amazon-2018-gift-cards/Gift_Cards_5.json.gz"),
        items=str(raw / "amazon-2018-gift-cards/meta_Gift_Cards.json.gz"),
        reader={"name": "amazon_reviews"},
        split={"name": "leave-one-out"},
    )
    assert gifts.stats["input_rows"] == {"interactions": 2_972, "items": 1_547}
    assert gifts.rejected_rows == 0
