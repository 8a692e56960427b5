"""What the ranks of a run do together, in one place; without ranks every function is the identity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")

#: Elements of one exchange of gradients: 64 MiB of float32, so that a whole model is never copied.
BUCKET = 2**24


def count_of() -> int:
    """How many ranks there are."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def gathered(value: T) -> list[T]:
    """What every rank has, in the order of the ranks. Collective."""
    if count_of() == 1:
        return [value]
    parts: list[T] = [value] * count_of()
    torch.distributed.all_gather_object(parts, value)
    return parts


def own_rows(rows_N: Tensor) -> Tensor:
    """Of a row for each prompt of the global batch, those of this rank, which has every R-th prompt."""
    return rows_N if count_of() == 1 else rows_N[torch.distributed.get_rank() :: count_of()]


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank can no longer be reached."""
    if count_of() == 1 or not isinstance(error, RuntimeError):
        return False
    lost = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in lost)


def is_late_rank(error: BaseException) -> bool:
    """Whether such an error says that the other rank did not answer in time."""
    return any(words in str(error).lower() for words in ("timed out", "timeout"))


def let_us_average(strategy: Any, module: nn.Module) -> None:
    """Let Lightning's DDP leave gradients alone, and start from what rank 0 has.

    DDP expects every parameter to get a gradient in every backward pass. Here the policy and the Conductor have passes of
    their own, a rank may have no group to learn from, and where memory runs out all ranks begin anew: gradients are
    averaged by :func:`average_gradients`, once an optimizer step.

    Args:
        strategy: of the trainer; any but DDP, and one that configures itself, is left as it is.
        module: whose trained parameters are those of rank 0 from here on.
    """
    if getattr(type(strategy), "configure_ddp", None) is DDPStrategy.configure_ddp:
        strategy.configure_ddp = lambda: broadcast_trained(module)


@torch.no_grad()
def broadcast_trained(module: nn.Module, device: torch.device | None = None) -> None:
    """Give every rank the trained parameters of rank 0. Collective.

    Args:
        module: whose parameters they are.
        device: by way of which, where they are not there yet.
    """
    if count_of() > 1:
        for parameter in module.parameters():
            if parameter.requires_grad:
                sent = parameter.data.to(device or parameter.device)
                torch.distributed.broadcast(sent, src=0)
                parameter.data.copy_(sent)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks; one that a rank lacks counts as 0. Collective."""
    if count_of() == 1:
        return
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if not parameter.requires_grad or isinstance(parameter, DTensor):  # FSDP has averaged those
            continue
        if bucket and (
            parameter.dtype != bucket[0].dtype or sum(map(torch.numel, bucket)) + parameter.numel() > BUCKET
        ):
            _average(bucket)
            bucket = []
        bucket.append(parameter)
    if bucket:
        _average(bucket)


def _average(bucket: list[nn.Parameter]) -> None:
    for parameter in bucket:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= count_of()
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def everywhere(values_X: Tensor) -> Tensor:
    """The vectors of all ranks end to end, in the order of the ranks, on the device of this one's. Collective."""
    return torch.cat([part.to(values_X.device) for part in gathered(values_X.detach().cpu())])
