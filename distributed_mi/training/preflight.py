"""What a training run will need, before anything starts.

Bytes follow from the data structures; those of the backward pass are counted on two small batches and carried to the
size of a worker's share, so they hold for every model. Compared with what is free now on each machine: workers of one
machine share it. What is left out (the allocator's reserve, the caches of the libraries) is covered by `HEADROOM`.

Shapes:  W workers, V rows with padding, D width, S events, U training users, P dense parameters.
"""

import bisect
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.parquet as pq
import torch

from distributed_mi.core.artifacts import Workspace, list_files
from distributed_mi.core.errors import ConfigError
from distributed_mi.core.machine import available_memory_bytes
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.table import LocalItemTable
from distributed_mi.models.base import HistoryBatch, PositionTargets, Recommender, SemanticBatch, TrainBatch
from distributed_mi.training.config import EngineConfig, ScalingConfig, TrainConfig

logger = logging.getLogger(__name__)

HEADROOM = 1.1
"""What is predicted is multiplied by this before it is compared with what is there."""
_PROCESS_BYTES = 600 << 20
"""Interpreter, torch and Ray in one worker, measured; DeepSpeed adds as much again with its imports."""
_PROBE_USERS = (2, 6)
_PROBE_ROWS = 64
_PROBE_WIDTH = 128
_PROBE_INTERESTS = 8
"""Semantic interests of a user in the probe: a language model is asked for about five."""


@dataclass(frozen=True)
class Sizes:
    """Of the data, from manifests."""

    num_rows: int
    """V."""
    num_events: int
    """S."""
    num_users: int
    """U."""
    text_dim: int = 0
    """Width of text vectors; 0 for models without semantics."""
    num_interests: int = 0
    """Interest vectors of all exemplars."""
    mapped: bool = True
    """Whether sequences are mapped files, whose pages the kernel drops when memory is short."""

    @classmethod
    def read(cls, config: TrainConfig, workspace: Workspace) -> "Sizes":
        """From the manifests of the stages before.

        Raises:
            WorkspaceError: one of them is not complete.
        """
        rows = workspace.stage("prepare").require().rows
        sizes = cls(rows["items"] + 1, rows["events"], rows["train"], mapped=workspace.is_local)
        if not config.model.resolve().requires_semantics:
            return sizes
        interests = workspace.stage("interests").require().rows["interest_vectors"]
        return replace(sizes, text_dim=_text_dim(workspace), num_interests=interests)


def _text_dim(workspace: Workspace) -> int:
    """Width of the item vectors of the embed stage, from one row."""
    stage = workspace.stage("embed")
    for shard in list_files(stage.fs, stage.path("item_vectors"), ".parquet"):
        with stage.fs.open_input_file(shard) as source:
            for batch in pq.ParquetFile(source).iter_batches(1, columns=["vector"]):
                return len(batch.column("vector")[0])
    return 0


@dataclass(frozen=True)
class Node:
    """A machine that workers may run on."""

    memory_bytes: int | None
    """Free now; None: unknown."""
    workers: int
    """That run on it."""
    gpu_bytes: int | None = None
    """Free memory of the GPU of one worker; None: the workers have none."""


def this_machine(scaling: ScalingConfig) -> Node:
    """All workers on the calling machine; the least, whose shards are the largest."""
    gpu = None
    if scaling.gpus_per_worker > 0 and torch.cuda.is_available():
        gpu = int(torch.cuda.mem_get_info()[0] * min(1.0, scaling.gpus_per_worker))
    return Node(available_memory_bytes(), scaling.least_workers, gpu)


@dataclass
class Need:
    """Bytes of the worker that needs most, by what they are for."""

    device: dict[str, int] = field(default_factory=dict)
    """Where the model runs: the GPU, or the same memory as `host`."""
    host: dict[str, int] = field(default_factory=dict)
    mapped: int = 0
    """Files mapped into memory, shared by the workers of a machine; not counted, because they can be dropped."""

    def total(self, on_gpu: bool) -> tuple[int, int]:
        """Bytes of host and GPU."""
        device, host = sum(self.device.values()), sum(self.host.values())
        return (host, device) if on_gpu else (host + device, 0)


def predict(config: TrainConfig, sizes: Sizes, workers: int, probe: "Probe") -> Need:
    """What the worker with the largest share needs."""
    dim = config.dim
    rows = math.ceil(sizes.num_rows / workers) + (config.table.replicated_rows if workers > 1 else 0)
    share = math.ceil(min(config.num_users_per_step, max(sizes.num_users, 1)) / workers)
    users = math.ceil(share / config.engine.accumulation)
    negatives = config.negatives.num_negatives
    ids = users * (config.max_history + 1) + negatives
    fetched = min(ids, sizes.num_rows)
    batch = share * (9 * config.max_history + 24) + 12 * negatives
    batch += 4 * sizes.text_dim * (share * (1 + _PROBE_INTERESTS) + negatives)
    need = Need()
    need.device = {
        "item table": rows * (4 * dim + 8),
        "its optimizer state": rows * _state_bytes(config.table, dim),
        "dense parameters and Adam": dense_bytes(config.engine, probe.num_parameters, workers),
        "forward and backward": probe.bytes(users),
        # ids, rows and gradients, here and on their way
        "exchange buffers": fetched * (24 + 4 * 4 * dim) if workers > 1 else fetched * (8 + 2 * 4 * dim),
    }
    if probe.trains_all_rows or (config.table.name == "adam" and not config.table.lazy):
        need.device["dense gradient of the table"] = rows * 4 * dim
    need.host = {
        "process": _PROCESS_BYTES * (2 if config.engine.uses_deepspeed else 1),
        "users of the sampler": 32 * sizes.num_users,
        "catalogue counts": 16 * sizes.num_rows,
        f"prefetch of {config.prefetch} steps": (config.prefetch + 1) * batch,
    }
    sequences = 8 * sizes.num_events + 40 * sizes.num_users
    if sizes.mapped:
        need.mapped = sequences
    else:
        need.host["sequences, read and sorted"] = 2 * sequences
    if sizes.text_dim:
        text = 4 * sizes.text_dim * (sizes.num_rows + sizes.num_interests) + 16 * sizes.num_users
        need.host["text vectors"] = text
    return need


def _state_bytes(table: TableOptimizerConfig, dim: int) -> int:
    """Of the table's optimizer, for one row."""
    return {"adam": 8 * dim + 4, "adagrad": 4 * dim, "row_adagrad": 4, "sgd": 0}[table.name]


def dense_bytes(config: EngineConfig, parameters: int, workers: int) -> int:
    """Values, gradients and Adam's two moments; from ZeRO 1 on a master copy of the values too."""
    stage = config.zero_stage
    whole, spread = {0: (16, 0), 1: (8, 12), 2: (4, 16), 3: (0, 20)}[stage]
    return parameters * whole + math.ceil(parameters * spread / workers)


@dataclass(frozen=True)
class Probe:
    """Memory of a step's graph as a line over the users of a batch."""

    num_parameters: int
    """P."""
    fixed_bytes: float
    bytes_per_user: float
    trains_all_rows: bool = False
    """Whether a step gives every row of the table a gradient, as a softmax over all items does."""

    def bytes(self, users: int) -> int:
        """What is kept for the backward pass, and as much again for the gradients that pass through it."""
        return int(2 * max(0.0, self.fixed_bytes + users * self.bytes_per_user))

    @classmethod
    def measure(cls, config: TrainConfig, sizes: Sizes) -> "Probe":
        """Run two small batches on a table of a few rows, count what autograd keeps, and see which rows are trained.

        At a narrow width, because a configuration that does not fit must not be built; all that a step keeps grows
        with the width at most.
        """
        owner = config.model.resolve()
        settings = config.model.settings("train.model")
        shape = {"max_history": config.max_history, "text_dim": sizes.text_dim}
        width = min(config.dim, _PROBE_WIDTH)
        items = LocalItemTable(2, config.dim)
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                whole = owner(settings, items=items, **shape)
            narrow = LocalItemTable(_PROBE_ROWS, width)
            model = owner(settings, items=narrow, **shape)
            few, many = (_kept_bytes(model, _batch(model, config, sizes, n)) for n in _PROBE_USERS)
        slope = (many - few) / (_PROBE_USERS[1] - _PROBE_USERS[0])
        scale = config.dim / width
        parameters = sum(p.numel() for p in whole.parameters())
        fixed = scale * (few - slope * _PROBE_USERS[0])
        return cls(parameters, fixed, scale * slope, narrow.store.has_gradient_of_all)


def _batch(model: Recommender, config: TrainConfig, sizes: Sizes, users: int) -> TrainBatch:
    """Full histories, so that nothing is smaller than it can be."""
    generator = torch.Generator().manual_seed(0)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(1, _PROBE_ROWS, shape, generator=generator)

    histories, targets = ids(users, config.max_history), ids(users, config.max_history)
    negatives = ids(config.negatives.num_negatives)
    mask = torch.ones_like(histories, dtype=torch.bool)
    semantics = None
    if sizes.text_dim:
        semantics = SemanticBatch(
            torch.ones(users, _PROBE_INTERESTS, sizes.text_dim),
            torch.ones(users, _PROBE_INTERESTS, dtype=torch.bool),
            torch.ones(users, sizes.text_dim),
            torch.ones(len(negatives), sizes.text_dim),
            torch.ones(_PROBE_ROWS, sizes.text_dim) if model.reads_catalogue_text else None,
        )
    every = PositionTargets(targets, mask, targets.numel()) if model.target_rule == "every_position" else None
    return TrainBatch(
        HistoryBatch(histories, mask),
        targets[:, -1].contiguous(),
        negatives,
        semantics=semantics,
        every_position=every,
    )


def _kept_bytes(model: Recommender, batch: TrainBatch) -> int:
    """Bytes of the distinct storages that a forward pass keeps for its backward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = model.loss(batch).total(len(batch.target_ids_B))
    total.backward()
    return sum(kept.values())


@dataclass(frozen=True)
class Verdict:
    """A prediction beside what is there."""

    text: str
    """A small table for people."""
    refusal: str = ""
    """Why the run cannot fit, and what would; empty when it fits or nothing is known about the machines."""
    facts: dict[str, Any] = field(default_factory=dict)


def judge(config: TrainConfig, scaling: ScalingConfig, sizes: Sizes, nodes: Sequence[Node]) -> Verdict:
    """Predict and compare; see `check`."""
    workers = scaling.least_workers
    probe = Probe.measure(config, sizes)
    need = predict(config, sizes, workers, probe)
    on_gpu = scaling.gpus_per_worker > 0
    host, device = need.total(on_gpu)
    lines = [
        f"train {config.run_name}: predicted memory of each of {workers} worker(s), "
        f"{config.num_users_per_step} users a step, width {config.dim}"
    ]
    entries = {**need.device, **need.host}
    lines += [f"  {name:<28}{_size(count):>10}" for name, count in entries.items() if count]
    lines.append(
        f"  {'total':<28}{_size(host + device):>10}" + (f"  ({_size(device)} on the GPU)" if on_gpu else "")
    )
    if need.mapped:
        lines.append(f"  {'mapped files, not counted':<28}{_size(need.mapped):>10}")
    short = []
    for number, node in enumerate(nodes):
        there = "unknown" if node.memory_bytes is None else _size(node.memory_bytes)
        gpu = f", {_size(node.gpu_bytes)} on each GPU" if on_gpu and node.gpu_bytes is not None else ""
        machine = "this machine" if len(nodes) == 1 else f"machine {number + 1}"
        text = f"{machine}: {node.workers} worker(s) need {_size(node.workers * host)}, free are {there}{gpu}"
        lines.append(f"  {text}")
        if not _fits(host, device, node):
            short.append(text)
    facts = {"bytes": entries, "host_bytes": host, "device_bytes": device if on_gpu else 0}
    if not short:
        return Verdict("\n".join(lines), facts=facts)
    remedy = _remedies(config, sizes, workers, nodes, on_gpu, probe)
    refusal = (
        f"train: {short[0]} (predicted with {HEADROOM - 1:.0%} on top). {remedy} "
        "`--force` (train.force=true) starts all the same."
    )
    return Verdict("\n".join(lines), refusal, facts)


def _fits(host: int, device: int, node: Node) -> bool:
    enough = node.memory_bytes is None or HEADROOM * node.workers * host <= node.memory_bytes
    return enough and (node.gpu_bytes is None or HEADROOM * device <= node.gpu_bytes)


def _remedies(
    config: TrainConfig, sizes: Sizes, workers: int, nodes: Sequence[Node], on_gpu: bool, probe: Probe
) -> str:
    """What would fit: more workers on machines of their own, another width, a smaller optimizer state."""

    def fits(other: TrainConfig, count: int, where: Sequence[Node], probed: Probe = probe) -> bool:
        host, device = predict(other, sizes, count, probed).total(on_gpu)
        return all(_fits(host, device, node) for node in where)

    def width_fits(width: int) -> bool:
        other = _with(config, dim=width)
        return fits(other, workers, nodes, Probe.measure(other, sizes))

    largest = max(nodes, key=lambda n: (n.memory_bytes or 0, n.gpu_bytes or 0))
    alone = [replace(largest, workers=1)]
    counts = sorted({*range(2, 65), *(2**i for i in range(7, 15))})
    found = []
    count = next((n for n in counts if fits(config, n, alone)), None)
    if count:
        found.append(f"scaling.num_workers={count} with one worker on each machine of this size")
    # the largest multiple of 8 below the asked width; a smaller width never needs more
    above = bisect.bisect_left(range(1, math.ceil(config.dim / 8)), True, key=lambda n: not width_fits(8 * n))
    if above:
        found.append(f"train.dim={8 * above} here")
    table = config.table.model_copy(update={"name": "row_adagrad"})
    if config.table.name != "row_adagrad" and fits(_with(config, table=table), workers, nodes):
        found.append("train.table.name=row_adagrad here")
    return (
        f"What would fit: {'; '.join(found)}."
        if found
        else "Nothing would fit: neither up to 16,384 workers, nor a width from 8 on, nor a smaller optimizer state."
    )


def _with(config: TrainConfig, **values: Any) -> TrainConfig:
    return config.model_copy(update=values)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def check(
    config: TrainConfig, scaling: ScalingConfig, workspace: Workspace, nodes: Sequence[Node]
) -> dict[str, Any]:
    """Say what every worker will need, and refuse what cannot fit.

    Args:
        config: the run.
        scaling: the workers.
        workspace: with the earlier stages complete.
        nodes: where the workers will run.

    Returns:
        The prediction, for the stage's manifest.

    Raises:
        ConfigError: it does not fit and `train.force` is off; names workers, width or optimizer that would.
        WorkspaceError: an earlier stage is not complete.
    """
    verdict = judge(config, scaling, Sizes.read(config, workspace), nodes)
    logger.info("%s", verdict.text)
    if verdict.refusal and not config.force:
        raise ConfigError(verdict.refusal)
    if verdict.refusal:
        logger.warning("%s", verdict.refusal)
    return verdict.facts
