"""Which operations make the host wait for the device: counted where they are asked for, whatever device there is."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
#: Operations whose result has a size that the device knows first, or is a number of the host's.
WAITS = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.unique_dim_consecutive.default,
    aten.bincount.default, aten.equal.default,
}  # fmt: skip
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def waits(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host goes on only when the device has done this operation."""
    if op is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    indices = tree_leaves(args[1]) if op in BY_INDEX else []
    return op in WAITS or any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
