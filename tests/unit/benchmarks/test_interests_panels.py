"""The panels of bench_interests_quality on a few made-up users: what each side saw, and what is left to score."""

import functools
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks import bench_interests_quality as bench
from benchmarks import harness, interests_panels, interests_rows

USERS, FILMS, EVENTS = 6, 60, 40


class FakeEncoder:
    """Texts -> counts of letters."""

    dim = 26

    def __call__(self, texts: list[str], on_batch: object = None) -> np.ndarray:
        counts = [[t.lower().count(chr(97 + i)) + 0.1 for i in range(26)] for t in texts]
        return np.array(counts, dtype=np.float32)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folders of the form that the benchmark reads, with films, users and texts that are made up."""
    rng = np.random.default_rng(3)
    words = ["storm", "river", "castle", "engine", "garden", "winter", "mirror", "violin"]
    films = [f"{words[i % 8].title()} {words[i // 8 % 8]} ({1980 + i})" for i in range(FILMS)]
    items = pl.DataFrame(
        {
            "item": [str(100 + i) for i in range(FILMS)],
            "title": films,
            "categories": [[["Drama", "War", "Comedy"][i % 3]] for i in range(FILMS)],
        }
    )
    orders = [rng.permutation(FILMS)[:EVENTS] for _ in range(USERS)]
    events = pl.DataFrame(
        {
            "user": [str(1 + u) for u in range(USERS) for _ in range(EVENTS)],
            "item": [str(100 + i) for order in orders for i in order],
            "position": [n for _ in range(USERS) for n in range(EVENTS)],
        }
    ).sample(fraction=1.0, shuffle=True, seed=1)  # readers must not rely on the order of rows
    for name in ("ml-100k", "ml-1m", "llm-text-ml-100k", "llm-text-ml-1m"):
        (tmp_path / name).mkdir()
    for name in ("ml-100k", "ml-1m"):
        items.write_parquet(tmp_path / name / "items.parquet")
        events.write_parquet(tmp_path / name / "interactions.parquet")
    genre_texts = [(str(1 + u), g, f"{g} films of kind {u}") for u in range(USERS) for g in ("drama", "war")]
    pl.DataFrame(genre_texts, schema=["user", "interest", "text"], orient="row").write_parquet(
        tmp_path / "llm-text-ml-100k" / "user_interests.parquet"
    )
    profile = (
        "The user enjoys storms. Rivers too. Conversely, the user does not enjoy castles. Gardens are fine."
    )
    rows = []
    for u, order in enumerate(orders):
        cited = [films[i] for i in order[: 22 if u else 5]]  # of the first user too few are cited
        base = {"user": str(1 + u), "interests": [], "evidence_titles": [], "text": profile}
        likes = {"interests": ["I like it.", f"I like kind {u}."], "evidence_titles": [cited, cited[:2]]}
        rows.append({**base, **likes, "source": "lehengthu-like"})
        rows.append({**base, "interests": [f"taste {u}"], "source": "lehengthu-taste"})
        rows += [{**base, "source": s} for s in interests_panels.GPT4_SOURCES]
    text_schema = {
        "user": pl.String,
        "source": pl.String,
        "interests": pl.List(pl.String),
        "evidence_titles": pl.List(pl.List(pl.String)),
        "text": pl.String,
    }
    pl.DataFrame(rows, schema=text_schema).write_parquet(tmp_path / "llm-text-ml-1m" / "user_texts.parquet")
    told = {"item": items["item"], "title": films, "text": [f"about {f}" for f in films]}
    pl.DataFrame(told)[:-1].write_parquet(tmp_path / "llm-text-ml-1m" / "item_texts.parquet")
    return tmp_path


def test_only_sides_that_say_so_have_seen_the_later_items(data: Path) -> None:
    built = bench.build_panels(data)
    assert [p.name for p in built["ml-100k"][1]] == ["ml-100k genres"]
    assert len(built["ml-1m"][1]) == 7
    for log, found in built.values():
        for panel in found:
            for user, later in panel.later.items():
                assert later
                assert set(later) <= set(log.events[user])
                for side in panel.sides:
                    seen = set(side.history[user]) & set(later)
                    assert bool(seen) == side.saw_later, (panel.name, side.name)
                    support = {i for x in side.interests[user] for i in x.item_indices}
                    assert support <= set(side.history[user])


def test_earlier_is_the_first_part_in_time(data: Path) -> None:
    log = interests_panels.Log(data / "ml-1m")
    events = pl.read_parquet(data / "ml-1m" / "interactions.parquet").filter(user="3").sort("position")
    assert log.events[3] == [log.index_of[i] for i in events["item"]]
    assert log.earlier(3) == log.events[3][:32]
    assert log.later(3) == log.events[3][32:]


def test_films_that_the_model_cites_are_what_all_sides_have(data: Path) -> None:
    panel = bench.build_panels(data)["ml-1m"][1][-1]
    assert sorted(panel.later) == [2, 3, 4, 5, 6]  # of user 1 it cites 5 films only
    assert {len(x) for x in panel.later.values()} == {EVENTS - 22}
    assert not any(s.saw_later for s in panel.sides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A likes x. And y! Conversely, not z. But w.", ["A likes x.", "And y!"]),
        ("A does not like x. B.", ["A does not like x.", "B."]),
        ("Only one", ["Only one"]),
        ("A. The user doesn't like b.", ["A."]),
        ("A. Not only b but c. The user avoids d.", ["A.", "Not only b but c."]),
    ],
)
def test_likes_end_at_the_first_dislike(text: str, expected: list[str]) -> None:
    assert interests_panels.stated_likes(text) == expected


def test_results_state_every_side_and_no_text_of_the_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halves(panel: interests_panels.Panel, items_VT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        users = np.array(sorted(panel.earlier))
        return users, users[np.arange(len(users)) // 2 * 2]  # pairs; affinity propagation has its own tests

    monkeypatch.setattr(bench, "TextEncoder", lambda config, device: FakeEncoder())
    monkeypatch.setattr(interests_rows, "cluster", halves)
    quick = functools.partial(interests_rows.paired_differences, samples=20, permutations=20)
    monkeypatch.setattr(interests_rows, "paired_differences", quick)
    monkeypatch.setattr(
        "sys.argv", ["bench_interests_quality.py", "--data", str(data), "--out", str(tmp_path / "out")]
    )
    monkeypatch.setattr(harness, "describe_machine", lambda: harness_facts())
    assert bench.main() == 0
    files = {p.name: p.read_text() for p in (tmp_path / "out").iterdir()}
    assert len(files) == 6
    results = {n.split("_")[1]: json.loads(t) for n, t in files.items() if n.endswith(".json")}
    # Seven panels of four sides and one of three; two comparisons in each of the seven, one in the other.
    rows = {"quality": 7 * 4 + 3, "targets": 7 * 4 + 3 + 7 * 2 + 1, "transfer": 7 * 4 + 3}
    assert {n: len(r["rows"]) for n, r in results.items()} == rows
    for result in results.values():
        assert {len(r) for r in result["rows"]} == {len(result["header"])}
    seen = {s["side"]: s["saw_whole_history"] for s in results["quality"]["samples"]}
    assert seen["keyphrase, whole"]
    assert not seen["keyphrase, earlier"]
    for name, text in files.items():
        for word in ("storm", "castle", "violin", "Conversely"):
            assert word not in text, name


def test_vectors_are_kept_between_runs(tmp_path: Path) -> None:
    class Counting(FakeEncoder):
        calls = 0

        def __call__(self, texts: list[str], on_batch: object = None) -> np.ndarray:
            self.calls += len(texts)
            return super().__call__(texts)

    encoder = Counting()
    first = interests_rows.Texts(encoder, ["a b", "c", "a b"], "x", tmp_path / "cache")
    again = interests_rows.Texts(encoder, ["c", "d", "a b"], "x", tmp_path / "cache")
    assert encoder.calls == 3
    np.testing.assert_array_equal(first(["c", "a b"]), again(["c", "a b"]))
    np.testing.assert_array_equal(again(["d"]), FakeEncoder()(["d"]))


def harness_facts() -> dict:
    facts = {"cpu": "x", "cores": 1, "memory_gib": 1, "gpu": [], "os": "x", "python": "x", "packages": {}}
    run = {"environment": {}, "load_average": [0], "commit": "x", "uncommitted_changes": False}
    return {**facts, **run, "command": "x", "date": "2026-01-01"}
