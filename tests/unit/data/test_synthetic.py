"""The generated log: its planted answer is in it, and it can be learned."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from distributed_mi.data.readers import synthetic
from distributed_mi.data.readers.synthetic import SyntheticReader, planted


def read(config, what):
    reader = SyntheticReader(config)
    tables = [p.rows for task in reader.plan(None, [], what) for p in reader.read(task, what)]
    return pl.DataFrame(pl.from_arrow(pa.concat_tables(tables)))


@pytest.fixture(scope="module")
def config():
    return SyntheticReader.Config(num_users=400, num_items=300, num_topics=10, seed=5)


def test_sizes_are_as_configured(config):
    events = read(config, "interactions").group_by("user_id").len()
    assert events.height == 400
    assert (events["len"].min(), events["len"].max()) == (8, 30)


def test_every_event_belongs_to_a_planted_topic_of_its_user(config):
    answer = planted(config)
    pairs = read(config, "interactions").select("user_id", "item_id").rows()
    assert all(answer.topic_of_item[item] in answer.topics_of_user[user] for user, item in pairs)
    sizes = {len(topics) for topics in answer.topics_of_user.values()}
    assert sizes == {2, 3, 4}


def test_category_is_the_topic_and_titles_are_made_of_its_words(config):
    answer, items = planted(config), read(config, "items")
    for item_id, title, categories in items.select("item_id", "title", "categories").rows():
        topic = answer.topic_names[answer.topic_of_item[item_id]]
        assert categories == [topic]
        words = synthetic.TOPICS[topic].replace("-", " ").title().split()
        assert sum(word in words for word in title.split()) >= 2
    assert items["title"].n_unique() == items.height


def test_more_topics_than_words_are_numbered():
    answer = planted(SyntheticReader.Config(num_users=3, num_items=90, num_topics=45))
    assert answer.topic_names[0] == "Coffee"
    assert answer.topic_names[40] == "Coffee 2"
    assert len(set(answer.topic_names)) == 45


def test_blocks_of_users_are_drawn_alone(config, monkeypatch):
    monkeypatch.setattr(synthetic, "_USERS_PER_TASK", 150)
    events = read(config, "interactions")
    reader = SyntheticReader(config)
    tasks = reader.plan(None, [], "interactions")
    assert [(t.start, t.stop) for t in tasks] == [(0, 150), (150, 300), (300, 400)]
    alone = pl.DataFrame(pl.from_arrow(next(reader.read(tasks[2], "interactions")).rows))
    assert events.tail(alone.height).equals(alone)
    assert events["source_order"].is_sorted()
    assert events["user_id"].n_unique() == 400
    assert len(planted(config).topics_of_user) == 400


def test_seeds_differ(config):
    other = config.model_copy(update={"seed": 6})
    assert not read(config, "interactions").equals(read(other, "interactions"))


def test_times_rise_within_a_user(config):
    falls = (
        read(config, "interactions").select((pl.col("timestamp").diff() <= 0).over("user_id").sum()).item()
    )
    assert falls == 0


def test_knowing_the_last_item_of_each_topic_beats_popularity_by_far():
    """The known answer as a recommender: the next places on the ring of each topic of the history."""
    config = SyntheticReader.Config(num_users=500)
    events = read(config, "interactions")
    popular = set(events["item_id"].value_counts(sort=True)["item_id"].head(20).to_list())
    hits, popular_hits = [], []
    for user in events.partition_by("user_id", maintain_order=True):
        items = [int(i.removeprefix("item-")) for i in user["item_id"]]
        cut = int(0.8 * len(items))
        last = {item % 40: item // 40 for item in items[:cut]}
        ahead = [(place + step) % 50 * 40 + topic for step in range(1, 21) for topic, place in last.items()][
            :20
        ]
        hits.append(np.mean([item in ahead for item in items[cut:]]))
        popular_hits.append(np.mean([f"item-{item:06d}" in popular for item in items[cut:]]))
    assert np.mean(hits) > 0.5
    assert np.mean(hits) > 10 * np.mean(popular_hits)
