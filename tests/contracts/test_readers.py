"""What is asked of every reader: declared columns, the same result every time, bad rows told apart and counted.

A new file under `data/readers` needs a case here: a small log, its expected events, and lines that must be refused.
"""

import gzip
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from distributed_mi.core import schema
from distributed_mi.core.errors import InputError
from distributed_mi.core.registry import choices, resolve
from distributed_mi.data.readers.base import EXTRA_EVENT_COLUMNS, ITEMS

LOCAL = pafs.LocalFileSystem()


@dataclass
class Case:
    """One format of one reader.

    Args:
        reader: registered name.
        config: its fields.
        events: file name -> bytes of good rows.
        expected: (user, item, milliseconds, rating or None) of those rows.
        bad: line -> reason, appended to the first file by the test of bad rows.
        items: file name -> bytes of metadata.
        titles: item id -> (title, categories) of that metadata.
        without_column: file name, bytes and column of a log that lacks it; None where the layout is fixed.
    """

    name: str
    reader: str
    events: dict[str, bytes]
    expected: list[tuple[str, str, int, float | None]]
    config: dict[str, Any] = field(default_factory=dict)
    bad: dict[bytes, str] = field(default_factory=dict)
    items: dict[str, bytes] = field(default_factory=dict)
    titles: dict[str, tuple[str | None, list[str] | None]] = field(default_factory=dict)
    bad_items: dict[bytes, str] = field(default_factory=dict)
    without_column: tuple[str, bytes, str] | None = None


def lines(*texts: Any) -> bytes:
    return b"".join(
        t.encode() + b"\n" if isinstance(t, str) else json.dumps(t).encode() + b"\n" for t in texts
    )


def parquet(**columns: Any) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer, row_group_size=2)
    return buffer.getvalue().to_pybytes()


def review(user: Any = "u1", item: Any = "a", time: Any = 10, rating: Any = 5.0) -> dict[str, Any]:
    return {"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": rating, "reviewText": "fine"}


EXPECTED = [("u1", "a", 10_000, None), ("u1", "b", 20_000, None), ("u2", "a", 30_000, None)]
RATED = [(u, i, t, r) for (u, i, t, _), r in zip(EXPECTED, (5.0, 4.0, 3.5), strict=True)]
BAD_JSON = {
    b'{"user": "u1", "item": ': "malformed line",
    b"[1, 2]": "malformed line",
    b'{"user": "u1", "item": "a", "timestamp": NaN}': "NaN timestamp",
    b'{"user": "u1", "item": "a", "timestamp": -5}': "negative timestamp",
    b'{"user": "u1", "item": "a", "timestamp": true}': "wrong type: timestamp",
    b'{"user": "u1", "item": "a", "timestamp": "noon"}': "wrong type: timestamp",
    b'{"user": "u1", "item": "a"}': "empty timestamp",
    b'{"user": "", "item": "a", "timestamp": 5}': "empty user id",
    b'{"user": "u1", "item": null, "timestamp": 5}': "empty item id",
    b'{"user": ["u1"], "item": "a", "timestamp": 5}': "wrong type: user",
    b'{"user": NaN, "item": "a", "timestamp": 5}': "wrong type: user",
    b'{"user": "u1", "item": 7.0, "timestamp": 5}': "wrong type: item",
    b'{"user": "\\ud800", "item": "a", "timestamp": 5}': "invalid UTF-8",
    b'{"user": "\xff", "item": "a", "timestamp": 5}': "invalid UTF-8",
    b'{"user": ' + b"[" * 100_000: "malformed line",
}
MOVIE_LINE_REASONS = {
    "1{d}2{d}3": "malformed line",
    "1{d}2{d}3{d}4{d}5": "malformed line",
    "{d}2{d}3{d}4": "empty user id",
    "1{d} {d}3{d}4": "empty item id",
    "1{d}2{d}3{d}nan": "NaN timestamp",
    "1{d}2{d}3{d}-4": "negative timestamp",
    "1{d}2{d}good{d}4": "wrong type: rating",
}


def movielens_bad(delimiter: str) -> dict[bytes, str]:
    bad = {text.replace("{d}", delimiter).encode(): reason for text, reason in MOVIE_LINE_REASONS.items()}
    return {**bad, f"\xff{delimiter}2{delimiter}3{delimiter}4".encode("latin-1"): "invalid UTF-8"}


MOVIES = [("196", "242", 881250949000, 3.0), ("186", "302", 891717742000, 4.0)]
U_ITEM = (
    "1|Toy Story (1995)|01-Jan-1995||http://x|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "2|Misérables, Les (1995)|01-Jan-1995||http://x|0|0|0|0|0|0|0|0|1|0|0|0|1|0|0|0|0|0|0\n"
).encode("latin-1")

CASES = [
    Case(
        "table-csv",
        "table",
        {"log.csv": b'user,extra,item,timestamp\nu1,x,a,10\n"u1","x, y",b,20\r\n\nu2,,a,30\n'},
        EXPECTED,
        bad={
            b"u1,x,a": "malformed line",
            b'"u1,x,a,4': "malformed line",
            b'u1,"x"y,a,4': "malformed line",
            b"u1,x,a,": "empty timestamp",
            b"u1,x,a,4.5.6": "wrong type: timestamp",
            b",x,a,4": "empty user id",
            b"u1,x,a,nan": "NaN timestamp",
            b"u1,x,a,-4": "negative timestamp",
            b"u\xff,x,a,4": "invalid UTF-8",
            b"u1,x,a,1318896000000": "timestamp after the year 3000 (wrong timestamp_unit?)",
        },
        items={"meta.csv": b'item,title,categories\na," Soap, bar ",Bath|Soap\nb,,\n'},
        titles={"a": ("Soap, bar", ["Bath", "Soap"]), "b": (None, [])},
        bad_items={b",Nameless,x": "empty item id", b"c,\xe9,": "invalid UTF-8"},
        without_column=("log.csv", b"user,thing,timestamp\nu1,a,1\n", "item"),
    ),
    Case(
        "table-jsonl",
        "table",
        {
            "1.jsonl": lines(
                {"user": "u1", "item": "a", "timestamp": 10, "stars": 5},
                {"user": "u1", "item": "b", "timestamp": 20.0, "stars": "4"},
            ),
            "2.jsonl": lines(
                {"user": "u2", "item": "a", "timestamp": "30", "stars": 3.5},
                {"user": 12, "item": -7, "timestamp": 40, "stars": 1},
            ),
        },
        [*RATED, ("12", "-7", 40_000, 1.0)],
        config={"rating": "stars"},
        bad=BAD_JSON,
        items={
            "meta.jsonl": lines(
                {"item": "a", "title": "Soap", "categories": ["Bath"]}, {"item": 7, "title": float("nan")}
            )
        },
        titles={"a": ("Soap", ["Bath"]), "7": (None, None)},
        bad_items={
            b'{"title": "Nameless"}': "empty item id",
            b'{"item": "x", "title": {}}': "wrong type: title",
            b'{"item": NaN, "title": "Soap"}': "wrong type: item",
        },
        without_column=("log.jsonl", lines({"user": "u", "item": "i", "time": 5}), "timestamp"),
    ),
    Case(
        "table-parquet",
        "table",
        {
            "log.parquet": parquet(
                who=["u1", "u1", "u2", "", "u3", "u4"],
                what=[1, 2, 1, 1, None, 1],
                when=[10.0, 20.0, 30.0, 5.0, 5.0, float("nan")],
            )
        },
        [("u1", "1", 10_000, None), ("u1", "2", 20_000, None), ("u2", "1", 30_000, None)],
        config={"user": "who", "item": "what", "timestamp": "when"},
        items={
            "items.parquet": parquet(
                what=[1, 2, None], title=["Soap", None, "x"], categories=[["Bath"], None, []]
            )
        },
        titles={"1": ("Soap", ["Bath"]), "2": (None, None)},
        without_column=("log.parquet", parquet(who=["u"], when=[1]), "what"),
    ),
    Case(
        "amazon",
        "amazon_reviews",
        {"reviews.json": lines(review(), review(item="b", time=20, rating=4), review("u2", "a", 30, 3.5))},
        RATED,
        bad={
            b'{"reviewerID": "u1"': "malformed line",
            lines(review(user="")).strip(): "empty user id",
            lines(review(time=float("nan"))).strip(): "NaN timestamp",
            lines(review(item=float("nan"))).strip(): "wrong type: item",
            lines(review(rating="many")).strip(): "wrong type: rating",
            b'{"asin": "\xc3\x28"}': "invalid UTF-8",
        },
        items={
            "meta.json": lines(
                {
                    "asin": "a",
                    "title": "Salt &amp; Pepper",
                    "category": ["Food", "Food", "Spices"],
                    "brand": "",
                },
                "{'asin': 'b', 'title': \"Bob's\", 'categories': [['Food', 'Tea'], ['Home']], 'rank': {'Food': 3}}",
                {"asin": "c"},
            )
        },
        titles={
            "a": ("Salt & Pepper", ["Food", "Spices"]),
            "b": ("Bob's", ["Food", "Tea", "Home"]),
            "c": (None, None),
        },
        bad_items={
            b"{'asin': __import__('os').getcwd()}": "malformed line",
            b"{'asin': 'x', 'title'": "malformed line",
            b'{"title": "Nameless"}': "empty item id",
        },
        without_column=("reviews.json", lines({"user": "u", "asin": "a", "unixReviewTime": 1}), "reviewerID"),
    ),
    Case(
        "movielens-100k",
        "movielens",
        {"u.data": b"196\t242\t3\t881250949\n186\t302\t4\t891717742\n"},
        MOVIES,
        bad=movielens_bad("\t"),
        items={"u.item": U_ITEM},
        titles={
            "1": ("Toy Story (1995)", ["Animation", "Children's", "Comedy"]),
            "2": ("Misérables, Les (1995)", ["Drama", "Musical"]),
        },
        bad_items={b"3|Four Rooms": "malformed line"},
    ),
    Case(
        "movielens-1m",
        "movielens",
        {"ratings.dat": b"196::242::3::881250949\n186::302::4::891717742\n"},
        MOVIES,
        bad=movielens_bad("::"),
        items={"movies.dat": "1::Misérables: Les (1995)::Drama|Musical\n".encode("latin-1")},
        titles={"1": ("Misérables: Les (1995)", ["Drama", "Musical"])},
        bad_items={b"::Nameless::Drama": "empty item id"},
    ),
    Case(
        "movielens-20m",
        "movielens",
        {"ratings.csv": b"userId,movieId,rating,timestamp\n196,242,3.0,881250949\n186,302,4.0,891717742\n"},
        MOVIES,
        bad=movielens_bad(","),
        items={
            "movies.csv": b'movieId,title,genres\n1,"President, The (1995)",Comedy|Drama\n2,B,(no genres listed)\n'
        },
        titles={"1": ("President, The (1995)", ["Comedy", "Drama"]), "2": ("B", [])},
    ),
]
BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
SYNTHETIC = {"num_users": 30, "num_items": 40, "num_topics": 8}


def make_reader(name: str, config: dict[str, Any]) -> Any:
    owner = resolve("reader", name)
    return owner(owner.Config(**config))


def write(folder: Path, files: dict[str, bytes]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return sorted(str(folder / name) for name in files)


def read(reader: Any, paths: list[str], what: str = "interactions") -> tuple[pa.Table, pa.Table]:
    parsed = [p for task in reader.plan(LOCAL, paths, what) for p in reader.read(task, what)]
    empty = schema.empty("events") if what == "interactions" else ITEMS.empty_table()
    rows = pa.concat_tables([p.rows for p in parsed]) if parsed else empty
    return rows, pa.concat_tables([p.rejected for p in parsed] or [schema.empty("rejected")])


def as_tuples(events: pa.Table) -> list[tuple[str, str, int, float | None]]:
    ratings = events["rating"].to_pylist() if "rating" in events.column_names else [None] * events.num_rows
    columns = [events[c].to_pylist() for c in ("user_id", "item_id", "timestamp")]
    return list(zip(*columns, ratings, strict=True))


def test_every_reader_has_a_case() -> None:
    assert {case.reader for case in CASES} | {"synthetic"} == set(choices("reader"))


@BY_NAME
def test_good_rows_become_events(case: Case, tmp_path: Path) -> None:
    events, _ = read(make_reader(case.reader, case.config), write(tmp_path, case.events))
    assert as_tuples(events) == case.expected


@BY_NAME
def test_columns_are_the_declared_ones(case: Case, tmp_path: Path) -> None:
    reader = make_reader(case.reader, case.config)
    events, rejected = read(reader, write(tmp_path, case.events))
    allowed = {f.name: f.type for f in [*schema.TABLES["events"], *EXTRA_EVENT_COLUMNS]}
    assert set(schema.TABLES["events"].names) <= set(events.column_names)
    assert {f.name: f.type for f in events.schema}.items() <= allowed.items()
    assert rejected.schema == schema.TABLES["rejected"]
    items, rejected = read(reader, write(tmp_path / "items", case.items), "items")
    assert items.schema == ITEMS
    assert rejected.schema == schema.TABLES["rejected"]


@BY_NAME
def test_reading_again_gives_the_same_also_from_a_copy_of_reader_and_task(case: Case, tmp_path: Path) -> None:
    reader, paths = make_reader(case.reader, case.config), write(tmp_path, case.events)
    once = read(reader, paths)
    assert read(pickle.loads(pickle.dumps(reader)), paths) == once
    tasks = pickle.loads(pickle.dumps(reader.plan(LOCAL, paths, "interactions")))
    again = pa.concat_tables([p.rows for t in tasks for p in reader.read(t, "interactions")])
    assert again == once[0]


@BY_NAME
def test_source_order_grows_and_no_row_shares_it(case: Case, tmp_path: Path) -> None:
    events, _ = read(make_reader(case.reader, case.config), write(tmp_path, case.events))
    order = events["source_order"].to_pylist()
    assert order == sorted(set(order))


@pytest.mark.parametrize("case", [c for c in CASES if c.bad], ids=lambda c: c.name)
def test_bad_rows_are_refused_with_reason_and_line_and_cost_nothing_else(case: Case, tmp_path: Path) -> None:
    first = min(case.events)
    good = case.events[first]
    files = {
        **case.events,
        first: good + b"".join(line + b"\n" for line in case.bad) + good.splitlines()[-1] + b"\n",
    }
    events, rejected = read(make_reader(case.reader, case.config), write(tmp_path, files))
    found = rejected.to_pylist()
    assert [r["reason"] for r in found] == list(case.bad.values())
    begin = good.count(b"\n") + 1
    assert [r["row"] for r in found] == list(range(begin, begin + len(case.bad)))
    assert {r["source"] for r in found} == {first}
    assert all(len(r["content"].encode()) <= 1024 for r in found)
    assert [r["content"][:5] for r in found] == [line.decode("utf-8", "replace")[:5] for line in case.bad]
    assert events.num_rows == len(case.expected) + 1  # the good line behind the bad ones is read


def test_bad_rows_of_parquet_are_refused_with_their_content(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "table-parquet")
    _, rejected = read(make_reader(case.reader, case.config), write(tmp_path, case.events))
    assert [(r["row"], r["reason"]) for r in rejected.to_pylist()] == [
        (4, "empty user id"),
        (5, "empty item id"),
        (6, "NaN timestamp"),
    ]
    assert json.loads(rejected["content"][0].as_py()) == {"who": "", "what": 1, "when": 5.0}


def test_invalid_utf8_in_parquet_is_refused_row_by_row(tmp_path: Path) -> None:
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    users = pa.StringArray.from_buffers(3, offsets, data)
    pq.write_table(
        pa.table({"user": users, "item": ["i"] * 3, "timestamp": [1, 2, 3]}), tmp_path / "x.parquet"
    )
    events, rejected = read(make_reader("table", {}), [str(tmp_path / "x.parquet")])
    assert events["user_id"].to_pylist() == ["a", "b"]
    assert [(r["row"], r["reason"]) for r in rejected.to_pylist()] == [(2, "invalid UTF-8")]


@BY_NAME
def test_metadata_keeps_items_without_title(case: Case, tmp_path: Path) -> None:
    items, _ = read(make_reader(case.reader, case.config), write(tmp_path, case.items), "items")
    assert {r["item_id"]: (r["title"], r["categories"]) for r in items.to_pylist()} == case.titles


@pytest.mark.parametrize("case", [c for c in CASES if c.bad_items], ids=lambda c: c.name)
def test_bad_metadata_is_refused_with_a_reason(case: Case, tmp_path: Path) -> None:
    ((name, good),) = case.items.items()
    files = {name: good + b"".join(line + b"\n" for line in case.bad_items)}
    items, rejected = read(make_reader(case.reader, case.config), write(tmp_path, files), "items")
    assert rejected["reason"].to_pylist() == list(case.bad_items.values())
    assert items.num_rows == len(case.titles)


@pytest.mark.parametrize("case", [c for c in CASES if "parquet" not in c.name], ids=lambda c: c.name)
def test_gzip_gives_the_same_and_its_early_end_costs_one_rejected_row(case: Case, tmp_path: Path) -> None:
    reader = make_reader(case.reader, case.config)
    packed = {f"{name}.gz": gzip.compress(data) for name, data in case.events.items()}
    events, rejected = read(reader, write(tmp_path, packed))
    assert (as_tuples(events), rejected.num_rows) == (case.expected, 0)
    last = max(packed)
    cut = {**packed, last: packed[last][:-9]}  # the checksum is lost, and a byte before it
    events, rejected = read(reader, write(tmp_path, cut))
    assert rejected["reason"].to_pylist() == ["truncated"]
    assert len(case.expected) - 1 <= events.num_rows <= len(case.expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.without_column], ids=lambda c: c.name)
def test_a_missing_column_is_named_with_its_file(case: Case, tmp_path: Path) -> None:
    assert case.without_column is not None
    name, data, column = case.without_column
    with pytest.raises(InputError, match=rf"{name}: no column {column}; it has "):
        read(make_reader(case.reader, case.config), write(tmp_path, {name: data}))


@pytest.mark.parametrize(
    "case", [c for c in CASES if "csv" not in c.name and "parquet" not in c.name], ids=lambda c: c.name
)
def test_an_empty_file_holds_no_rows(case: Case, tmp_path: Path) -> None:
    paths = write(tmp_path, dict.fromkeys(case.events, b""))
    events, rejected = read(make_reader(case.reader, case.config), paths)
    assert (events.num_rows, rejected.num_rows) == (0, 0)


def test_files_that_are_not_what_they_are_called_are_named(tmp_path: Path) -> None:
    reader = make_reader("table", {})
    for name, data, message in [
        ("log.parquet", b"not parquet", "log.parquet is not a Parquet file"),
        ("log.csv", b"", "log.csv is empty"),
        ("log.xyz", b"", r"log.xyz: cannot tell the format.*data\.reader\.format"),
        (
            "ids.parquet",
            parquet(user=[1.5], item=["a"], timestamp=[1]),
            "ids must be strings or whole numbers",
        ),
        ("time.parquet", parquet(user=["u"], item=["a"], timestamp=[True]), "timestamp is bool"),
    ]:
        with pytest.raises(InputError, match=message):
            read(reader, write(tmp_path, {name: data}))


def test_movielens_leaves_other_files_of_a_folder_alone(tmp_path: Path) -> None:
    reader = make_reader("movielens", {})
    paths = write(tmp_path, {"u.data": CASES[4].events["u.data"], "u.user": b"1|24|M", "README": b"hello"})
    assert as_tuples(read(reader, paths)[0]) == MOVIES
    with pytest.raises(InputError, match=r"no movies\.dat or movies\.csv or u\.item for data\.items"):
        read(reader, paths, "items")


def test_parquet_is_cut_at_row_groups_and_rows_keep_their_numbers(tmp_path: Path, monkeypatch: Any) -> None:
    from distributed_mi.data.readers import table

    case = next(c for c in CASES if c.name == "table-parquet")
    reader, paths = make_reader(case.reader, case.config), write(tmp_path, case.events)
    whole = read(reader, paths)
    monkeypatch.setattr(table, "_TASK_BYTES", 1)
    assert [(t.start, t.stop, t.first_row) for t in reader.plan(LOCAL, paths, "interactions")] == [
        (0, 1, 1),
        (1, 2, 3),
        (2, 3, 5),
    ]
    assert read(reader, paths) == whole


def test_position_is_passed_on(tmp_path: Path) -> None:
    data = b"user,item,timestamp,place\nu,a,1,4\nu,b,1,3\n"
    reader = make_reader("table", {"position": "place", "timestamp_unit": "ms"})
    events, _ = read(reader, write(tmp_path, {"log.csv": data}))
    assert events["position"].to_pylist() == [4, 3]
    assert events["timestamp"].to_pylist() == [1, 1]


def test_synthetic_needs_no_files_and_keeps_the_contract() -> None:
    reader = make_reader("synthetic", SYNTHETIC)
    events, rejected = read(reader, [])
    items, _ = read(reader, [], "items")
    assert events.schema == schema.TABLES["events"]
    assert items.schema == ITEMS
    assert rejected.num_rows == 0
    assert read(pickle.loads(pickle.dumps(reader)), []) == (events, rejected)
    assert set(events["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())
    assert None not in items["title"].to_pylist()
    order = events["source_order"].to_pylist()
    assert order == sorted(set(order))


@pytest.mark.parametrize(
    ("reader", "interactions", "items", "num_events", "num_items"),
    [
        ("movielens", "ml-100k/u.data", "ml-100k/u.item", 100_000, 1_682),
        (
            "amazon_reviews",
            "amazon-2018-gift-cards/Gift_Cards_5.json.gz",
            "amazon-2018-gift-cards/meta_Gift_Cards.json.gz",
            2_972,
            1_547,
        ),
    ],
)
def test_raw_files_as_published(
    dmi_data: Path, reader: str, interactions: str, items: str, num_events: int, num_items: int
) -> None:
    made = make_reader(reader, {})
    events, rejected = read(made, [str(dmi_data / "raw" / interactions)])
    assert (events.num_rows, rejected.num_rows) == (num_events, 0)
    metadata, rejected = read(made, [str(dmi_data / "raw" / items)], "items")
    assert (metadata.num_rows, rejected.num_rows) == (num_items, 0)
    assert metadata["title"].null_count < 0.05 * num_items


def test_raw_movies_of_the_million_set_parse(dmi_data: Path) -> None:
    items, rejected = read(make_reader("movielens", {}), [str(dmi_data / "raw/ml-1m/movies.dat")], "items")
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    assert (items.num_rows, rejected.num_rows) == (3_883, 0)
    assert titles["1"] == "Toy Story (1995)"
    assert titles["73"] == "Misérables, Les (1995)"
