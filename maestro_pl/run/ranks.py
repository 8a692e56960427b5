"""What every rank has, in one place: gathering of plain objects, a list of one without ranks."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """What every rank has, in the order of the ranks. Collective."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    parts: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, value)
    return parts


def everywhere(values_X: Tensor) -> Tensor:
    """The vectors of all ranks end to end, in the order of the ranks, on the device of this one's. Collective."""
    return torch.cat([part.to(values_X.device) for part in gathered(values_X.detach().cpu())])
