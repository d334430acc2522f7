"""The workspace: skip, resume, redo, atomic writes, inputs; on a local disk and on an object store behind fsspec."""

import dataclasses
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pytest

from distributed_mi.core import artifacts, schema
from distributed_mi.core.artifacts import Manifest, StageKey, StageRun, Workspace
from distributed_mi.core.errors import SchemaMismatchError, WorkspaceError

KEY = StageKey("prepare", {"events": "hash"}, {"seed": 1})
OTHER = dataclasses.replace(KEY, config={"seed": 2})


def vectors(*users: int) -> pa.Table:
    return pa.table(
        {"user_index": list(users), "vector": [[float(u)] for u in users]},
        schema=schema.TABLES["user_vectors"],
    )


@pytest.fixture(params=["local", "memory"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workspace]:
    """An empty workspace on each kind of file system."""
    if request.param == "local":
        yield Workspace(str(tmp_path / "ws"))
        return
    bucket = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("memory").mkdir(f"/{bucket}")
    yield Workspace(f"memory://{bucket}/ws")
    fsspec.filesystem("memory").rm(f"/{bucket}", recursive=True)


def complete(workspace: Workspace, key: StageKey, *users: int, **commit: Any) -> StageRun:
    run = workspace.stage(key.stage).open(key)
    run.fs.create_dir(run.root, recursive=True)
    run.write_table("user_vectors/part-0.parquet", vectors(*users), "user_vectors")
    run.commit(rows={"user_vectors": len(users)}, **commit)
    return run


def names(workspace: Workspace, stage: str = "prepare") -> set[str]:
    selector = pafs.FileSelector(f"{workspace.root}/{stage}", recursive=False)
    return {i.base_name for i in workspace.fs.get_file_info(selector)}


def test_nothing_is_complete_at_first(workspace: Workspace) -> None:
    stage = workspace.stage("train/remi")
    assert stage.manifest() is None
    with pytest.raises(WorkspaceError, match="run `distributed-mi train CONFIG` first"):
        stage.require()


def test_equal_key_is_skipped_and_reads_what_was_written(workspace: Workspace) -> None:
    first = complete(workspace, KEY, 1, 2, stats={"x": 1}, rejected_rows=3)
    again = workspace.stage("prepare").open(StageKey("prepare", {"events": "hash"}, {"seed": 1}))
    assert again.complete
    assert again.manifest == first.manifest
    assert again.manifest.rows == {"user_vectors": 2}
    assert again.manifest.rejected_rows == 3
    assert workspace.stage("prepare").read("user_vectors", "user_vectors").equals(vectors(1, 2))


def test_projection_and_filter_are_passed_on(workspace: Workspace) -> None:
    complete(workspace, KEY, 1, 2, 3)
    table = workspace.stage("prepare").read(
        "user_vectors", "user_vectors", columns=["user_index"], filter=pc.field("user_index") > 1
    )
    assert table.to_pydict() == {"user_index": [2, 3]}


def test_manifest_states_files_with_their_sizes_and_versions(workspace: Workspace) -> None:
    manifest = complete(workspace, KEY, 1).manifest
    assert manifest is not None
    info = workspace.fs.get_file_info(workspace.stage("prepare").path("user_vectors/part-0.parquet"))
    assert manifest.file_bytes == {"user_vectors/part-0.parquet": info.size}
    assert manifest.packages["pyarrow"] == pa.__version__
    assert manifest.peak_rss_bytes > 1 << 20
    assert manifest.wall_seconds >= 0


def test_unfinished_run_resumes_with_its_shards_and_drops_the_unreadable(workspace: Workspace) -> None:
    run = workspace.stage("prepare").open(KEY)
    assert not run.resumed
    good = run.path("user_vectors/part-0.parquet")
    run.write_table("user_vectors/part-0.parquet", vectors(1), "user_vectors")
    for name, content in {"part-1.parquet": b"PAR1 cut", "part-2.parquet": b""}.items():
        artifacts.write_bytes(run.fs, run.path("user_vectors", name), content)
    events = schema.empty("events")
    run.fs.create_dir(run.path("user_vectors"), recursive=True)
    artifacts.write_table(run.fs, run.path("user_vectors/part-3.parquet"), events, "events")

    again = workspace.stage("prepare").open(KEY)
    assert again.resumed
    assert not again.complete
    assert again.valid_shards("user_vectors", "user_vectors") == [good]
    assert artifacts.list_files(run.fs, run.root) == [good]


def test_finished_shard_is_kept_byte_for_byte(workspace: Workspace) -> None:
    run = workspace.stage("prepare").open(KEY)
    run.write_table("user_vectors/part-0.parquet", vectors(1), "user_vectors")
    with run.fs.open_input_stream(run.path("user_vectors/part-0.parquet")) as stream:
        before = stream.read()
    again = workspace.stage("prepare").open(KEY)
    again.write_table("user_vectors/part-1.parquet", vectors(2), "user_vectors")
    again.commit(rows={"user_vectors": 2})
    with run.fs.open_input_stream(run.path("user_vectors/part-0.parquet")) as stream:
        assert stream.read() == before
    assert workspace.stage("prepare").read("user_vectors", "user_vectors")["user_index"].to_pylist() == [1, 2]


def test_temporary_file_of_a_killed_writer_is_not_read_and_goes_at_commit(workspace: Workspace) -> None:
    run = workspace.stage("prepare").open(KEY)
    run.write_table("user_vectors/part-0.parquet", vectors(1), "user_vectors")
    with run.fs.open_output_stream(run.path("user_vectors/part-1.parquet.0123abcd.tmp")) as stream:
        stream.write(b"half")
    assert len(artifacts.list_files_with_temporaries(run.fs, run.root)) == 2
    manifest = run.commit(rows={"user_vectors": 1})
    assert list(manifest.file_bytes) == ["user_vectors/part-0.parquet"]
    assert len(artifacts.list_files_with_temporaries(run.fs, run.root)) == 1


def test_other_key_begins_a_generation_and_the_old_one_stays_until_success(workspace: Workspace) -> None:
    complete(workspace, KEY, 1)
    run = workspace.stage("prepare").open(OTHER)
    assert not run.complete
    assert not run.resumed
    run.write_table("user_vectors/part-0.parquet", vectors(7, 8), "user_vectors")
    assert workspace.stage("prepare").read("user_vectors", "user_vectors").equals(vectors(1))
    assert {KEY.generation, OTHER.generation} <= names(workspace)
    run.commit(rows={"user_vectors": 2})
    assert names(workspace) == {"manifest.json", OTHER.generation}
    assert workspace.stage("prepare").read("user_vectors", "user_vectors").equals(vectors(7, 8))


def test_going_back_to_the_first_key_does_the_work_again(workspace: Workspace) -> None:
    complete(workspace, KEY, 1)
    complete(workspace, OTHER, 2)
    assert not workspace.stage("prepare").open(KEY).complete


@pytest.mark.parametrize(
    "change", [{"stage": "embed"}, {"inputs": {"events": "other"}}, {"config": {"seed": 3}}]
)
def test_generation_depends_on_stage_inputs_and_configuration(change: dict[str, Any]) -> None:
    assert dataclasses.replace(KEY, **change).generation != KEY.generation
    assert len(KEY.generation) == 16


def test_generation_depends_on_the_format_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KEY.generation
    monkeypatch.setattr(schema, "FORMAT_VERSION", schema.FORMAT_VERSION + 1)
    assert KEY.generation != before


def test_identity_knows_the_result_but_not_the_run(workspace: Workspace) -> None:
    manifest = complete(workspace, KEY, 1).manifest
    assert manifest is not None
    same = dataclasses.replace(manifest, wall_seconds=9.0, created="later", packages={})
    assert same.identity == manifest.identity
    assert dataclasses.replace(manifest, rows={"user_vectors": 2}).identity != manifest.identity


def test_manifest_of_another_format_version_is_refused(workspace: Workspace) -> None:
    complete(workspace, KEY, 1)
    stage = workspace.stage("prepare")
    values = json.loads(stage.manifest().to_json())  # type: ignore[union-attr]
    values["format_version"] += 1
    artifacts.write_bytes(stage.fs, stage.manifest_path, json.dumps(values).encode())
    with pytest.raises(SchemaMismatchError, match=f"version {values['format_version']}; this is version"):
        stage.require()
    with pytest.raises(SchemaMismatchError):
        stage.open(KEY)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"format_version": %d}' % schema.FORMAT_VERSION, b"\xff"]
)
def test_a_file_that_is_no_manifest_is_named(workspace: Workspace, content: bytes) -> None:
    stage = workspace.stage("prepare")
    artifacts.write_bytes(stage.fs, stage.manifest_path, content)
    with pytest.raises(WorkspaceError, match=r"manifest\.json is not a manifest"):
        stage.open(KEY)


def test_manifest_survives_json() -> None:
    manifest = Manifest("s", "g", schema.FORMAT_VERSION, {}, {}, {}, {}, 0, {"x": [1]}, {}, "now", 0.5, 7)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


def test_top_files_lie_beside_the_manifest_and_belong_to_its_key(workspace: Workspace) -> None:
    complete(workspace, KEY, 1, top_files={"report.json": b"1", "curve.png": b"p"})
    assert names(workspace) == {"manifest.json", KEY.generation, "report.json", "curve.png"}
    complete(workspace, OTHER, 2, top_files={"report.json": b"2"})
    assert names(workspace) == {"manifest.json", OTHER.generation, "report.json"}
    with workspace.fs.open_input_stream(f"{workspace.root}/prepare/report.json") as stream:
        assert stream.read() == b"2"
    complete(workspace, KEY, 1)
    assert names(workspace) == {"manifest.json", KEY.generation}


def test_stats_that_are_no_json_leave_the_old_result(workspace: Workspace) -> None:
    complete(workspace, KEY, 1, top_files={"report.json": b"1"})
    with pytest.raises(ValueError, match="JSON"):
        complete(workspace, OTHER, 2, stats={"loss": float("nan")}, top_files={"report.json": b"2"})
    assert workspace.stage("prepare").read("user_vectors", "user_vectors").equals(vectors(1))
    assert "report.json" in names(workspace)


def test_clear_removes_a_folder_and_nothing_else(workspace: Workspace) -> None:
    run = workspace.stage("prepare").open(KEY)
    run.write_table("a/part-0.parquet", vectors(1), "user_vectors")
    run.write_table("b/part-0.parquet", vectors(1), "user_vectors")
    run.clear("a")
    run.clear("never_there")
    assert artifacts.list_files(run.fs, run.root) == [run.path("b/part-0.parquet")]


def test_reading_a_table_that_is_not_there_names_it(workspace: Workspace) -> None:
    run = complete(workspace, KEY, 1)
    with pytest.raises(WorkspaceError, match="table events: no Parquet files"):
        run.read_table("events", "events")
    with pytest.raises(WorkspaceError, match="table user_vectors"):
        artifacts.read_table(run.fs, run.path("user_vectors/gone.parquet"), "user_vectors")


def test_reading_a_table_with_other_columns_is_refused(workspace: Workspace) -> None:
    run = complete(workspace, KEY, 1)
    with pytest.raises(SchemaMismatchError, match="table events"):
        run.read_table("user_vectors", "events")


def test_writing_a_table_that_does_not_conform_leaves_no_file(workspace: Workspace) -> None:
    run = workspace.stage("prepare").open(KEY)
    with pytest.raises(SchemaMismatchError):
        run.write_table("events/part-0.parquet", vectors(1), "events")
    assert artifacts.list_files_with_temporaries(run.fs, run.root) == []


def test_stages_of_one_prefix_do_not_disturb_each_other(workspace: Workspace) -> None:
    complete(workspace, dataclasses.replace(KEY, stage="train/remi"), 1)
    complete(workspace, dataclasses.replace(KEY, stage="train/eimf"), 2)
    for run, user in (("remi", 1), ("eimf", 2)):
        assert workspace.stage(f"train/{run}").read("user_vectors", "user_vectors").equals(vectors(user))


def test_a_workspace_that_cannot_be_made_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can lie below this")
    workspace = Workspace(str(tmp_path / "file" / "ws"))
    named = rf"workspace {workspace.url} cannot be used: .*Not a directory.*workspace="
    with pytest.raises(WorkspaceError, match=named), workspace.lock("train"):
        pass
    with pytest.raises(WorkspaceError, match=named):
        workspace.stage("prepare").open(KEY)


def test_an_error_inside_the_lock_is_not_taken_for_one_of_the_workspace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="of the stage"), Workspace(str(tmp_path)).lock("train"):
        raise FileNotFoundError("of the stage")
