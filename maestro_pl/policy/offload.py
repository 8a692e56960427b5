"""Saved activations in host memory between forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

LEAST_BYTES = 2**20  # smaller tensors are not worth the trip
Packed: TypeAlias = tuple[torch.device, Tensor]


@contextmanager
def on_host(model: nn.Module, least_bytes: int = LEAST_BYTES) -> Iterator[None]:
    """Move what autograd saves inside the block to host memory, and back when the backward asks for it.

    With gradient checkpointing these are the inputs of the layers; what a layer saves while it is recomputed stays.
    Parameters and small tensors stay too. On a GPU the host copies are pinned and made without waiting.

    Args:
        model: whose parameters must not be copied.
        least_bytes: tensors below this stay where they are.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor | Packed:
        small = tensor.numel() * tensor.element_size() < least_bytes
        if small or isinstance(tensor, nn.Parameter) or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, host

    def unpack(packed: Tensor | Packed) -> Any:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
