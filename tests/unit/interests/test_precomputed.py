"""Answers from files: what can be read, what is set aside, what is refused, and whose ids are meant."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_mi.core.config import content_hash
from distributed_mi.core.errors import InputError
from distributed_mi.interests.backends.base import BackendContext, Request, Response
from distributed_mi.interests.backends.precomputed import PrecomputedBackend
from distributed_mi.interests.config import InterestsConfig
from distributed_mi.interests.history import Exemplar, HistoryItem, build_exemplar
from distributed_mi.interests.parse import ParsedAnswer, parse_answer
from distributed_mi.interests.source import Source
from distributed_mi.interests.stage import run
from tests.unit.interests.fakes import encode, make_workspace, no_ray

ITEMS = tuple(HistoryItem(i, f"title {i}", item_id=f"B{i}") for i in (1, 2, 3, 4))

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows (or, for JSON, any value) to a file and returns its path."""

    def write(rows: Any, name: str = "answers.jsonl") -> str:
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
            return str(path)
        text = json.dumps(rows) if ".json" in name and ".jsonl" not in name else lines(rows)
        data = text.encode("utf-8", "surrogatepass")
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write


def lines(rows: list[Any]) -> str:
    """JSON lines; a row that is a string stands as it is."""
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


def backend(path: str, **settings: Any) -> PrecomputedBackend:
    return PrecomputedBackend(PrecomputedBackend.Config(path=path, **settings), BackendContext({}, 20, 400))


def answer(made: PrecomputedBackend, user: str = "U1", user_index: int = 5) -> Response:
    return made.generate([Request(Exemplar(user_index, ITEMS, user), "unused", 10)])[0]


def interests(made: PrecomputedBackend, user: str = "U1") -> list[tuple[str, tuple[int, ...]]]:
    """(text, item_index of the support) as the stage reads them."""
    response = answer(made, user)
    assert response.error is None
    parsed = parse_answer(
        response.text, [i.item_index for i in ITEMS], max_interests=20, max_interest_chars=400
    )
    assert isinstance(parsed, ParsedAnswer)
    return [(i.text, i.item_indices) for i in parsed.interests]


# Forms.

FORMS: list[tuple[Any, list[tuple[str, tuple[int, ...]]]]] = [
    ({"interests": ["jazz", "noir"]}, [("jazz", ()), ("noir", ())]),
    (
        {"interests": [{"text": "jazz", "item_ids": ["B2", "B1"]}, {"text": "noir"}, "opera"]},
        [("jazz", (2, 1)), ("noir", ()), ("opera", ())],
    ),
    ({"interests": {"interests": ["jazz"]}}, [("jazz", ())]),
    ({"text": "1. jazz\n2. noir"}, [("jazz", ()), ("noir", ())]),
    ({"text": '```json\n{"interests": [{"text": "jazz", "item_ids": [3]}]}\n```'}, [("jazz", (3,))]),
    ({"interests": [], "text": "- jazz\n- noir"}, [("jazz", ()), ("noir", ())]),
    ({"interests": None, "text": "- jazz\n- noir"}, [("jazz", ()), ("noir", ())]),
    ({"interests": []}, []),
    ({"interests": ["jazz", " "]}, [("jazz", ())]),
]


@pytest.mark.parametrize(("fields", "expected"), FORMS, ids=lambda v: json.dumps(v)[:60])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_forms_of_an_answer_in_json(write: Write, name: str, fields: Any, expected: Any) -> None:
    assert interests(backend(write([{"user_id": "U1", **fields}], name))) == expected


PARQUET = [f for f in FORMS if not (isinstance(f[0].get("interests"), list) and "opera" in f[0]["interests"])]


@pytest.mark.parametrize(("fields", "expected"), PARQUET, ids=lambda v: json.dumps(v)[:60])
def test_forms_of_an_answer_in_parquet(write: Write, fields: Any, expected: Any) -> None:
    assert interests(backend(write([{"user_id": "U1", **fields}], "a.parquet"))) == expected


def test_a_json_object_may_map_users_to_answers(write: Write) -> None:
    made = backend(
        write({"U1": ["jazz"], "U2": "1. noir\n2. opera", "U3": {"interests": ["folk"]}}, "a.json")
    )
    assert interests(made) == [("jazz", ())]
    assert interests(made, "U2") == [("noir", ()), ("opera", ())]
    assert interests(made, "U3") == [("folk", ())]


def test_fields_may_have_other_names_and_lie_deeper(write: Write) -> None:
    row = {"who": {"id": "U1"}, "output": {"message": {"content": "1. jazz\n2. noir"}}, "a.b": "x"}
    for name in ("a.jsonl", "a.parquet"):
        made = backend(write([row], name), user_field="who.id", answer_field="output.message.content")
        assert interests(made) == [("jazz", ()), ("noir", ())]
    dotted = backend(write([{"a.b": "U1", "text": "1. jazz\n2. noir"}]), user_field="a.b")
    assert interests(dotted) == [("jazz", ()), ("noir", ())]


@pytest.mark.parametrize("value", [7, 7.0, "7"])
def test_a_number_is_the_same_user_as_its_digits(write: Write, value: Any) -> None:
    assert interests(backend(write([{"user_id": value, "interests": ["jazz"]}])), "7") == [("jazz", ())]


def test_users_of_parquet_with_gaps_are_still_whole_numbers(write: Write) -> None:
    path = write([{"user_id": 7.0, "text": "- a\n- b"}, {"user_id": None, "text": "- a"}], "a.parquet")
    assert interests(backend(path), "7") == [("a", ()), ("b", ())]


def test_several_files_are_read_as_one(write: Write, tmp_path: Path) -> None:
    write([{"user_id": "U1", "interests": ["jazz"]}], "part-0.jsonl")
    write([{"user_id": "U2", "interests": ["noir"]}], "part-1.parquet")
    for path in (str(tmp_path), f"{tmp_path}/part-*"):
        made = backend(path)
        assert interests(made, "U1") + interests(made, "U2") == [("jazz", ()), ("noir", ())]


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"user_id": "U1", "interests": ["jazz"]}\n\n  \n')
    assert interests(backend(str(path))) == [("jazz", ())]


def test_half_a_surrogate_pair_can_be_stored(write: Write) -> None:
    for row in ({"interests": ["a\ud800b"]}, {"text": "a\ud800b"}):
        assert "a?b" in answer(backend(write([{"user_id": "U1", **row}]))).text.encode().decode()


def test_one_row_for_each_interest(write: Write) -> None:
    rows = [
        {"user_id": "U1", "text": "jazz", "items": ["B1"]},
        {"user_id": "U2", "text": "folk", "items": []},
        {"user_id": "U1", "text": "noir", "items": ["B3", "B2"]},
        {"user_id": "U1", "text": "jazz", "items": ["B4"]},
    ]
    made = backend(write(rows, "a.parquet"), rows="interest", items_field="items")
    assert interests(made) == [("jazz", (1, 4)), ("noir", (3, 2))]
    assert interests(made, "U2") == [("folk", ())]


def test_where_chooses_among_several_answers(write: Write) -> None:
    rows = [
        {"user_id": "U1", "source": "a", "round": 1, "interests": ["jazz"]},
        {"user_id": "U1", "source": "b", "round": 1, "interests": ["noir"]},
        {"user_id": "U1", "source": "b", "round": 2, "interests": ["folk"]},
    ]
    for name in ("a.jsonl", "a.parquet"):
        made = backend(write(rows, name), where={"source": "b", "round": 2})
        assert interests(made) == [("folk", ())]


# Ids.


@pytest.mark.parametrize(
    ("key", "ids", "expected"),
    [
        ("item_id", ["B4", "B1"], (4, 1)),
        ("item_index", [4, "1", 2.0], (4, 1, 2)),
        ("title", ["title 4", "title 1"], (4, 1)),
    ],
)
def test_ids_are_read_as_configured(
    write: Write, key: str, ids: list[Any], expected: tuple[int, ...]
) -> None:
    path = write([{"user_id": "U1", "interests": [{"text": "jazz", "item_ids": ids}]}])
    assert interests(backend(path, item_key=key)) == [("jazz", expected)]


def test_an_outside_id_is_not_taken_for_a_number_of_the_workspace(write: Write) -> None:
    """Outside ids are often small numbers too; item 2 of the file is not item 2 of this workspace."""
    path = write([{"user_id": "U1", "interests": [{"text": "jazz", "item_ids": [2, "B3", "B99"]}]}])
    parsed = parse_answer(answer(backend(path)).text, [1, 2, 3, 4], max_interests=20, max_interest_chars=400)
    assert isinstance(parsed, ParsedAnswer)
    assert parsed.interests[0].item_indices == (3,)
    assert parsed.refused_ids == 2


def test_items_may_stand_beside_the_interests(write: Write) -> None:
    row = {"user_id": "U1", "interests": ["jazz", "noir"], "why": [["title 2"], ["title 4", "title 1"]]}
    for name in ("a.jsonl", "a.parquet"):
        made = backend(write([row], name), items_field="why", item_key="title")
        assert interests(made) == [("jazz", (2,)), ("noir", (4, 1))]
    without = backend(write([{**row, "why": []}]), items_field="why", item_key="title")
    assert interests(without) == [("jazz", ()), ("noir", ())]


# What is set aside.

BAD = [
    ("{not json", "no JSON"),
    ("[1, 2]", "no JSON object"),
    ({"interests": ["jazz"]}, "no user id"),
    ({"user_id": None, "interests": ["jazz"]}, "no user id"),
    ({"user_id": "", "interests": ["jazz"]}, "no user id"),
    ({"user_id": True, "interests": ["jazz"]}, "no user id"),
    ({"user_id": 1.5, "interests": ["jazz"]}, "no user id"),
    ({"user_id": "U2"}, "no answer in 'interests' or 'text'"),
    ({"user_id": "U2", "text": "  "}, "a text is expected"),
    ({"user_id": "U2", "interests": 7}, "a text or a list of interests, not 7"),
    ({"user_id": "U2", "interests": {"1": "jazz"}}, "a text or a list of interests"),
    ({"user_id": "U2", "interests": [7]}, "a text is expected, not 7"),
    ({"user_id": "U2", "interests": [{"name": "jazz"}]}, "a text is expected, not None"),
    ({"user_id": "U2", "interests": [{"text": "jazz", "item_ids": "B1"}]}, "item ids"),
    ({"user_id": "U2", "interests": [{"text": "jazz", "item_ids": [None]}]}, "item ids"),
    ("[" * 100_000, "no JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_a_bad_row_is_set_aside_with_file_number_and_reason(
    write: Write, caplog: pytest.LogCaptureFixture, row: Any, reason: str
) -> None:
    path = write([{"user_id": "U1", "interests": ["jazz"]}, row])
    made = backend(path)
    assert interests(made) == [("jazz", ())]
    assert answer(made, "U2").error is not None
    first, total = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert first.startswith(f"set aside: {path}, row 2: ")
    assert reason in first
    assert len(first) < len(path) + 200
    assert total == f"{path}: 1 of 2 rows set aside"


def test_many_bad_rows_are_counted_and_not_all_named(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write([{"user_id": "U1", "interests": ["jazz"]}, *["{"] * 500])
    backend(path)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 11
    assert warned[-1] == f"{path}: 500 of 501 rows set aside"


def test_items_that_do_not_go_with_the_interests_set_the_row_aside(write: Write) -> None:
    row = {"user_id": "U1", "interests": ["jazz", "noir"], "why": [["B1"]]}
    with pytest.raises(InputError, match="'why' is not one list for each of 2 interests"):
        backend(write([row]), items_field="why")


# What is refused.


def test_a_missing_file_is_named_also_before_it_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "none.jsonl")
    for read in (backend, lambda p: PrecomputedBackend.fingerprint(PrecomputedBackend.Config(path=p))):
        with pytest.raises(InputError, match=r"interests\.backend\.path: no such file: .*none\.jsonl"):
            read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=name):
        backend(str(tmp_path / name))


@pytest.mark.parametrize("value", [[], {}])
def test_a_file_without_rows_is_refused(write: Write, value: Any) -> None:
    with pytest.raises(InputError, match=r"a\.json holds no rows"):
        backend(write(value, "a.json"))


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_broken_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08 broken \x00\xff" * 20)
    with pytest.raises(InputError, match=name):
        backend(str(tmp_path / name))


def test_an_unknown_format_is_refused_and_the_known_ones_are_named(write: Write) -> None:
    with pytest.raises(InputError, match=r"a\.csv: .* \.parquet, \.jsonl, \.ndjson, \.json"):
        backend(write([], "a.csv"))


@pytest.mark.parametrize(
    ("settings", "column"),
    [
        ({}, "'user_id' (interests.backend.user_field)"),
        ({"user_field": "user"}, "'interests' or 'text'"),
        ({"user_field": "user", "answer_field": "out.text"}, "'out' (interests.backend.answer_field)"),
        ({"user_field": "user", "answer_field": "said", "items_field": "i"}, "'i' (interests.backend.items_"),
        ({"user_field": "user", "answer_field": "said", "where": {"s": 1}}, "'s' (interests.backend.where)"),
    ],
    ids=str,
)
def test_a_missing_column_is_named_with_those_there_are(
    write: Write, settings: dict[str, Any], column: str
) -> None:
    path = write([{"user": "U1", "said": "jazz"}], "a.parquet")
    with pytest.raises(InputError) as caught:
        backend(path, **settings)
    for text in (path, column, "user, said"):
        assert text in str(caught.value)


def test_json_in_which_no_row_can_be_used_is_refused(write: Write) -> None:
    path = write([{"user": "U1", "interests": ["jazz"]}] * 3)
    with pytest.raises(InputError) as caught:
        backend(path)
    for text in (f"{path}: none of 3 rows", f"{path}, row 1", "'user_id'", "user, interests", "user_field"):
        assert text in str(caught.value)


def test_a_condition_that_no_row_meets_is_refused(write: Write) -> None:
    with pytest.raises(InputError, match=r"none of 1 rows has the values of .*where = \{'source': 'x'\}"):
        backend(write([{"user_id": "U1", "text": "a", "source": "y"}]), where={"source": "x"})


def test_two_different_answers_of_a_user_are_refused(write: Write) -> None:
    rows = [{"user_id": "U1", "interests": ["jazz"]}] * 2
    assert interests(backend(write(rows))) == [("jazz", ())]
    path = write([*rows, {"user_id": "U1", "interests": ["noir"]}])
    with pytest.raises(InputError, match=r"row 3: user_id 'U1' has another answer than in row 1\. .*where"):
        backend(path)


def test_two_different_answers_in_two_files_name_both(write: Write, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write([{"user_id": "U1", "interests": [name]}], name)
    with pytest.raises(InputError, match=r"b\.jsonl, row 1: .* than in row 1 of .*a\.jsonl"):
        backend(str(tmp_path))


# Users and identity.


def test_a_user_without_an_answer_gets_an_error_that_shows_what_ids_look_like(write: Write) -> None:
    path = write([{"user_id": "U1", "interests": ["jazz"]}])
    made = backend(path)
    found = made.generate([Request(Exemplar(i, ITEMS, u), "", 10) for i, u in enumerate(("1", "U1", ""))])
    assert [r.user_index for r in found] == [0, 1, 2]
    assert [r.error is None for r in found] == [False, True, False]
    assert found[0].finish_reason == "error"
    assert found[0].error == f"user '1' is not in {path}, which holds 1 users such as 'U1'"


def test_the_model_is_named_after_the_file_or_as_configured() -> None:
    config = PrecomputedBackend.Config
    assert PrecomputedBackend.model_of(config(path="/a/b/gpt4.jsonl")) == "gpt4.jsonl"
    assert PrecomputedBackend.model_of(config(path="s3://bucket/x/")) == "x"
    assert PrecomputedBackend.model_of(config(path="/a/b.jsonl", model="gpt-4")) == "gpt-4"


def test_a_changed_file_is_another_identity_and_a_moved_one_is_not(write: Write, tmp_path: Path) -> None:
    def identity(path: str, **settings: Any) -> str:
        return content_hash(PrecomputedBackend.identity_of(PrecomputedBackend.Config(path=path, **settings)))

    path = Path(write([{"user_id": "U1", "interests": ["jazz"]}]))
    before = identity(str(path))
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / path.name)
    assert identity(str(moved)) == before
    assert identity(str(moved), item_key="title") != before
    moved.write_text(moved.read_text() + "\n")
    assert identity(str(moved)) != before


def test_outside_ids_come_from_the_workspace(tmp_path: Path) -> None:
    source = Source(make_workspace(tmp_path), 5)
    assert [source.exemplars[u].user_id for u in source.users] == [f"U{u}" for u in source.users]
    item = source.exemplars[source.users[0]].history[0]
    assert item.item_id == f"B{item.item_index:03d}"


def test_a_shorter_history_is_still_the_same_user() -> None:
    exemplar = build_exemplar(5, [1, 2, 1], {1: ITEMS[0], 2: ITEMS[1]}, 10, "U5")
    assert exemplar == Exemplar(5, (ITEMS[1], ITEMS[0]), "U5")
    assert exemplar.latest(1) == Exemplar(5, (ITEMS[0],), "U5")
    assert build_exemplar(5, [1], {1: ITEMS[0]}, 10).user_id == ""


# Real texts.


def test_real_interests_of_movielens_100k_are_read(dmi_data: Path) -> None:
    path = str(dmi_data / "llm-text-ml-100k" / "user_interests.parquet")
    made = backend(path, user_field="user", rows="interest")
    found = [interests(made, str(u)) for u in range(1, 944)]
    assert sum(map(len, found)) == pytest.approx(8_435, abs=20)  # a few texts stand twice for a user
    assert found[0][0][0].startswith("action-packed movies from the 90s")


@pytest.mark.parametrize(
    ("source", "users", "settings"),
    [
        ("lehengthu-like", 995, {}),
        ("lehengthu-taste", 995, {}),
        ("llm-user-profiles", 6_040, {"answer_field": "text", "rows": "interest"}),
        ("tears-gpt4_sum_length_400", 250, {"answer_field": "text", "rows": "interest"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_real_texts_of_movielens_1m_are_read(
    dmi_data: Path, source: str, users: int, settings: dict[str, Any]
) -> None:
    """The first two are lists of interests; the others are one paragraph for a user, which makes one interest."""
    path = str(dmi_data / "llm-text-ml-1m" / "user_texts.parquet")
    made = backend(path, user_field="user", where={"source": source}, **settings)
    ids = pq.read_table(path, filters=[("source", "=", source)])["user"].to_pylist()
    assert len(ids) == users
    read = [parse_answer(answer(made, u).text, [], max_interests=20, max_interest_chars=120) for u in ids]
    usable = [r for r in read if isinstance(r, ParsedAnswer) and r.interests]
    assert len(usable) >= 0.99 * users


def test_real_texts_of_several_sources_have_to_be_told_apart(dmi_data: Path) -> None:
    with pytest.raises(InputError, match=r"has another answer than in row 1\. .*where"):
        backend(str(dmi_data / "llm-text-ml-1m" / "user_texts.parquet"), user_field="user")


def test_evidence_of_real_texts_lies_in_the_histories(dmi_data: Path) -> None:
    """Users and items are the right ones: nearly all cited titles are found in the history of the same user.

    The rest are titles in the model's own spelling, "The Matrix (1999)" for "Matrix, The (1999)".
    """
    path = str(dmi_data / "llm-text-ml-1m" / "user_texts.parquet")
    made = backend(
        path,
        user_field="user",
        where={"source": "lehengthu-like"},
        items_field="evidence_titles",
        item_key="title",
    )
    titles = pq.read_table(dmi_data / "ml-1m" / "items.parquet", columns=["item", "title"]).to_pylist()
    items = {r["item"]: HistoryItem(int(r["item"]), r["title"], item_id=r["item"]) for r in titles}
    events = pq.read_table(dmi_data / "ml-1m" / "interactions.parquet", columns=["user", "item"])
    histories: dict[str, dict[str, None]] = {}
    for user, item in zip(events["user"].to_pylist(), events["item"].to_pylist(), strict=True):
        histories.setdefault(user, {})[item] = None
    supported = refused = 0
    for user in set(pq.read_table(path, filters=[("source", "=", "lehengthu-like")])["user"].to_pylist()):
        history = tuple(items[i] for i in histories[user])
        [response] = made.generate([Request(Exemplar(0, history, user), "", 10)])
        parsed = parse_answer(
            response.text, [i.item_index for i in history], max_interests=50, max_interest_chars=400
        )
        assert isinstance(parsed, ParsedAnswer)
        supported += sum(len(i.item_indices) for i in parsed.interests)
        refused += parsed.refused_ids
    assert supported > 40_000
    assert refused < 0.05 * supported


# The whole stage.


def test_the_stage_reads_its_answers_from_a_file(tmp_path: Path) -> None:
    """Users 0 and 40 have the same history, so the same prompt, and answers of their own; user 4 has none."""
    workspace = make_workspace(tmp_path / "w", num_users=50, history=1)
    source = Source(workspace, 50)
    assert source.exemplars[0].history == source.exemplars[40].history
    rows = [
        {"user_id": e.user_id, "interests": [{"text": f"of {u}", "item_ids": [e.history[0].item_id]}]}
        for u, e in source.exemplars.items()
        if u != 4
    ]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    config = InterestsConfig(
        backend={"name": "precomputed", "path": str(tmp_path / "a.jsonl")}, max_failed_fraction=0.05
    )
    manifest = run(config, workspace, encode=encode, start_ray=no_ray)
    assert manifest.stats["failed"] == 1
    assert manifest.stats["steps"]["first"] == 24
    stage = workspace.stage("interests")
    found = stage.read("interests", "interests").to_pylist()
    texts = {r["user_index"]: (r["text"], r["item_indices"]) for r in found if r["user_index"] != 4}
    assert texts == {u: (f"of {u}", [e.history[0].item_index]) for u, e in source.exemplars.items() if u != 4}
    answers = {r["user_index"]: r for r in stage.read("answers", "answers").to_pylist()}
    assert (answers[0]["backend"], answers[0]["model"]) == ("precomputed", "a.jsonl")
    assert answers[4]["backend"] == "keyphrase"
    [failure] = (tmp_path / "w" / "interests" / "failures.jsonl").read_text().splitlines()
    assert "user 'U4' is not in" in failure
