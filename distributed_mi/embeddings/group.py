"""The workers of one step and what they say to each other.

A thin layer over torch.distributed that also works in one process without it (`WorkerGroup.alone()`), so that code
above it has one path. Python objects travel as JSON bytes; no pickle collective is used.

All methods but the properties are collective: every worker calls them, in the same order.
"""

import json
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor


class WorkerGroup:
    """Rank, size and collectives of a group of workers. Build it with `alone` or `from_torch`."""

    def __init__(
        self, rank: int, size: int, device: torch.device, process_group: dist.ProcessGroup | None
    ) -> None:
        self._rank, self._size, self._device, self._group = rank, size, device, process_group

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Self:
        """A group of this process only; torch.distributed is not touched."""
        return cls(0, 1, torch.device(device), None)

    @classmethod
    def from_torch(cls, group: dist.ProcessGroup | None = None) -> Self:
        """The workers of an initialised torch.distributed process group (None: all processes).

        The device is the current CUDA device under NCCL and the CPU otherwise.
        """
        process_group = group if group is not None else dist.group.WORLD
        if dist.get_backend(process_group) == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        else:
            device = torch.device("cpu")
        return cls(dist.get_rank(process_group), dist.get_world_size(process_group), device, process_group)

    @property
    def rank(self) -> int:
        """Number of this worker, from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of workers."""
        return self._size

    @property
    def device(self) -> torch.device:
        """Where tensors must lie to be exchanged."""
        return self._device

    def barrier(self) -> None:
        """Wait for all workers (an all-reduce of one number, which works on every backend and device)."""
        self.all_reduce_sum(torch.zeros(1, device=self._device))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over workers. Returns a new tensor; the argument keeps its value. Without gradients."""
        total = tensor.detach().clone().contiguous()
        if self._size > 1:
            dist.all_reduce(total, group=self._group)
        return total

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Largest over workers, number by number. Returns a new tensor. Without gradients."""
        largest = tensor.detach().clone().contiguous()
        if self._size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return largest

    def all_gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all workers in rank order. The first axis may differ between workers; the others may not.

        Without gradients. Booleans are allowed.
        """
        tensor = tensor.detach()
        if self._size == 1:
            return [tensor]
        sizes = self._all_gather_sizes(tensor.shape[0])
        largest = max(sizes)
        as_bool = tensor.dtype == torch.bool
        mine = tensor.to(torch.uint8) if as_bool else tensor
        padded = mine.new_zeros((largest, *mine.shape[1:]))
        padded[: mine.shape[0]] = mine
        out = [torch.empty_like(padded) for _ in range(self._size)]
        dist.all_gather(out, padded, group=self._group)
        parts = [part[:size] for part, size in zip(out, sizes, strict=True)]
        return [part.bool() for part in parts] if as_bool else parts

    def all_to_all_rows(self, tensor: Tensor, send_counts: list[int]) -> tuple[Tensor, list[int]]:
        """Send consecutive blocks of rows to the workers in rank order, receive theirs. Without gradients.

        Args:
            tensor: `[sum(send_counts), ...]`.
            send_counts: rows for each worker.

        Returns:
            The received rows in rank order of the senders, and how many came from each.
        """
        if self._size == 1:
            return tensor.detach(), list(send_counts)
        counts = torch.tensor(send_counts, dtype=torch.int64, device=self._device)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self._group)
        receive_counts = received.tolist()
        return self.exchange_rows(tensor, send_counts, receive_counts), receive_counts

    def exchange_rows(self, tensor: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """`all_to_all_rows` when the number of rows to receive from each worker is known already."""
        return self.start_exchange(tensor, send_counts, receive_counts).wait()

    def start_exchange(self, tensor: Tensor, send_counts: list[int], receive_counts: list[int]) -> "Exchange":
        """`exchange_rows` that goes on while this worker does other things, collectives among them."""
        sent = tensor.detach().contiguous()
        if self._size == 1:
            return Exchange(sent, sent, None)
        out = tensor.new_empty((sum(receive_counts), *tensor.shape[1:]))
        work = dist.all_to_all_single(
            out, sent, receive_counts, send_counts, group=self._group, async_op=True
        )
        return Exchange(sent, out, work)

    def gather_with_grad(self, tensor: Tensor) -> Tensor:
        """The tensors of all workers, concatenated along the first axis (sizes may differ), with gradients.

        Backward gives each worker the sum over workers of the gradient of its own rows, which is right when the
        loss of the step is the sum of the workers' parts (`LossTerms.total`). Backward is collective too.
        """
        if self._size == 1:
            return tensor
        return _Gather.apply(tensor, self)

    def row_offset(self, num_rows: int) -> int:
        """Where this worker's rows begin in what `gather_with_grad` returns for `num_rows` rows here."""
        if self._size == 1:
            return 0
        return sum(self._all_gather_sizes(num_rows)[: self._rank])

    def broadcast_json(self, value: Any) -> Any:
        """The value of worker 0 on every worker; it must be JSON-ready. The others' argument is ignored."""
        if self._size == 1:
            return json.loads(json.dumps(value))
        return _from_bytes(self.all_gather_rows(self._to_bytes(value if self._rank == 0 else None))[0])

    def all_gather_json(self, value: Any) -> list[Any]:
        """The JSON-ready values of all workers in rank order."""
        if self._size == 1:
            return [json.loads(json.dumps(value))]
        return [_from_bytes(part) for part in self.all_gather_rows(self._to_bytes(value))]

    def _all_gather_sizes(self, size: int) -> list[int]:
        mine = torch.tensor([size], dtype=torch.int64, device=self._device)
        out = [torch.empty_like(mine) for _ in range(self._size)]
        dist.all_gather(out, mine, group=self._group)
        return torch.cat(out).tolist()

    def _to_bytes(self, value: Any) -> Tensor:
        data = bytearray(json.dumps(value).encode())
        return torch.frombuffer(data, dtype=torch.uint8).to(self._device)


class Exchange:
    """Rows on their way."""

    def __init__(self, sent: Tensor, received: Tensor, work: dist.Work | None) -> None:
        self._sent, self._received, self._work = sent, received, work  # `sent` lives until it has left

    def wait(self) -> Tensor:
        """The rows that have come, in rank order of the senders."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._received


def _from_bytes(tensor: Tensor) -> Any:
    return json.loads(tensor.cpu().numpy().tobytes())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: WorkerGroup) -> Tensor:
        parts = group.all_gather_rows(tensor)
        ctx.group = group
        ctx.start = sum(part.shape[0] for part in parts[: group.rank])
        ctx.stop = ctx.start + tensor.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = ctx.group.all_reduce_sum(grads[0])
        return total[ctx.start : ctx.stop], None
