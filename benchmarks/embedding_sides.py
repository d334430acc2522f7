"""Sides of `bench_embedding`: one table over the processes of a group, looked up, given a gradient, updated.

Each side is made with `(rows, width)` and called with the ids of a batch; a call is one step. The gradient of a
looked-up row is the row times `GRADIENT`, so all sides learn the same rows. torchrec is an optional extra.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.counters import TableCounters
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.embeddings.optimizer import make_optimizer
from distributed_mi.embeddings.placement import make_placement
from distributed_mi.embeddings.sharded import ShardedItemTable

GRADIENT = 0.01
LEARNING_RATE = 0.05
EPS = 1e-8
STD = 0.02

Step = Callable[[Tensor], None]
"""`step(ids)`, ids `[users, length]` in 1 .. rows - 1."""


class Ours:
    """`ShardedItemTable` with row-wise Adagrad."""

    def __init__(
        self, rows: int, width: int, *, exchange: torch.dtype, replicated: int = 0, placement: str = "modulo"
    ) -> None:
        group = WorkerGroup.from_torch()
        optimizer = make_optimizer(TableOptimizerConfig(name="row_adagrad", eps=EPS))
        self.table = ShardedItemTable(
            rows,
            width,
            group=group,
            std=STD,
            optimizer=optimizer,
            exchange_dtype=exchange,
            replicated_rows=replicated,
            placement=make_placement(placement, rows, group.size),
        )

    def __call__(self, ids: Tensor) -> None:
        """One step."""
        found = self.table.rows(ids)
        found.backward(found.detach() * GRADIENT)
        self.table.step(LEARNING_RATE)

    def weight(self, ids: Tensor) -> Tensor:
        """Rows as they are now."""
        with torch.no_grad():
            return self.table.rows(ids)

    def counters(self) -> TableCounters:
        """What lookups have cost since the last call."""
        return self.table.take_counters()


class TorchRec:
    """TorchRec's row-wise sharding with FBGEMM's fused row-wise Adagrad, as its planner lays it out."""

    def __init__(self, rows: int, width: int) -> None:
        import torchrec
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.embedding_types import EmbeddingComputeKernel
        from torchrec.distributed.model_parallel import DistributedModelParallel
        from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
        from torchrec.distributed.planner.types import ParameterConstraints
        from torchrec.distributed.types import ShardingType

        table = torchrec.EmbeddingConfig(
            name="item_table", embedding_dim=width, num_embeddings=rows, feature_names=["item"]
        )
        tables = torchrec.EmbeddingCollection(tables=[table], device=torch.device("meta"))
        options = {
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": LEARNING_RATE,
            "eps": EPS,
        }
        sharder: Any = EmbeddingCollectionSharder(fused_params=options)
        size = dist.get_world_size()
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=size, compute_device="cpu", local_world_size=size),
            constraints={
                "item_table": ParameterConstraints(
                    sharding_types=[ShardingType.ROW_WISE.value],
                    compute_kernels=[EmbeddingComputeKernel.FUSED.value],
                )
            },
        )
        plan = planner.collective_plan(tables, [sharder], dist.group.WORLD)
        self.model = DistributedModelParallel(
            tables, device=torch.device("cpu"), plan=plan, sharders=[sharder]
        )
        self.keyed = torchrec.KeyedJaggedTensor

    def __call__(self, ids: Tensor) -> None:
        """One step: backward updates the rows."""
        found = self._rows(ids)
        found.backward(found.detach() * GRADIENT)

    def _rows(self, ids: Tensor) -> Tensor:
        lengths = torch.full((len(ids),), ids.shape[1])
        keyed = self.keyed(keys=["item"], values=ids.reshape(-1), lengths=lengths)
        rows: Tensor = self.model(keyed)["item"].values()
        return rows

    def fill(self, first: Tensor) -> None:
        """Overwrite this process's part of the table: rows of whole-table `first`."""
        rank, size = dist.get_rank(), dist.get_world_size()
        per_worker = -(-len(first) // size)
        mine = first[rank * per_worker : (rank + 1) * per_worker]
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(mine)

    def weight(self, ids: Tensor) -> Tensor:
        """Rows as they are now."""
        with torch.no_grad():
            return self._rows(ids[None])


class SparseDDP:
    """`nn.Embedding(sparse=True)` in DistributedDataParallel: the whole table in each process, plain SGD (no state)."""

    def __init__(self, rows: int, width: int) -> None:
        table = torch.nn.Embedding(
            rows, width, sparse=True, _weight=torch.empty(rows, width).normal_(std=STD)
        )
        self.model = torch.nn.parallel.DistributedDataParallel(table, init_sync=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def __call__(self, ids: Tensor) -> None:
        """One step."""
        found = self.model(ids)
        found.backward(found.detach() * GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad()


MAKE: dict[str, Callable[[int, int], Any]] = {
    "ours": lambda rows, width: Ours(rows, width, exchange=torch.float32),
    "ours, bf16 exchange": lambda rows, width: Ours(rows, width, exchange=torch.bfloat16),
    "ours, 10,000 rows replicated": lambda rows, width: Ours(
        rows, width, exchange=torch.float32, replicated=10_000
    ),
    "TorchRec row-wise fused": TorchRec,
    "nn.Embedding sparse, DDP": SparseDDP,
}
"""Sides by name."""
