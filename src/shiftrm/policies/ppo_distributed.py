"""Several processes that share one PPO run, as `accelerate launch` starts them.

Each holds whole models. All make the same random draws, each does its share of the work, and sums
over the processes make every number global; so what a step computes does not depend on how many
there are, up to the order of floating-point sums.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shiftrm.errors import UserError

T = TypeVar("T")

BUCKET = 2**25
"""Elements of gradients in one exchange."""


class Processes:
    """This process among the others of the run.

    Args:
        device: where tensors to exchange must lie: the models'.

    Attributes:
        index, count: 0 is the main process, the one that writes files.

    Raises:
        UserError: a launch with FSDP or DeepSpeed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.index, self.count = device, 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
            return
        for name in ("FSDP", "DEEPSPEED"):
            if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
                raise UserError(
                    f"PPO does not run under {name}: each process samples with the whole policy; "
                    "launch with distributed_type: MULTI_GPU, and use LoRA where memory is short"
                )
        from accelerate import PartialState

        PartialState()  # joins the group that the launcher describes
        if dist.is_initialized():
            self.index, self.count = dist.get_rank(), dist.get_world_size()

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """Every count-th item, from the index on; none at all where there are too few."""
        return list(items[self.index :: self.count])

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes, one after the other."""
        if self.count == 1:
            return items
        lists: list[Any] = [None] * self.count
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, bit for bit the same on each."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """`sum_` of every gradient; a process without rows adds zeros."""
        if self.count == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_type.values():
            for bucket in _buckets(gradients):
                flat = self.sum_(torch.cat([g.flatten() for g in bucket]))
                sizes = [g.numel() for g in bucket]
                for gradient, summed in zip(bucket, flat.split(sizes), strict=True):
                    gradient.copy_(summed.view_as(gradient))

    def same_as_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the main process."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work without exchanges that may fail on one process: then it fails on all.

        The one that failed raises its own exception, the others a UserError in its words, so that
        none waits for ever. Every process must come here.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.fail_if_any(error)

    def fail_if_any(self, error: Exception | None) -> None:
        """Raise on all processes if there is an error on one; see `together`."""
        if self.count == 1:
            if error is not None:
                raise error
            return
        flag = torch.tensor(float(error is not None), device=self.device)
        if float(self.sum_(flag)) == 0:
            return
        words = self.gather([] if error is None else [_in_words(error, self.index)])
        if error is not None and not isinstance(error, UserError):
            raise error
        raise UserError(words[0]) from error  # the first process's, on each the same


def _in_words(error: Exception, process: int) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"process {process} failed: {type(error).__name__}: {error}"


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, up to `BUCKET` elements together; a larger one by itself."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
