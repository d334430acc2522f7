"""Sequences in memory, training samples, evaluation batches."""

import numpy as np
import pyarrow as pa
import pytest

from distributed_mi.core import schema
from distributed_mi.core.artifacts import StageKey, Workspace
from distributed_mi.core.errors import InputError, UnknownUserError, WorkspaceError
from distributed_mi.data import batches, mapped
from distributed_mi.data.batches import EveryPositionSampler, Sequences, TrainSampler, pad_left


def table_of(sequences, num_history=None, user_index=None):
    n = len(sequences)
    return pa.table(
        {
            "user_index": user_index or list(range(n)),
            "user_id": [f"u{u}" for u in (user_index or range(n))],
            "item_indices": sequences,
            "timestamps": [list(range(len(s))) for s in sequences],
            "num_history": num_history or [len(s) for s in sequences],
        },
        schema=schema.TABLES["sequences"],
    )


def random_sequences(rng, num_users=50):
    items = [rng.integers(1, 100, n).tolist() for n in rng.integers(1, 15, num_users)]
    return items, Sequences.from_table(table_of(items, [int(0.8 * len(s)) for s in items]))


def test_pad_left_by_hand():
    items = np.array([1, 2, 3, 4, 5, 6])
    ids, mask = pad_left(items, np.array([0, 3, 3]), np.array([3, 4, 3]), 2)
    assert ids.tolist() == [[2, 3], [0, 4], [0, 0]]
    assert mask.tolist() == [[True, True], [False, True], [False, False]]
    assert ids.dtype == np.int64


def test_pad_left_agrees_with_python_lists(rng):
    items, sequences = random_sequences(rng)
    rows = rng.permutation(50)[:20]
    ids, mask = sequences.histories(rows, 6)
    for row, id_row, mask_row in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        history = items[row][: int(0.8 * len(items[row]))][-6:]
        assert id_row == [0] * (6 - len(history)) + history
        assert mask_row == [False] * (6 - len(history)) + [True] * len(history)


def test_sequences_are_ordered_by_user_whatever_the_shards():
    shuffled = table_of([[3], [1, 2], [4, 4]], user_index=[2, 0, 1])
    sequences = Sequences.from_table(pa.concat_tables([shuffled[:1], shuffled[1:]]))
    assert sequences.user_index_U.tolist() == [0, 1, 2]
    assert sequences.user_ids == ["u0", "u1", "u2"]
    assert sequences.items.tolist() == [1, 2, 4, 4, 3]
    assert sequences.offsets.tolist() == [0, 2, 4, 5]
    assert sequences.row_of("u2") == 2
    with pytest.raises(UnknownUserError, match='"u9"'):
        sequences.row_of("u9")


def test_labels_keep_duplicates_and_follow_the_rows():
    sequences = Sequences.from_table(table_of([[1, 2, 3], [4, 5, 5], [6]], [1, 1, 1]))
    labels, offsets = sequences.labels(np.array([1, 2, 0]))
    assert labels.tolist() == [5, 5, 2, 3]
    assert offsets.tolist() == [0, 2, 2, 4]
    assert sequences.history(1).tolist() == [4]


def test_an_empty_split_reads_as_no_users():
    sequences = Sequences.from_table(schema.empty("sequences"))
    assert (sequences.num_users, sequences.num_events) == (0, 0)
    assert sequences.histories(np.array([], np.int64), 3)[0].shape == (0, 3)


def test_read_takes_the_complete_stage(tmp_path):
    workspace = Workspace(str(tmp_path))
    with pytest.raises(WorkspaceError, match="prepare"):
        Sequences.read(workspace, "train")
    run = workspace.stage("prepare").open(StageKey("prepare", {}, {}))
    run.write_table("sequences/train/part-00000.parquet", table_of([[7, 8]], user_index=[1]), "sequences")
    run.write_table("sequences/train/part-00001.parquet", table_of([[9]], user_index=[0]), "sequences")
    run.commit(rows={"train": 2})
    assert Sequences.read(workspace, "train").items.tolist() == [9, 7, 8]


def sampler_of(rng, **options):
    _, sequences = random_sequences(rng)
    defaults = {"num_users_per_step": 8, "max_history": 5, "seed": 1}
    return TrainSampler(sequences, **{**defaults, **options})


def test_a_step_is_a_function_of_seed_and_step(rng):
    sampler = sampler_of(rng)
    again = TrainSampler(sampler.sequences, num_users_per_step=8, max_history=5, seed=1)
    other = TrainSampler(sampler.sequences, num_users_per_step=8, max_history=5, seed=2)
    later = sampler.sample(7)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(vars(later).values(), vars(again.sample(7)).values(), strict=True)
    )
    assert not np.array_equal(later.user_rows_B, sampler.sample(8).user_rows_B)
    assert not np.array_equal(later.user_rows_B, other.sample(7).user_rows_B)


def test_targets_follow_their_history_and_never_stand_among_the_first_four(rng):
    items = [
        [10 * u + i for i in range(n)] for u, n in enumerate(rng.integers(1, 10, 60), 1)
    ]  # items tell the position
    sampler = TrainSampler(
        Sequences.from_table(table_of(items)), num_users_per_step=20, max_history=3, seed=0
    )
    positions = []
    for step in range(30):
        sample = sampler.sample(step)
        assert len(set(sample.user_rows_B.tolist())) == 20
        for row, ids, mask, target in zip(
            sample.user_rows_B,
            sample.history_ids_BL,
            sample.history_mask_BL,
            sample.target_ids_B,
            strict=True,
        ):
            k = items[row].index(target)
            positions.append(k)
            assert ids.tolist() == items[row][k - 3 : k]
            assert mask.all()
    assert min(positions) == 4
    assert max(positions) == max(len(s) for s in items) - 1


def test_every_admissible_target_of_a_user_is_equally_likely():
    sampler = TrainSampler(
        Sequences.from_table(table_of([list(range(1, 8))])), num_users_per_step=1, max_history=7
    )
    drawn = np.bincount([int(sampler.sample(s).target_ids_B[0]) for s in range(900)], minlength=8)
    assert drawn[:5].sum() == 0  # items 1..4 are the first four events
    assert (abs(drawn[5:] - 300) < 4 * np.sqrt(300)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_of_all_workers_are_the_step(rng, size):
    sampler = sampler_of(rng)
    whole = sampler.sample(3)
    for shares in (
        [whole.share(rank, size) for rank in range(size)],
        [sampler.sample(3, rank, size) for rank in range(size)],
    ):
        for name, expected in vars(whole).items():
            assert np.array_equal(np.concatenate([vars(s)[name] for s in shares]), expected)


def test_short_users_are_left_out_and_counted():
    sampler = TrainSampler(
        Sequences.from_table(table_of([[1] * 4, [1] * 5, [1] * 9])), num_users_per_step=64, max_history=5
    )
    assert (sampler.num_excluded_users, sampler.num_users) == (1, 2)  # fewer than asked for: all of them
    assert sorted(sampler.sample(0).user_rows_B.tolist()) == [1, 2]


def test_no_user_long_enough_is_refused():
    with pytest.raises(InputError, match="none of the 2 training users has more than 4 events"):
        TrainSampler(Sequences.from_table(table_of([[1] * 4, [2]])), num_users_per_step=4, max_history=5)


# Every position at once.


def every_position(items, **options):
    defaults = {"num_users_per_step": 8, "max_history": 4, "min_position": 1, "seed": 1}
    return EveryPositionSampler(Sequences.from_table(table_of(items)), **{**defaults, **options})


def test_every_position_by_hand():
    sample = every_position([[1, 2], [3], [5, 6, 7, 8, 9], [4, 4, 4]]).sample(0)
    by_row = np.argsort(sample.user_rows_B)
    assert sample.user_rows_B[by_row].tolist() == [0, 2, 3]  # one event has nothing to predict
    assert sample.history_ids_BL[by_row].tolist() == [[0, 0, 0, 1], [5, 6, 7, 8], [0, 0, 4, 4]]
    assert sample.target_ids_BL[by_row].tolist() == [[0, 0, 0, 2], [6, 7, 8, 9], [0, 0, 4, 4]]
    assert (sample.target_mask_BL == (sample.target_ids_BL > 0)).all()
    assert (sample.history_mask_BL == (sample.history_ids_BL > 0)).all()
    assert sample.target_ids_B[by_row].tolist() == [2, 9, 4]
    assert sample.num_targets == 7


def test_no_target_stands_before_the_first_allowed_position():
    sample = every_position([[5, 6, 7, 8, 9], [1, 2, 3]], min_position=3).sample(0)
    assert sample.history_ids_BL.tolist() == [[5, 6, 7, 8]]
    assert sample.target_ids_BL.tolist() == [[0, 0, 8, 9]]
    assert sample.num_targets == 2


@pytest.mark.parametrize("min_position", [1, 3, 6])
def test_windows_of_long_users_are_consecutive_and_reach_every_event(min_position):
    items = [list(range(100, 112)), list(range(200, 203)), list(range(300, 308))]
    sampler = every_position(items, min_position=min_position)
    targets = []
    for step in range(300):
        sample = sampler.sample(step)
        assert sample.num_targets == sample.target_mask_BL.sum()
        for row, ids, mask, target_ids, target_mask in zip(
            sample.user_rows_B,
            sample.history_ids_BL.tolist(),
            sample.history_mask_BL.tolist(),
            sample.target_ids_BL.tolist(),
            sample.target_mask_BL.tolist(),
            strict=True,
        ):
            seen = [i for i, real in zip(ids, mask, strict=True) if real]
            begin = items[row].index(seen[0])
            assert items[row][begin : begin + len(seen)] == seen
            for item, real, target, asked in zip(ids, mask, target_ids, target_mask, strict=True):
                if asked:
                    assert real
                    assert target == item + 1
                    targets.append(target)
                else:
                    assert target == 0
    positions = {item % 100 for item in targets if item < 200}
    assert positions == set(range(min_position, 12))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_of_every_position_are_the_step_and_know_all_of_its_targets(rng, size):
    _, sequences = random_sequences(rng)
    sampler = EveryPositionSampler(sequences, num_users_per_step=11, max_history=5, min_position=2, seed=4)
    whole = sampler.sample(9)
    for shares in (
        [whole.share(r, size) for r in range(size)],
        [sampler.sample(9, r, size) for r in range(size)],
    ):
        for name, expected in vars(whole).items():
            if name == "num_targets":
                assert {s.num_targets for s in shares} == {expected}
            else:
                assert np.array_equal(np.concatenate([vars(s)[name] for s in shares]), expected)


# Mapped files.


def prepared(tmp_path, shards):
    workspace = Workspace(str(tmp_path / "workspace"))
    run = workspace.stage("prepare").open(StageKey("prepare", {}, {}))
    for number, table in enumerate(shards):
        run.write_table(f"sequences/train/part-{number:05d}.parquet", table, "sequences")
    run.commit(rows={"train": sum(s.num_rows for s in shards)})
    return workspace


def test_mapped_sequences_equal_those_in_memory(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(mapped, "_BATCH_ROWS", 7)  # several batches in each shard
    order = rng.permutation(50)
    items = [rng.integers(1, 100, rng.integers(0, 15)).tolist() for _ in range(50)]
    history = [len(x) // 2 for x in items]
    whole = table_of(items, history, order.tolist())
    workspace = prepared(tmp_path, [whole[:30], whole[30:31], whole[31:]])
    folder = str(tmp_path / "mapped")
    ours, expected = Sequences.map(workspace, "train", folder), Sequences.read(workspace, "train")
    again = Sequences.map(workspace, "train", folder, convert=False)
    for name, value in vars(expected).items():
        assert np.array_equal(vars(ours)[name], value), name
        assert np.array_equal(vars(again)[name], value), name
    assert ours.row_of(expected.user_ids[3]) == 3
    assert not ours.items.flags.writeable
    assert not ours.items.flags.owndata
    options = {"num_users_per_step": 8, "max_history": 5}
    one, two = (TrainSampler(s, **options).sample(3) for s in (ours, expected))
    assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))


def test_a_conversion_that_was_killed_leaves_nothing_that_reads_as_done(tmp_path, monkeypatch):
    workspace = prepared(tmp_path, [table_of([[1, 2], [3]])])
    folder = str(tmp_path / "mapped")
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "_write_items", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Sequences.map(workspace, "train", folder)
    assert Sequences.map(workspace, "train", folder).items.tolist() == [1, 2, 3]


def test_an_empty_split_is_mapped_as_no_users(tmp_path):
    workspace = prepared(tmp_path, [schema.empty("sequences")])
    sequences = Sequences.map(workspace, "train", str(tmp_path / "mapped"))
    assert (sequences.num_users, sequences.num_events, sequences.user_ids) == (0, 0, [])


@pytest.mark.parametrize(("wrong", "event"), [(99, 2), (0, 3), (-5, 1), (100, 2)])
def test_an_item_outside_the_catalogue_is_named_with_user_and_position(wrong, event, monkeypatch):
    monkeypatch.setattr(batches, "_CHECKED_AT_ONCE", 2)
    items = [[1, 2], [98, 97], [5, 6, 7], [1]]
    items[2][event - 1] = wrong
    sequences = Sequences.from_table(table_of(items))
    message = (
        rf'user "u2" \(user_index 2\) has item {wrong} as event {event} of 3; the catalogue has items 1 to 98'
    )
    with pytest.raises(InputError, match=message):
        sequences.check_items(99)
    parts = [(rank, 3) for rank in range(3)]
    with pytest.raises(InputError, match=message):
        _ = [sequences.check_items(99, rank, size) for rank, size in parts]
    Sequences.from_table(table_of([[1, 98], [], [97]])).check_items(99)
