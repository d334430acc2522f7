"""Matrix products in the precision that autocast asks for, inside gradients that are written out.

Autocast does not reach into the backward of a `torch.autograd.Function`, and compiled kernels read float32. So such a
function asks once what the products are to be taken in, and rounds their factors itself.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def product_dtype(device_type: str) -> "torch.dtype | None":
    """What autocast takes matrix products in; None: it is off, factors stay as they are."""
    import torch

    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def product(one: "Tensor", other: "Tensor", dtype: "torch.dtype | None") -> "Tensor":
    """`one @ other` of factors rounded to `dtype`, rounded once more, as float32; unchanged factors for None."""
    return one @ other if dtype is None else (one.to(dtype) @ other.to(dtype)).float()
