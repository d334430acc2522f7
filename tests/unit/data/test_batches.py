"""Sequences in memory, training samples, evaluation batches."""

import numpy as np
import pyarrow as pa
import pytest

from distributed_mi.core import schema
from distributed_mi.core.artifacts import StageKey, Workspace
from distributed_mi.core.errors import InputError, UnknownUserError, WorkspaceError
from distributed_mi.data.batches import Sequences, TrainSampler, pad_left


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
