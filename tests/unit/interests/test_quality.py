"""Scores of interests without a judge: oracles by hand, chance, perfection, planted topics, and what has no value."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_mi.core.resampling import sign_flip_p_values
from distributed_mi.interests.quality import (
    SEMANTIC,
    InterestVectors,
    LaterItems,
    chance,
    coverage,
    distinctness,
    draw_others,
    later_items,
    rank_scores,
    semantic_scores,
)
from distributed_mi.interests.resampling import estimates, paired_differences

UP, RIGHT, DIAGONAL = [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]


def interests(sets: dict[int, list[list[float]]]) -> InterestVectors:
    owners = [u for u, vectors in sets.items() for _ in vectors]
    return InterestVectors.build(np.array(owners), np.array([v for vs in sets.values() for v in vs]))


def own_later(sets: dict[int, list[int]]) -> LaterItems:
    """Later items of exemplars, who have their own interests."""
    return LaterItems.build(list(sets), list(sets), list(sets.values()))


def random_setup(rng: np.random.Generator, exemplars: int, *, width: int = 8) -> tuple:
    """Interests and later items that know nothing of each other."""
    owners = np.repeat(np.arange(exemplars), rng.integers(1, 6, exemplars))
    table = InterestVectors.build(owners, rng.normal(size=(len(owners), width)))
    items = rng.normal(size=(50, width)).astype(np.float32)
    later = own_later({u: rng.choice(50, 5, replace=False).tolist() for u in range(exemplars)})
    return table, later, items


# Ranks of one item.


def test_rank_scores_by_hand() -> None:
    own = np.array([0.5, 0.5, 0.5, 0.5])
    others = np.array([[0.4, 0.3, 0.2], [0.9, 0.8, 0.7], [0.9, 0.5, 0.1], [0.5, 0.5, 0.5]])
    # Best; last of four; second or third with one above and one equal; anywhere among four equals.
    expected = [
        [1.0, 1.0, 1.0, 1.0],
        [0.0, 0.0, 1.0, 1 / 4],
        [0.5, 0.0, 1.0, (1 / 2 + 1 / 3) / 2],
        [0.5, 1 / 4, 1.0, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4],
    ]
    np.testing.assert_allclose(rank_scores(own, others), expected)


def test_hit_at_10_is_shared_by_ties_across_the_limit() -> None:
    others = np.array([[0.9] * 8 + [0.5] * 3 + [0.1] * 88])
    # Rank 9 to 12 with equal chance: two of the four are within ten.
    found = dict(zip(SEMANTIC, rank_scores(np.array([0.5]), others)[0], strict=True))
    assert found["hit@10"] == pytest.approx(2 / 4)
    assert found["hit@1"] == 0.0
    assert found["rank_percentile"] == pytest.approx(1 - (8 + 1.5) / 99)


def test_chance_levels_by_hand() -> None:
    assert chance(99) == pytest.approx(
        {"rank_percentile": 0.5, "hit@1": 0.01, "hit@10": 0.1, "mrr": sum(1 / r for r in range(1, 101)) / 100}
    )
    assert chance(3) == pytest.approx(
        {"rank_percentile": 0.5, "hit@1": 0.25, "hit@10": 1.0, "mrr": (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4}
    )
    assert chance(0) == {}


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30))
def test_any_scores_give_chance_when_each_takes_its_turn(values: list[int]) -> None:
    """The chance levels are exact for exchanged interests, with ties of any size."""
    scores = np.array(values, dtype=np.float64)
    turns = [rank_scores(scores[i : i + 1], np.delete(scores, i)[None, :])[0] for i in range(len(scores))]
    np.testing.assert_allclose(np.mean(turns, axis=0), list(chance(len(values) - 1).values()), atol=1e-12)


# Scores of users.


def test_score_is_the_best_cosine_of_any_interest() -> None:
    table = interests({1: [UP], 2: [RIGHT, [3.0, 3.0]], 3: [[-1.0, 0.0], [0.0, -2.0]]})
    items = np.array([[0.0, 5.0], [0.6, 0.8]], dtype=np.float32)
    unit = items / np.linalg.norm(items, axis=1, keepdims=True)
    # cos(45 degrees) = 0.7071; (0.6, 0.8) is at 0.8 to UP, at (0.6 + 0.8) / sqrt 2 = 0.9899 to the diagonal.
    expected = [[1.0, math.sqrt(0.5), 0.0], [0.8, 1.4 / math.sqrt(2), -0.6]]
    np.testing.assert_allclose(table.scores(np.array([0, 1, 2]), unit), expected, atol=1e-6)
    np.testing.assert_allclose(table.scores(np.array([2, 0]), unit), np.array(expected)[:, [2, 0]], atol=1e-6)


def test_semantic_scores_by_hand() -> None:
    table = interests({1: [UP], 2: [RIGHT], 3: [[-1.0, 0.0]]})
    items = np.array([UP, RIGHT, DIAGONAL], dtype=np.float32)
    found = semantic_scores(table, own_later({1: [0], 2: [0, 1], 3: [2]}), items)
    assert found.num_others == 2
    # User 1, UP:       1 against 0 and 0: rank 1.
    # User 2, UP:       0 against 1 and 0: one above, one equal: 1 - 1.5 / 2 = 0.25; rank 2 or 3.
    #         RIGHT:    1 against 0 and -1: rank 1.
    # User 3, DIAGONAL: -0.7 against 0.7 and 0.7: rank 3.
    np.testing.assert_allclose(found.own["rank_percentile"], [1.0, (0.25 + 1.0) / 2, 0.0])
    np.testing.assert_allclose(found.own["hit@1"], [1.0, 0.5, 0.0])
    np.testing.assert_allclose(found.own["mrr"], [1.0, ((1 / 2 + 1 / 3) / 2 + 1.0) / 2, 1 / 3])


def test_swapped_scores_and_lift_by_hand() -> None:
    table = interests({1: [UP], 2: [RIGHT]})
    items = np.array([UP, RIGHT, [1.0, 3.0]], dtype=np.float32)
    later = LaterItems.build([1, 2], [1, 2], [[0], [1, 2, 0]], [[2], []])
    assert later.partners(7).tolist() == [1, 0]
    found = semantic_scores(table, later, items)
    # User 1 has UP and (1, 3) already, RIGHT of user 2 remains: UP loses there. User 2 has all that user 1 has.
    assert found.own["hit@1"][0] == 1.0
    assert found.swapped["hit@1"][0] == 0.0
    assert found.lift["hit@1_lift"][0] == 1.0
    assert found.own["hit@1"][1] == pytest.approx(1 / 3)
    assert np.isnan(found.swapped["hit@1"][1])
    assert np.isnan(found.lift["hit@1_lift"][1])


def test_partners_have_later_items_and_another_exemplar(rng: np.random.Generator) -> None:
    exemplars = rng.integers(4, size=50)
    rows = [list(range(rng.integers(0, 3))) for _ in range(50)]
    later = LaterItems.build(list(range(50)), exemplars.tolist(), rows)
    found = later.partners(7)
    for user, partner in enumerate(found):
        assert (partner >= 0) == bool(rows[user])
        assert not rows[user] or (rows[partner] and exemplars[partner] != exemplars[user])
    assert len(set(found[found >= 0])) > 20  # not the same few for all
    moved = rng.permutation(50)
    again = LaterItems.build(moved.tolist(), exemplars[moved].tolist(), [rows[u] for u in moved]).partners(7)
    assert [moved[v] if v >= 0 else -1 for v in again] == found[moved].tolist()
    assert later.partners(8).tolist() != found.tolist()
    alone = LaterItems.build([1, 2], [5, 5], [[0], [1]])
    assert alone.partners(7).tolist() == [-1, -1]
    assert LaterItems.build([], [], []).partners(7).tolist() == []


def test_larger_sets_rank_higher_by_chance_and_have_no_lift(rng: np.random.Generator) -> None:
    """Members of exemplars with many interests: the raw score is far above chance though nothing is known of them."""
    sizes = np.array([2] * 30 + [15] * 10)
    table = InterestVectors.build(np.repeat(np.arange(40), sizes), rng.normal(size=(sizes.sum(), 16)))
    items = rng.normal(size=(300, 16))
    members = list(range(100, 400))
    later = LaterItems.build(
        members,
        rng.integers(30, 40, size=300).tolist(),
        [rng.choice(300, 5, replace=False).tolist() for _ in members],
    )
    scores = semantic_scores(table, later, items, num_others=39)
    assert estimates(scores.own, later.exemplar_U)["rank_percentile"].ci95[0] > 0.7
    low, high = estimates(scores.lift, later.exemplar_U)["rank_percentile_lift"].ci95
    assert low < 0 < high


def test_agrees_with_a_loop_over_pairs(rng: np.random.Generator) -> None:
    table, later, items = random_setup(rng, 30)
    found = semantic_scores(table, later, items, num_others=7, seed=3)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for u in range(30):
        others = draw_others(30, u, 7, seed=3, user_index=u)
        partner = later.partners(3)[u]
        foreign = sorted(set(later.of(partner).tolist()) - set(later.of(u).tolist()))
        for scores, rows in ((found.own, later.of(u)), (found.swapped, foreign)):
            percentiles = []
            for item in items[rows]:
                best = {e: max(cosine(v, item) for v in table.of(e)) for e in (u, *others)}
                percentiles.append(np.mean([best[e] < best[u] for e in others]))
            assert scores["rank_percentile"][u] == pytest.approx(np.mean(percentiles))


def test_others_are_different_exemplars_and_never_the_own() -> None:
    for own in (0, 3, 9):
        drawn = [draw_others(10, own, 9, seed=s, user_index=4).tolist() for s in range(5)]
        assert all(sorted(d) == [e for e in range(10) if e != own] for d in drawn)
    assert (
        draw_others(100, 5, 9, seed=1, user_index=4).tolist()
        == draw_others(100, 5, 9, seed=1, user_index=4).tolist()
    )
    assert (
        draw_others(100, 5, 9, seed=1, user_index=4).tolist()
        != draw_others(100, 5, 9, seed=1, user_index=5).tolist()
    )


def test_order_of_interests_users_and_items_does_not_matter(rng: np.random.Generator) -> None:
    table, later, items = random_setup(rng, 40)
    found = semantic_scores(table, later, items, num_others=11)
    owners = np.repeat(table.user_index_E, table.counts)
    mixed = rng.permutation(len(owners))
    users, moved = rng.permutation(40), rng.permutation(len(items))
    place = np.argsort(moved)  # item i stands at place[i] of items[moved]
    rows = [later.of(u)[::-1] for u in users]
    again = semantic_scores(
        InterestVectors.build(owners[mixed], table.vectors_RT[mixed]),
        LaterItems.build(users.tolist(), users.tolist(), [place[r].tolist() for r in rows]),
        items[moved],
        num_others=11,
    )
    for metric in SEMANTIC:
        np.testing.assert_allclose(again.own[metric], found.own[metric][users], atol=1e-12)
        np.testing.assert_allclose(again.random[metric], found.random[metric][users], atol=1e-12)
        np.testing.assert_allclose(again.swapped[metric], found.swapped[metric][users], atol=1e-12)


@pytest.mark.parametrize("factor", [1e-3, 700.0])
def test_lengths_of_vectors_do_not_matter(rng: np.random.Generator, factor: float) -> None:
    table, later, items = random_setup(rng, 20)
    owners = np.repeat(table.user_index_E, table.counts)
    longer = InterestVectors.build(owners, table.vectors_RT * rng.uniform(0.5, 2, (len(owners), 1)))
    a, b = (semantic_scores(table, later, items), semantic_scores(longer, later, items * factor))
    np.testing.assert_allclose(a.own["rank_percentile"], b.own["rank_percentile"])


@pytest.mark.parametrize("seed", range(4))
def test_random_vectors_are_at_chance(seed: int) -> None:
    table, later, items = random_setup(np.random.default_rng(seed), 300, width=24)
    found = semantic_scores(table, later, items, num_others=99, seed=seed)
    for scores in (found.own, found.random, found.swapped):
        for metric, estimate in estimates(scores).items():
            low, high = estimate.ci95
            slack = high - low  # a 95 % interval misses now and then: twice its half width does not
            assert low - slack / 2 <= chance(99)[metric] <= high + slack / 2, metric


def test_perfect_interests_score_one() -> None:
    topics = np.eye(12, dtype=np.float32)
    table = InterestVectors.build(np.arange(12), topics)
    found = semantic_scores(table, own_later({u: [u] for u in range(12)}), topics, num_others=11)
    for metric in SEMANTIC:
        assert found.own[metric].tolist() == [1.0] * 12
    assert max(found.random["rank_percentile"]) < 1.0


def test_planted_topics_are_found_and_random_ones_are_not(rng: np.random.Generator) -> None:
    """A user's interests and later items are drawn around the same two of ten topics."""
    topics = rng.normal(size=(10, 16))
    liked = np.array([rng.choice(10, 2, replace=False) for _ in range(80)])
    table = InterestVectors.build(
        np.repeat(np.arange(80), 2), topics[liked.ravel()] + 0.3 * rng.normal(size=(160, 16))
    )
    item_topic = rng.integers(10, size=400)
    items = topics[item_topic] + 0.3 * rng.normal(size=(400, 16))
    later = own_later(
        {u: rng.choice(np.flatnonzero(np.isin(item_topic, liked[u])), 4).tolist() for u in range(80)}
    )
    scores = semantic_scores(table, later, items, num_others=50)
    own, random = (estimates(s)["rank_percentile"] for s in (scores.own, scores.random))
    assert own.ci95[0] > 0.75
    assert random.ci95[0] < 0.5 < random.ci95[1] + 0.02
    for baseline in (scores.random, scores.swapped):
        difference = paired_differences(baseline, scores.own)[0]
        assert difference.ci95[0] > 0.2
        assert difference.p_value < 0.001


def test_equal_interests_tie_wherever_they_stand(rng: np.random.Generator) -> None:
    """All exemplars have the same interests: nobody ranks above anybody by rounding."""
    same = rng.normal(size=(3, 384))
    table = InterestVectors.build(np.repeat(np.arange(30), 3), np.tile(same, (30, 1)))
    items = rng.normal(size=(17, 384))
    found = semantic_scores(table, own_later({u: list(range(17)) for u in range(30)}), items, num_others=29)
    assert set(found.own["rank_percentile"]) == {0.5}
    np.testing.assert_allclose(found.own["mrr"], chance(29)["mrr"])


def test_many_later_items_are_scored_in_blocks(rng: np.random.Generator) -> None:
    table = interests({0: [UP], 1: [RIGHT]})
    items = rng.normal(size=(3000, 2))
    found = semantic_scores(table, own_later({0: list(range(3000))}), items)
    wins = items[:, 1] > items[:, 0]
    assert found.own["rank_percentile"][0] == pytest.approx(wins.mean())


def test_members_are_scored_with_the_interests_of_their_exemplar() -> None:
    table = interests({1: [UP], 2: [RIGHT]})
    later = LaterItems.build([10, 11], [1, 2], [[0], [0]])
    found = semantic_scores(table, later, np.array([UP]))
    assert found.own["hit@1"].tolist() == [1.0, 0.0]
    assert found.random["hit@1"].tolist() == [0.0, 1.0]


# What has no value.


def test_users_without_later_items_have_no_score_and_do_not_count() -> None:
    table = interests({1: [UP], 2: [RIGHT], 3: [DIAGONAL]})
    found = semantic_scores(table, own_later({1: [0], 2: [], 3: []}), np.array([UP]))
    assert np.isnan(found.own["rank_percentile"]).tolist() == [False, True, True]
    estimate = estimates(found.own)["rank_percentile"]
    assert (estimate.value, estimate.num_users, estimate.ci95) == (1.0, 1, None)


def test_nobody_has_later_items() -> None:
    table = interests({1: [UP], 2: [RIGHT]})
    found = semantic_scores(table, own_later({1: [], 2: []}), np.zeros((0, 2), np.float32))
    for estimate in estimates(found.own).values():
        assert (estimate.value, estimate.num_users, estimate.ci95) == (None, 0, None)
    assert paired_differences(found.random, found.own)[0].p_value is None


def test_one_exemplar_has_nobody_to_be_compared_with() -> None:
    table = interests({5: [UP, RIGHT]})
    found = semantic_scores(table, own_later({5: [0]}), np.array([UP]))
    assert found.num_others == 0
    assert estimates(found.own)["mrr"].value is None


def test_one_interest_has_no_distinctness_and_no_duplicate() -> None:
    found = distinctness(interests({1: [UP], 2: [UP, RIGHT]}))
    assert np.isnan(found["distinctness"]).tolist() == [True, False]
    assert found["near_duplicates"].tolist() == [0.0, 0.0]


def test_wrong_input_is_refused() -> None:
    table = interests({1: [UP], 2: [RIGHT]})
    with pytest.raises(ValueError, match="without interests, first 7"):
        semantic_scores(table, LaterItems.build([1, 2], [1, 7], [[0], [0]]), np.array([UP]))
    with pytest.raises(ValueError, match="widths"):
        semantic_scores(table, own_later({1: [0]}), np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="finite"):
        InterestVectors.build(np.array([1]), np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="one vector for each"):
        InterestVectors.build(np.array([1, 2]), np.ones((1, 3)))
    with pytest.raises(ValueError, match="one vector for each"):
        InterestVectors.build(np.array([]), np.ones((0, 3)))


# Later items, coverage, distinctness.


def test_later_items_leave_out_the_history_and_repetitions() -> None:
    assert later_items([1, 2, 1, 3, 2, 4, 3], 3) == [3, 4]
    assert later_items([1, 2], 2) == []
    assert later_items([1, 2], 0) == [1, 2]


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(0, 20))
def test_later_items_and_history_make_the_whole(events: list[int], cut: int) -> None:
    found = later_items(events, cut)
    assert len(set(found)) == len(found)
    assert set(found) | set(events[:cut]) == set(events)
    assert not set(found) & set(events[:cut])


def test_coverage_by_hand() -> None:
    found = coverage([{1, 2, 99}, set(), {1}, {5}], [[1, 2, 3, 3], [4], [1], []])
    np.testing.assert_allclose(found, [2 / 3, 0.0, 1.0, np.nan])


def test_distinctness_by_hand() -> None:
    table = interests(
        {1: [UP, RIGHT, DIAGONAL], 2: [UP, UP], 3: [UP, [0.0, -4.0]], 4: [UP, [0.01, 1.0], RIGHT]}
    )
    found = distinctness(table)
    # Cosines 0, 0.7071 and 0.7071; 1; -1; 0.99995, 0 and 0.0099995.
    near = 1 / math.sqrt(1.0001)
    expected = [1 - 2 * math.sqrt(0.5) / 3, 0.0, 2.0, 1 - (near + 0.01 * near) / 3]
    np.testing.assert_allclose(found["distinctness"], expected, atol=1e-6)
    np.testing.assert_allclose(found["near_duplicates"], [0.0, 1.0, 0.0, 2 / 3])
    np.testing.assert_allclose(
        distinctness(table, np.array([2, 0]))["distinctness"], [2.0, expected[0]], atol=1e-6
    )


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 1000))
def test_distinctness_is_bounded_and_symmetric(m: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(m, width))
    one, other = (
        distinctness(InterestVectors.build(np.zeros(m, np.int64), v)) for v in (vectors, vectors[::-1])
    )
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)
    assert np.isnan(one["distinctness"][0]) == (m == 1)
    if m > 1:  # the sum of unit vectors cannot be shorter than zero
        assert -1e-5 <= one["distinctness"][0] <= 1 + 1 / (m - 1) + 1e-5
    assert 0.0 <= one["near_duplicates"][0] <= 1.0


# Intervals and tests.


def test_intervals_cover_the_true_mean() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for i in range(250):
        low, high = estimates({"x": rng.normal(0.3, 1.0, 50)}, samples=100, seed=i)["x"].ci95
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 250 <= 0.98


def test_intervals_of_groups_cover_and_those_of_single_users_do_not() -> None:
    """20 exemplars with 10 members each, who are all alike: 200 users know as little as 20."""
    rng = np.random.default_rng(6)
    covered = {"groups": 0, "users": 0}
    groups = np.repeat(np.arange(20), 10)
    for i in range(120):
        values = rng.normal(0.0, 1.0, 20)[groups] + rng.normal(0.0, 0.1, 200)
        for name, by in (("groups", groups), ("users", None)):
            low, high = estimates({"x": values}, by, samples=100, seed=i)["x"].ci95
            covered[name] += low <= 0.0 <= high
    assert covered["groups"] / 120 > 0.85
    assert covered["users"] / 120 < 0.65


def test_mean_is_over_the_users_that_have_a_value() -> None:
    values = {"a": np.array([1.0, np.nan, 3.0]), "b": np.array([np.nan] * 3)}
    found = estimates(values, np.array([4, 4, 9]), samples=50)
    assert (found["a"].value, found["a"].num_users) == (2.0, 2)
    assert found["a"].ci95 == (1.0, 3.0)
    assert (found["b"].value, found["b"].ci95, found["b"].num_users) == (None, None, 0)
    assert estimates(values, samples=0)["a"].ci95 is None
    assert estimates({}) == {}


def test_the_same_seed_gives_the_same_interval(rng: np.random.Generator) -> None:
    values = {"x": rng.normal(size=30)}
    assert estimates(values, seed=1) == estimates(values, seed=1)
    assert estimates(values, seed=1) != estimates(values, seed=2)


def test_paired_differences_by_hand() -> None:
    a = {"x": np.array([0.0, 0.0, np.nan]), "only a": np.zeros(3)}
    b = {"x": np.array([1.0, 1.0, 5.0])}
    (d,) = paired_differences(a, b)
    assert (d.metric, d.value_a, d.value_b, d.difference, d.ci95, d.num_users) == ("x", 0, 1, 1, (1, 1), 2)
    assert d.p_value == pytest.approx(0.5, abs=0.03)  # two of the four sign assignments are as extreme


def test_p_values_agree_with_those_of_evaluation(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=40), rng.normal(0.4, 1.0, size=40)
    (d,) = paired_differences({"x": a}, {"x": b}, permutations=20_000)
    expected = sign_flip_p_values((b - a)[:, None], 20_000, 7)[0]
    assert d.p_value == pytest.approx(expected, abs=0.01)


def test_users_of_one_group_change_sides_together() -> None:
    """Two groups of 50 equal differences are two observations, not a hundred."""
    a, b = {"x": np.zeros(100)}, {"x": np.ones(100)}
    alone, together = (paired_differences(a, b, g)[0] for g in (None, np.repeat([1, 2], 50)))
    assert alone.p_value < 0.001
    assert together.p_value == pytest.approx(0.5, abs=0.03)


def test_swapping_sides_turns_the_sign(rng: np.random.Generator) -> None:
    a, b = {"x": rng.normal(size=20)}, {"x": rng.normal(size=20)}
    (forward,), (back,) = paired_differences(a, b), paired_differences(b, a)
    assert forward.difference == pytest.approx(-back.difference)
    assert forward.p_value == back.p_value
    assert forward.ci95 == pytest.approx((-back.ci95[1], -back.ci95[0]))
