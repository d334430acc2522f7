"""The embed stage in one process: tables, scale, skipping, both kinds of user vector, bad input."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distributed_mi.core.artifacts import StageKey, Workspace
from distributed_mi.core.errors import InputError
from distributed_mi.text import stage
from distributed_mi.text.config import EmbedConfig
from distributed_mi.text.distances import squared_nn_distances
from distributed_mi.text.encoder import TextEncoder

TITLES = ["red lip stick", "soap", None, "soap", "blue nail polish"]
TEXTS = ["red lip stick", "soap", "acme", "soap", "blue nail polish"]
USERS = [[1, 2], [5], [4, 3, 3], [2, 5, 1]]


def never() -> None:
    raise AssertionError("Ray must not be started for a handful of texts")


def write_prepare(
    workspace: Workspace,
    *,
    users: list[list[int]] = USERS,
    first_item: int = 1,
    titles: Sequence[str | None] = TITLES,
    brand: Mapping[int, str] | None = None,
    categories: Sequence[str] = ("Beauty",),
) -> None:
    """A catalogue of five items and some training users, in several shards and not in order."""
    prepare = workspace.stage("prepare").open(StageKey("prepare", {}, {"users": users, "first": first_item}))
    for number, rows in enumerate(([3, 1], [4, 0, 2])):
        items = {
            "item_index": [first_item + r for r in rows],
            "item_id": [f"i{r}" for r in rows],
            "title": [titles[r] for r in rows],
            "brand": ["acme" if brand is None else brand.get(r) for r in rows],
            "categories": pa.array([list(categories) for _ in rows], pa.list_(pa.string())),
            "num_events": [1 for _ in rows],
            "num_train_events": [1 for _ in rows],
        }
        prepare.write_table(f"catalogue/part-{number}.parquet", pa.table(items), "catalogue")
    order = list(range(len(users)))[::-1]
    lists = pa.ListArray.from_arrays(
        np.cumsum([0, *(len(users[u]) for u in order)]).astype(np.int32),
        np.array([i for u in order for i in users[u]], dtype=np.int64),
    )
    sequences = {
        "user_index": pa.array(order, pa.int64()),
        "user_id": pa.array([f"u{u}" for u in order], pa.string()),
        "item_indices": lists,
        "timestamps": lists,
        "num_history": pa.array([len(users[u]) for u in order], pa.int64()),
    }
    prepare.write_table("sequences/train/part-0.parquet", pa.table(sequences), "sequences")
    prepare.commit(rows={"train": len(users)})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    found = Workspace(str(tmp_path))
    write_prepare(found)
    return found


def read(workspace: Workspace, name: str) -> tuple[list[int], np.ndarray]:
    table = workspace.stage("embed").read(f"{name}_vectors", f"{name}_vectors")
    return table[f"{name}_index"].to_pylist(), np.array(table["vector"].to_pylist(), dtype=np.float32)


def test_vectors_and_their_common_scale(workspace: Workspace, tiny_bert: Path) -> None:
    config = EmbedConfig(model=str(tiny_bert))
    manifest = stage.run(config, workspace, start_ray=never)
    item_indices, items = read(workspace, "item")
    user_indices, users = read(workspace, "user")
    assert item_indices == [1, 2, 3, 4, 5]
    assert user_indices == [0, 1, 2, 3]
    stats = manifest.stats
    encoded = TextEncoder(config)(TEXTS)
    np.testing.assert_allclose(items, encoded * stats["scale"], rtol=1e-4, atol=1e-4)
    wanted = [items[[i - 1 for i in u]].mean(axis=0) for u in USERS]
    np.testing.assert_allclose(users, wanted, rtol=1e-4, atol=1e-4)
    assert np.median(squared_nn_distances(users)) == pytest.approx(3.0, rel=1e-3)
    assert stats["median_squared_nn_distance"] == pytest.approx(3.0)
    assert stats["median_squared_nn_distance_before"] == pytest.approx(3.0 / stats["scale"] ** 2)
    assert stats["median_squared_distance"] > 0
    assert stats["dim"] == 32
    assert stats["model"] == str(tiny_bert)
    assert len(stats["model_revision"]) == 16
    assert stats["num_distinct_texts"] == 4
    assert stats["item_text_sources"] == {"brand": 1, "fields": 4}
    assert manifest.rows == {"item_vectors": 5, "user_vectors": 4}


def test_whether_an_item_has_text_is_recorded(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items 1 and 4 have no title, maker or category: they are encoded by their id, which names nothing."""
    monkeypatch.setattr(stage, "_SHARD_ROWS", 2)
    workspace = Workspace(str(tmp_path))
    write_prepare(workspace, titles=[None, "soap", None, " ", "nail"], brand={2: "acme"}, categories=[])
    manifest = stage.run(EmbedConfig(model=str(tiny_bert)), workspace, start_ray=never)
    table = workspace.stage("embed").read("item_vectors", "item_vectors")
    assert table["has_text"].to_pylist() == [False, True, True, False, True]
    assert manifest.stats["item_text_sources"] == {"brand": 1, "fields": 2, "id": 2}


def test_sequence_mode_encodes_the_joined_titles(workspace: Workspace, tiny_bert: Path) -> None:
    config = EmbedConfig(model=str(tiny_bert), user_vectors="sequence", rescale=False)
    manifest = stage.run(config, workspace, start_ray=never)
    texts = [
        "red lip stick. soap",
        "blue nail polish",
        "soap. acme. acme",
        "soap. blue nail polish. red lip stick",
    ]
    wanted = TextEncoder(config)(texts, max_tokens=256)
    np.testing.assert_allclose(read(workspace, "user")[1], wanted, atol=1e-5)
    assert manifest.stats["scale"] == 1.0


def test_a_second_run_is_skipped_also_with_another_batch_size(workspace: Workspace, tiny_bert: Path) -> None:
    first = stage.run(EmbedConfig(model=str(tiny_bert)), workspace, start_ray=never)
    again = stage.run(EmbedConfig(model=str(tiny_bert), batch_size=3), workspace, start_ray=never)
    other = stage.run(EmbedConfig(model=str(tiny_bert), pooling="cls"), workspace, start_ray=never)
    assert again.generation == first.generation
    assert again.created == first.created
    assert other.generation != first.generation


def test_shards_are_in_order(workspace: Workspace, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_SHARD_ROWS", 2)
    manifest = stage.run(EmbedConfig(model=str(tiny_bert)), workspace, start_ray=never)
    assert read(workspace, "item")[0] == [1, 2, 3, 4, 5]
    assert sorted(f for f in manifest.file_bytes if f.startswith("item")) == [
        f"item_vectors/part-0000{n}.parquet" for n in range(3)
    ]


def test_encode_texts_uses_the_same_encoder_and_scale(tiny_bert: Path) -> None:
    config = EmbedConfig(model=str(tiny_bert))
    found = stage.encode_texts(config, ["soap", "red", "soap"], scale=2.5, start_ray=never)
    encoded = TextEncoder(config)(["soap", "red"])
    np.testing.assert_allclose(found, 2.5 * encoded[[0, 1, 0]], atol=1e-5)
    assert found.dtype == np.float32


def test_encode_texts_encodes_each_distinct_text_once(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    inner: Callable[..., np.ndarray] = TextEncoder.__call__

    def spy(self: TextEncoder, texts: list[str], **options: object) -> np.ndarray:
        asked.extend(texts)
        return inner(self, texts, **options)

    monkeypatch.setattr(TextEncoder, "__call__", spy)
    config = EmbedConfig(model=str(tiny_bert))
    assert stage.encode_texts(config, ["a", "b", "a", "a"], scale=1.0, start_ray=never).shape == (4, 32)
    assert asked == ["a", "b"]
    assert stage.encode_texts(config, [], scale=1.0, start_ray=never).shape == (0, 32)


@pytest.mark.parametrize(
    ("users", "first_item", "message"),
    [
        (USERS, 2, "does not count from 1"),
        ([], 1, "no training users"),
        ([[1], []], 1, "has no events"),
        ([[1, 6]], 1, r"outside 1\.\.5"),
        ([[0, 1]], 1, r"outside 1\.\.5"),
    ],
)
def test_bad_tables_are_refused(
    tmp_path: Path, tiny_bert: Path, users: list[list[int]], first_item: int, message: str
) -> None:
    workspace = Workspace(str(tmp_path / "bad"))
    write_prepare(workspace, users=users, first_item=first_item)
    with pytest.raises(InputError, match=message):
        stage.run(EmbedConfig(model=str(tiny_bert)), workspace, start_ray=never)


def test_one_user_has_no_neighbour_and_keeps_the_scale(tmp_path: Path, tiny_bert: Path) -> None:
    workspace = Workspace(str(tmp_path / "one"))
    write_prepare(workspace, users=[[1, 2]])
    stats = stage.run(EmbedConfig(model=str(tiny_bert)), workspace, start_ray=never).stats
    assert stats["scale"] == 1.0
    assert stats["median_squared_nn_distance"] is None


def test_bad_configuration_is_refused() -> None:
    for bad in ({"pooling": "max"}, {"item_fields": []}, {"item_fields": ["price"]}, {"max_item_tokens": 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EmbedConfig.model_validate(bad)
