"""DeepSpeed: the dense parameters with optimizer states, gradients and parameters spread over workers (ZeRO 0 to 3).

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020. The only importer
of deepspeed.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.models.base import Recommender, TrainBatch
from distributed_mi.training.config import EngineConfig
from distributed_mi.training.engine import (
    ADAM_MOMENTS,
    Engine,
    adam,
    adam_state,
    add_parts,
    load_adam_state,
)

KEPT_WHOLE = 100_000
"""Stage 3 leaves parameters below so many numbers whole on every worker (DeepSpeed's default): to gather them at every
use costs more than they take. Their optimizer states are spread all the same."""


class DeepSpeedEngine(Engine):
    """DeepSpeed around the same Adam as the plain engine's.

    DeepSpeed averages gradients over workers where this project adds parts up. Scaling the loss would scale the
    table's gradients with it, so the gradient of each dense parameter is multiplied by the number of workers
    instead.
    """

    def __init__(
        self, model: Recommender, config: EngineConfig, *, learning_rate: float, group: WorkerGroup
    ) -> None:
        super().__init__(model, config, learning_rate=learning_rate, group=group)
        self.stage = config.zero_stage
        # For validation at stage 3, where the model itself holds fragments; takes no memory until it is asked for.
        self._whole = _without_values(model) if self.stage == 3 else None
        deepspeed = import_deepspeed()
        _ensure_process_group()
        deepspeed.init_distributed(dist_backend=dist.get_backend())
        if group.size > 1:
            for parameter in self.parameters.values():
                parameter.register_hook(lambda grad: grad * group.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self.objective,
                optimizer=adam(self.parameters, learning_rate),
                config=self._settings(),
            )
        if self.stage == 3:
            # The model gets and gives dataclasses, in which DeepSpeed finds no tensors to hook, so what a model holds
            # itself (and not in a layer) is gathered with the module around it.
            for parameter in model.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(self.objective, parameter)

    def _settings(self) -> dict[str, Any]:
        # DeepSpeed allocates its buckets whole, 2 GB each by default.
        bucket = max(self.num_parameters, 1)
        return {
            # DeepSpeed only multiplies these for its own printing; the loop decides what a batch is.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.config.accumulation,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "stage3_prefetch_bucket_size": bucket,
                "stage3_param_persistence_threshold": KEPT_WHOLE,
            },
            # Left out, DeepSpeed clips at 1.0, which also costs an all-reduce of the norm at every step.
            "gradient_clipping": self.config.gradient_clipping,
            "steps_per_print": 1 << 60,
        }

    def step(self, batches: Sequence[TrainBatch], num_users: int) -> Tensor:
        """See `Engine.step`."""
        parts = []
        for batch in batches:
            total, terms = self.engine(batch, num_users)
            # Parts of a share add up too, so DeepSpeed must not divide by their number.
            self.engine.backward(total, scale_wrt_gas=False)
            self.engine.step()
            parts.append(terms)
        return add_parts(parts)

    def dense_state(self) -> dict[str, Tensor]:
        """See `Engine.dense_state`. Collective for ZeRO 3, which gathers one parameter after the other."""
        if self.stage < 3:
            return super().dense_state()
        out = {}
        for name, tensor in self.objective.model.state_dict(keep_vars=True).items():
            with _gathered(tensor):
                out[name] = tensor.detach().cpu().clone()
        return out

    @contextmanager
    def whole_model(self) -> Iterator[Recommender]:
        """See `Engine.whole_model`. At stage 3 a second module gets the gathered values for as long as it lasts."""
        if self._whole is None:
            yield self.objective.model
            return
        values = self.dense_state()
        model = self._whole.train(self.objective.model.training)
        for name, parameter in model.named_parameters():
            parameter.data = values[name].to(self.group.device)
        for name, buffer in model.named_buffers():
            if name in values:
                buffer.copy_(values[name])
        try:
            yield model
        finally:
            _drop_values(model)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine.optimizer_state`. Collective for ZeRO 1 to 3."""
        if self.stage == 0:
            return adam_state(self.optimizer, self.parameters)
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        steps = self._zero_step()
        for name, parameter in self.parameters.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for moment in ADAM_MOMENTS:
                full = safe_get_full_optimizer_state(parameter, moment) if steps else torch.zeros(shape)
                state[f"{name}.{moment}"] = full.detach().cpu().clone().view(shape)
            state[f"{name}.step"] = torch.tensor(float(steps))
        return state

    def _zero_step(self) -> int:
        """Updates that ZeRO's flat optimizer has made."""
        states = self.optimizer.optimizer.state.values()
        return int(max((float(s["step"]) for s in states if "step" in s), default=0))

    def load_state(self, dense: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        if self.stage == 0:
            self.objective.model.load_state_dict(dense)
            load_adam_state(self.optimizer, self.parameters, optimizer)
            return
        self._begin_state(max(float(optimizer[f"{name}.step"]) for name in self.parameters))
        if self.stage == 3:
            self._load_fragments(dense, optimizer)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.objective.model.load_state_dict(dense)
        self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, dense[name].to(parameter.device))
            for moment in ADAM_MOMENTS:
                value = optimizer[f"{name}.{moment}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, moment)

    def _begin_state(self, steps: float) -> None:
        """Adam's state of ZeRO's flat parameters, which ZeRO itself makes at the first update only."""
        if self.stage == 3:
            flats = self.optimizer.fp32_partitioned_groups_flat
        else:
            flats = [flat for group in self.optimizer.optimizer.param_groups for flat in group["params"]]
        for flat in flats:
            self.optimizer.optimizer.state[flat] = {
                "step": torch.tensor(steps, device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in ADAM_MOMENTS},
            }

    def _load_fragments(self, dense: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Stage 3: the values to compute with, and this worker's fragments of master values and Adam's moments."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        with torch.no_grad():
            for name, tensor in self.objective.model.state_dict(keep_vars=True).items():
                with _gathered(tensor, modifier_rank=0):
                    tensor.copy_(dense[name].to(tensor.device))
        for name, parameter in self.parameters.items():
            safe_set_local_fp32_param(parameter, self._fragment(parameter, dense[name]))
            for moment in ADAM_MOMENTS:
                value = self._fragment(parameter, optimizer[f"{name}.{moment}"])
                safe_set_local_optimizer_state(parameter, value, moment)

    def _fragment(self, parameter: Any, value: Tensor) -> Tensor:
        """This worker's part of a parameter-shaped value; the last worker's is padded with zeros."""
        size = parameter.ds_tensor.numel()
        flat = value.reshape(-1)[self.group.rank * size : (self.group.rank + 1) * size]
        padding = flat.new_zeros(size - len(flat))
        return torch.cat([flat, padding]).to(parameter.ds_tensor.device)


@contextmanager
def _gathered(tensor: Tensor, modifier_rank: int | None = None) -> Iterator[None]:
    """A parameter of stage 3 whole, on all workers; anything else as it is."""
    if not hasattr(tensor, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=modifier_rank):
        yield


def _without_values(model: Recommender) -> Recommender:
    """A copy of a model that shares its table and whose parameters hold nothing."""
    twin = copy.deepcopy(model, {id(model.items): model.items})
    _drop_values(twin)
    return twin


def _drop_values(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def import_deepspeed() -> Any:
    """Import DeepSpeed without its chatter, its compiler probes and its compilation.

    `init_distributed` asks `deepspeed.ops.__compatible_ops__` whether its shared-memory collective can be built and
    then builds it with g++, up to minutes on a cold cache; merely reading that attribute probes every operator by
    running compilers. An empty answer set beforehand means plain gloo or NCCL and torch's Adam, which is all that
    is used here.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # Ray Train sets it; DeepSpeed refuses to start without
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # ZeRO 3 calls collectives by names that torch 2.13 has renamed, and torch says so at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if "__compatible_ops__" not in vars(deepspeed.ops):
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _ensure_process_group() -> None:
    """DeepSpeed wants torch.distributed even alone: a group of one, in memory, without a port."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
