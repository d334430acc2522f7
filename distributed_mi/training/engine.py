"""Engines: what turns a step's losses into an update of the dense parameters. The only importer of deepspeed.

The loss of a step is the sum of the workers' parts (`LossTerms.total`), so gradients are summed over workers, not
averaged. The item table is not a parameter of the model: its gradients arrive in the same backward pass and its
owner applies them after `Engine.step` (`ItemTable.step`). No engine ever sees the table.

State leaves an engine gathered and by parameter name, so a checkpoint does not depend on engine, ZeRO stage or
number of workers.
"""

import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.models.base import LossTerms, Recommender, TrainBatch
from distributed_mi.training.config import EngineConfig

logger = logging.getLogger(__name__)

_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Objective(nn.Module):
    """A model and its loss as one module, because engines hook `forward` and look for tensors in its output."""

    def __init__(self, model: Recommender, precision: str) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.term_names: list[str] = []

    def forward(self, batch: TrainBatch, num_users: int) -> tuple[Tensor, Tensor]:
        """This worker's part of the loss, and of each term `[num_terms]` without gradient."""
        device_type = batch.target_ids_B.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.precision == "bf16"):
            terms = self.model(batch)
        self.term_names = [*terms.mean, *terms.sum]
        return terms.total(num_users), _parts(terms, num_users)


def _parts(terms: LossTerms, num_users: int) -> Tensor:
    with torch.no_grad():
        parts = [v.sum() / num_users for v in terms.mean.values()] + [v.sum() for v in terms.sum.values()]
        return torch.stack(parts).float()


class Engine(ABC):
    """Trains the dense parameters of one model. Collective: all workers call the same methods in the same order."""

    def __init__(
        self, model: Recommender, config: EngineConfig, *, learning_rate: float, group: WorkerGroup
    ) -> None:
        self.config, self.group, self.learning_rate = config, group, learning_rate
        self.objective = _Objective(model, config.precision)
        self.parameters: dict[str, nn.Parameter] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }

    @property
    def term_names(self) -> list[str]:
        """Names of the loss terms in the order of what `step` returns; known after the first step."""
        return self.objective.term_names

    @abstractmethod
    def step(self, batches: Sequence[TrainBatch], num_users: int) -> Tensor:
        """Backward through this worker's share of a step, then update the dense parameters.

        Args:
            batches: the share in `accumulation` parts.
            num_users: users of the global step.

        Returns:
            This worker's part of each loss term, `[num_terms]`; the parts of all workers add up.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's state as `<parameter>.exp_avg`, `.exp_avg_sq` and `.step`, gathered, on the CPU."""

    @abstractmethod
    def load_state(self, dense: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Continue from what `dense_state` and `optimizer_state` gave, on any engine and number of workers."""

    def dense_state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model, gathered, on the CPU. The table is not part of it."""
        return {n: t.detach().cpu().clone() for n, t in self.objective.model.state_dict().items()}


class PlainEngine(Engine):
    """torch's Adam, and one all-reduce of the flattened dense gradients when there are several workers."""

    def __init__(
        self, model: Recommender, config: EngineConfig, *, learning_rate: float, group: WorkerGroup
    ) -> None:
        super().__init__(model, config, learning_rate=learning_rate, group=group)
        self.optimizer = _adam(self.parameters, learning_rate)

    def step(self, batches: Sequence[TrainBatch], num_users: int) -> Tensor:
        """See `Engine.step`."""
        parts = []
        for batch in batches:
            total, terms = self.objective(batch, num_users)
            total.backward()
            parts.append(terms)
        if self.parameters:
            self._reduce_gradients()
            if self.config.gradient_clipping > 0:
                nn.utils.clip_grad_norm_(self.parameters.values(), self.config.gradient_clipping)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return torch.stack(parts).sum(0)

    def _reduce_gradients(self) -> None:
        if self.group.size == 1:
            return
        parameters = list(self.parameters.values())
        for parameter in parameters:  # one without a gradient here may have one on another worker
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = self.group.all_reduce_sum(
            torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        )
        pieces = flat.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine.optimizer_state`."""
        return _adam_state(self.optimizer, self.parameters)

    def load_state(self, dense: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self.objective.model.load_state_dict(dense)
        _load_adam_state(self.optimizer, self.parameters, optimizer)


class DeepSpeedEngine(Engine):
    """DeepSpeed with ZeRO stage 0, 1 or 2 around the same Adam.

    DeepSpeed averages gradients over workers where this project adds parts up. Scaling the loss would scale the
    table's gradients with it, so the gradient of each dense parameter is multiplied by the number of workers
    instead.
    """

    def __init__(
        self, model: Recommender, config: EngineConfig, *, learning_rate: float, group: WorkerGroup
    ) -> None:
        super().__init__(model, config, learning_rate=learning_rate, group=group)
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
                optimizer=_adam(self.parameters, learning_rate),
                config=self._settings(),
            )

    def _settings(self) -> dict[str, Any]:
        return {
            # DeepSpeed only multiplies these for its own printing; the loop decides what a batch is.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.config.accumulation,
            "zero_optimization": {"stage": self.config.zero_stage},
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
        return torch.stack(parts).sum(0)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine.optimizer_state`. Collective for ZeRO 1 and 2."""
        if self.config.zero_stage == 0:
            return _adam_state(self.optimizer, self.parameters)
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        steps = self._zero_step()
        for name, parameter in self.parameters.items():
            for moment in _ADAM_MOMENTS:
                full = (
                    safe_get_full_optimizer_state(parameter, moment) if steps else torch.zeros_like(parameter)
                )
                state[f"{name}.{moment}"] = full.detach().cpu().clone()
            state[f"{name}.step"] = torch.tensor(float(steps))
        return state

    def _zero_step(self) -> int:
        """Updates that ZeRO's flat optimizer has made."""
        states = self.optimizer.optimizer.state.values()
        return int(max((float(s["step"]) for s in states if "step" in s), default=0))

    def load_state(self, dense: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self.objective.model.load_state_dict(dense)
        if self.config.zero_stage == 0:
            _load_adam_state(self.optimizer, self.parameters, optimizer)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        steps = max(float(optimizer[f"{name}.step"]) for name in self.parameters)
        for group in self.optimizer.optimizer.param_groups:  # ZeRO makes Adam's state at the first update
            for flat in group["params"]:
                self.optimizer.optimizer.state[flat] = {
                    "step": torch.tensor(steps, device=flat.device),
                    **{moment: torch.zeros_like(flat) for moment in _ADAM_MOMENTS},
                }
        self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, dense[name].to(parameter.device))
            for moment in _ADAM_MOMENTS:
                value = optimizer[f"{name}.{moment}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, moment)


def build_engine(
    model: Recommender, config: EngineConfig, *, learning_rate: float, group: WorkerGroup
) -> Engine:
    """The configured engine. A model without dense parameters (only its table is trained) needs none: plain."""
    has_parameters = any(p.requires_grad for p in model.parameters())
    if config.name == "deepspeed" and has_parameters:
        return DeepSpeedEngine(model, config, learning_rate=learning_rate, group=group)
    return PlainEngine(model, config, learning_rate=learning_rate, group=group)


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
    if "__compatible_ops__" not in vars(deepspeed.ops):
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _ensure_process_group() -> None:
    """DeepSpeed wants torch.distributed even alone: a group of one, in memory, without a port."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _adam(parameters: dict[str, nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    if not parameters:
        return torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    return torch.optim.Adam(list(parameters.values()), lr=learning_rate, fused=True)


def _adam_state(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    out = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        for moment in _ADAM_MOMENTS:
            out[f"{name}.{moment}"] = state.get(moment, torch.zeros_like(parameter)).detach().cpu().clone()
        out[f"{name}.step"] = torch.tensor(float(state.get("step", 0.0)))
    return out


def _load_adam_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], saved: dict[str, Tensor]
) -> None:
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            "step": saved[f"{name}.step"].to(parameter.device),
            **{m: saved[f"{name}.{m}"].to(parameter.device).clone() for m in _ADAM_MOMENTS},
        }
