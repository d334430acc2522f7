"""How the configuration lays a table on workers."""

import numpy as np
import torch

from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.placement import Hashed, Modulo, Ranges
from distributed_mi.embeddings.sharded import ShardedItemTable
from distributed_mi.training.config import TrainConfig
from distributed_mi.training.worker import model_spec, sharding

COUNTS_V = np.concatenate([[0], np.arange(40, 0, -1)])


def table(**fields: object) -> ShardedItemTable:
    """The table of worker 0 of 2, which nothing is exchanged to build."""
    sizes = {"dim": 4, "num_users_per_step": 4, "max_history": 5, "negatives": {"num_negatives": 1}}
    config = TrainConfig.model_validate(sizes | {"table": fields})
    spec = model_spec(config, len(COUNTS_V), 0)
    group = WorkerGroup(0, 2, torch.device("cpu"), None)
    found = spec.build_table(group, **sharding(config, COUNTS_V, group.size))
    assert isinstance(found, ShardedItemTable)
    return found


def test_the_placement_of_the_configuration_is_that_of_the_table() -> None:
    kinds = {"modulo": Modulo, "hashed": Hashed, "ranges": Ranges}
    assert {name: type(table(placement=name).placement) for name in kinds} == kinds


def test_ranges_follow_the_counts() -> None:
    placement = table(placement="ranges").placement
    assert isinstance(placement, Ranges)
    assert placement.bounds[1] < len(COUNTS_V) / 2  # the popular half of the rows is asked for more often


def test_replicated_rows_and_the_exchange_reach_the_table() -> None:
    found = table(replicated_rows=7, exchange="bf16")
    assert found.exchange_dtype == torch.bfloat16
    assert found._hot.num_rows == 7
    assert table().exchange_dtype == torch.float32
    assert table()._hot.num_rows == 0
