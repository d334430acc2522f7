"""Optimizers of table rows. A step costs the rows it touches, not the table.

Against their dense twins in torch (`tests/parity/test_sharded_table.py`):
    sgd          equal: a row without gradient does not move in either.
    adagrad      equal to `torch.optim.Adagrad`, for the same reason.
    row_adagrad  one accumulator per row, the mean of its squared gradients (FBGEMM's row-wise Adagrad); no twin.
    adam, lazy   equal to `torch.optim.Adam` when every row is touched at every step. Otherwise a row that is not
                 touched keeps its moments and does not move, and bias correction counts the row's own updates;
                 torch's dense Adam decays the moments of all rows and moves them on, and `torch.optim.SparseAdam`
                 corrects by the global step.
    adam, dense  equal to `torch.optim.Adam` always; costs the whole table at every step.

Shapes:  R rows of this worker, U distinct rows touched in a step, D width.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_mi.core.cpu import map_slices
from distributed_mi.embeddings.config import TableOptimizerConfig
from distributed_mi.embeddings.gradients import Grouped, RowGradients

_CORRECTIONS = 8_192
"""Counts of updates for which Adam's corrections of the bias stand in a table."""


class TableOptimizer(ABC):
    """Turns row gradients into row updates. Holds no tensors: the state lies beside the rows."""

    touches_all_rows: bool = False
    """Whether a step changes rows without gradient too; then `update` gets every row."""

    @abstractmethod
    def init_state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """Name -> state tensor whose first axis is the rows."""

    @abstractmethod
    def update(
        self, weight_RD: Tensor, state: dict[str, Tensor], slots_U: Tensor, grad_UD: Tensor, lr: float
    ) -> None:
        """Change the rows in `slots_U` (distinct) and their state in place; torch operations, on any device."""

    def apply(self, weight_RD: Tensor, state: dict[str, Tensor], gradients: RowGradients, lr: float) -> int:
        """`update` for gradients that still have to be added up, on a CPU by the compiled form; how many rows."""
        if gradients.compiled:
            arrays = {name: tensor.numpy() for name, tensor in state.items()}
            weight, grouped = weight_RD.numpy(), gradients.grouped()
            map_slices(
                lambda rows: self._run_kernel(weight, arrays, grouped.of_rows(rows), lr),
                len(grouped.slots_U),
                weight.shape[1],
            )
            return len(grouped.slots_U)
        slots_U, totals_UD = gradients.summed()
        self.update(weight_RD, state, slots_U, totals_UD, lr)
        return len(slots_U)

    @abstractmethod
    def _run_kernel(self, weight_RD: Any, state: dict[str, Any], grouped: Grouped, lr: float) -> None:
        """The compiled form of `update`, on arrays; `grouped` as `RowGradients.grouped` gives it."""


def make_optimizer(config: TableOptimizerConfig | None = None) -> TableOptimizer:
    """The optimizer of a configuration (None: the defaults)."""
    config = config or TableOptimizerConfig()
    if config.name == "sgd":
        return SGD()
    if config.name == "adagrad":
        return Adagrad(eps=config.eps, initial_accumulator=config.initial_accumulator)
    if config.name == "row_adagrad":
        return RowAdagrad(eps=config.eps, initial_accumulator=config.initial_accumulator)
    if config.lazy:
        return LazyAdam(beta1=config.beta1, beta2=config.beta2, eps=config.eps)
    return DenseAdam(beta1=config.beta1, beta2=config.beta2, eps=config.eps)


class SGD(TableOptimizer):
    """Gradient descent without momentum."""

    def init_state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """No state."""
        return {}

    def update(
        self, weight_RD: Tensor, state: dict[str, Tensor], slots_U: Tensor, grad_UD: Tensor, lr: float
    ) -> None:
        """`w -= lr g`."""
        weight_RD.index_add_(0, slots_U, grad_UD, alpha=-lr)

    def _run_kernel(self, weight_RD: Any, state: dict[str, Any], grouped: Grouped, lr: float) -> None:
        from distributed_mi.embeddings import kernels

        kernels.sgd(weight_RD, *grouped, lr)


class Adagrad(TableOptimizer):
    """Duchi et al. 2011: `s += g^2; w -= lr g / (sqrt(s) + eps)`, number by number."""

    def __init__(self, *, eps: float = 1e-10, initial_accumulator: float = 0.0) -> None:
        self.eps, self.initial_accumulator = eps, initial_accumulator

    def init_state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """`sum_of_squares` `[R, D]`."""
        return {"sum_of_squares": torch.full_like(weight_RD, self.initial_accumulator)}

    def squares(self, grad_UD: Tensor) -> Tensor:
        """What is added to the accumulator."""
        return grad_UD.square()

    def update(
        self, weight_RD: Tensor, state: dict[str, Tensor], slots_U: Tensor, grad_UD: Tensor, lr: float
    ) -> None:
        """Accumulate and descend."""
        sums = state["sum_of_squares"].index_select(0, slots_U).add_(self.squares(grad_UD))
        state["sum_of_squares"].index_copy_(0, slots_U, sums)
        weight_RD.index_add_(0, slots_U, grad_UD / sums.sqrt().add_(self.eps), alpha=-lr)

    def _run_kernel(self, weight_RD: Any, state: dict[str, Any], grouped: Grouped, lr: float) -> None:
        from distributed_mi.embeddings import kernels

        kernels.adagrad(weight_RD, state["sum_of_squares"], *grouped, lr, self.eps)


class RowAdagrad(Adagrad):
    """Adagrad with one accumulator per row: the mean over the row of its squared gradients."""

    def init_state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """`sum_of_squares` `[R, 1]`."""
        return {"sum_of_squares": torch.full_like(weight_RD[:, :1], self.initial_accumulator)}

    def squares(self, grad_UD: Tensor) -> Tensor:
        """Mean square of each row."""
        return grad_UD.square().mean(dim=1, keepdim=True)

    def _run_kernel(self, weight_RD: Any, state: dict[str, Any], grouped: Grouped, lr: float) -> None:
        from distributed_mi.embeddings import kernels

        kernels.row_adagrad(weight_RD, state["sum_of_squares"][:, 0], *grouped, lr, self.eps)


class LazyAdam(TableOptimizer):
    """Adam (Kingma and Ba 2015) on the touched rows, each with its own count of updates."""

    def __init__(self, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        # In float64: 1 - 0.999 loses four of float32's seven digits.
        count_T = np.arange(_CORRECTIONS, dtype=np.float64)
        self._corrections = np.stack([1 - beta1**count_T, np.sqrt(1 - beta2**count_T)], axis=1)

    def init_state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """`mean` and `mean_square` `[R, D]`, `num_updates` `[R]` int32."""
        count = torch.zeros(weight_RD.shape[0], dtype=torch.int32, device=weight_RD.device)
        return {
            "mean": torch.zeros_like(weight_RD),
            "mean_square": torch.zeros_like(weight_RD),
            "num_updates": count,
        }

    def update(
        self, weight_RD: Tensor, state: dict[str, Tensor], slots_U: Tensor, grad_UD: Tensor, lr: float
    ) -> None:
        """Decay the moments, add the gradient, correct the bias by the row's count, descend."""
        count_U = state["num_updates"].index_select(0, slots_U).add_(1)
        mean = state["mean"].index_select(0, slots_U).lerp_(grad_UD, 1 - self.beta1)
        square = state["mean_square"].index_select(0, slots_U).mul_(self.beta2)
        square.addcmul_(grad_UD, grad_UD, value=1 - self.beta2)
        state["num_updates"].index_copy_(0, slots_U, count_U)
        state["mean"].index_copy_(0, slots_U, mean)
        state["mean_square"].index_copy_(0, slots_U, square)
        # In float64: 1 - 0.999 loses four of float32's seven digits.
        steps_U1 = count_U.double()[:, None]
        root_correction_U1 = (1 - self.beta2**steps_U1).sqrt().to(square.dtype)
        step_size_U1 = (lr / (1 - self.beta1**steps_U1)).to(mean.dtype)
        denominator = square.sqrt_().div_(root_correction_U1).add_(self.eps)
        weight_RD.index_add_(0, slots_U, mean.mul_(step_size_U1).div_(denominator), alpha=-1)

    def _run_kernel(self, weight_RD: Any, state: dict[str, Any], grouped: Grouped, lr: float) -> None:
        from distributed_mi.embeddings import kernels

        moments = (state["mean"], state["mean_square"], state["num_updates"])
        betas = (self.beta1, self.beta2)
        kernels.adam(weight_RD, *moments, *grouped, lr, *betas, self.eps, self._corrections)


class DenseAdam(LazyAdam):
    """Adam as in torch: every row decays and moves at every step, and the count is the number of steps."""

    touches_all_rows = True
