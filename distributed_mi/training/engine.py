"""Engines: what turns a step's losses into an update of the dense parameters.

The loss of a step is the sum of the workers' parts (`LossTerms.total`), so gradients are summed over workers, not
averaged. The item table is not a parameter of the model: its gradients arrive in the same backward pass and its
owner applies them after `Engine.step` (`ItemTable.step`). No engine ever sees the table.

State leaves an engine gathered and by parameter name, so a checkpoint does not depend on engine, ZeRO stage or
number of workers. `PlainEngine` is here, DeepSpeed in `zero.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from distributed_mi.core.cpu import is_plain
from distributed_mi.embeddings.group import WorkerGroup
from distributed_mi.models.base import Recommender, TrainBatch
from distributed_mi.training.config import EngineConfig

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of a parameter beside its number of steps."""
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


class Objective(nn.Module):
    """A model and its loss as one module, because engines hook `forward` and look for tensors in its output."""

    def __init__(self, model: Recommender, precision: str) -> None:
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.term_names: list[str] = []

    def forward(self, batch: TrainBatch, num_users: int) -> tuple[Tensor, Tensor]:
        """This worker's part of the loss, and of each term `[num_terms]` without gradient."""
        if self.bf16:
            with torch.autocast(batch.target_ids_B.device.type, torch.bfloat16):
                terms = self.model(batch)
        else:
            terms = self.model(batch)
        if not self.term_names:
            self.term_names = [*terms.mean, *terms.sum]
        parts = terms.parts(num_users)
        return parts.sum(), parts.detach()


class Engine(ABC):
    """Trains the dense parameters of one model. Collective: all workers call the same methods in the same order."""

    def __init__(
        self, model: Recommender, config: EngineConfig, *, learning_rate: float, group: WorkerGroup
    ) -> None:
        self.config, self.group, self.learning_rate = config, group, learning_rate
        self.objective = Objective(model, config.precision)
        self.parameters: dict[str, nn.Parameter] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        self.num_parameters = sum(p.numel() for p in model.parameters())
        """Numbers in the dense parameters, frozen ones included."""

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

    @contextmanager
    def whole_model(self) -> Iterator[Recommender]:
        """The model with all its dense parameters in this process, to encode with.

        Entering is collective; what happens inside need not be, so that validation cannot hang when workers encode
        different numbers of batches.
        """
        yield self.objective.model


class PlainEngine(Engine):
    """torch's Adam, and one all-reduce of the flattened dense gradients when there are several workers."""

    def __init__(
        self, model: Recommender, config: EngineConfig, *, learning_rate: float, group: WorkerGroup
    ) -> None:
        super().__init__(model, config, learning_rate=learning_rate, group=group)
        self._trained = list(self.parameters.values())
        self.optimizer = adam(self.parameters, learning_rate) if self.parameters else None
        self._arrays: dict[nn.Parameter, tuple[np.ndarray, ...]] = {}
        self._compiled = all(is_plain(parameter) for parameter in self._trained)
        self._fused = self._compiled and config.precision == "fp32" and model.has_own_gradients()

    def step(self, batches: Sequence[TrainBatch], num_users: int) -> Tensor:
        """See `Engine.step`."""
        parts = []
        for batch in batches:
            terms = self._without_autograd(batch, num_users)
            if terms is None:
                total, terms = self.objective(batch, num_users)
                total.backward()
            parts.append(terms)
        if self.optimizer is not None:
            if self.group.size > 1:
                self._reduce_gradients()
            if self.config.gradient_clipping > 0:
                nn.utils.clip_grad_norm_(self._trained, self.config.gradient_clipping)
            self._descend()
            for parameter in self._trained:
                parameter.grad = None
        return add_parts(parts)

    def _without_autograd(self, batch: TrainBatch, num_users: int) -> Tensor | None:
        """See `Recommender.loss_and_gradients`."""
        if not self._fused:
            return None
        found = self.objective.model.loss_and_gradients(batch, num_users)
        if found is None:
            return None
        self.objective.term_names = list(found)
        return torch.tensor(list(found.values()))

    def _descend(self) -> None:
        """A step of Adam; on a CPU without torch's optimizer object, whose Python costs ten times the arithmetic."""
        assert self.optimizer is not None
        if not self._compiled:
            self.optimizer.step()
            return
        from distributed_mi.embeddings import kernels

        for parameter, gradient in ((p, p.grad) for p in self._trained):
            if gradient is None:
                continue
            if parameter not in self._arrays:
                self._arrays[parameter] = self._arrays_of(parameter)
            flat = gradient.contiguous().numpy().reshape(-1)
            kernels.dense_adam(*self._arrays[parameter], flat, self.learning_rate, *ADAM_BETAS, ADAM_EPS)

    def _arrays_of(self, parameter: nn.Parameter) -> tuple[np.ndarray, ...]:
        """A parameter and its state where they lie, as `kernels.dense_adam` changes them."""
        assert self.optimizer is not None
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state |= {moment: torch.zeros_like(parameter) for moment in ADAM_MOMENTS}
        changed = (parameter.detach(), *(state[moment] for moment in ADAM_MOMENTS), state["step"])
        return tuple(tensor.view(-1).numpy() for tensor in changed)

    def _reduce_gradients(self) -> None:
        parameters = self._trained
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
        return adam_state(self.optimizer, self.parameters)

    def load_state(self, dense: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        self.objective.model.load_state_dict(dense)
        load_adam_state(self.optimizer, self.parameters, optimizer)
        self._arrays.clear()


def build_engine(
    model: Recommender, config: EngineConfig, *, learning_rate: float, group: WorkerGroup
) -> Engine:
    """The configured engine. A model without dense parameters (only its table is trained) needs none: plain."""
    has_parameters = any(p.requires_grad for p in model.parameters())
    if config.uses_deepspeed and has_parameters:
        from distributed_mi.training.zero import DeepSpeedEngine  # seconds of imports

        return DeepSpeedEngine(model, config, learning_rate=learning_rate, group=group)
    return PlainEngine(model, config, learning_rate=learning_rate, group=group)


def add_parts(parts: list[Tensor]) -> Tensor:
    """Loss terms of a step from those of its accumulation parts."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def adam(parameters: dict[str, nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Torch's Adam in one kernel for all parameters."""
    return torch.optim.Adam(
        list(parameters.values()), lr=learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True
    )


def adam_state(
    optimizer: torch.optim.Optimizer | None, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Adam's state by parameter name, copied to the CPU; zeros before the first step."""
    out = {}
    for name, parameter in parameters.items():
        assert optimizer is not None
        state = optimizer.state.get(parameter, {})
        for moment in ADAM_MOMENTS:
            out[f"{name}.{moment}"] = state.get(moment, torch.zeros_like(parameter)).detach().cpu().clone()
        out[f"{name}.step"] = torch.tensor(float(state.get("step", 0.0)))
    return out


def load_adam_state(
    optimizer: torch.optim.Optimizer | None, parameters: dict[str, nn.Parameter], saved: dict[str, Tensor]
) -> None:
    """Set what `adam_state` gave."""
    for name, parameter in parameters.items():
        assert optimizer is not None
        optimizer.state[parameter] = {
            "step": saved[f"{name}.step"].to(parameter.device).clone(),
            **{m: saved[f"{name}.{m}"].to(parameter.device).clone() for m in ADAM_MOMENTS},
        }
