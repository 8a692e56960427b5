"""Values that a checkpoint can hold, made of those that others give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.run.others import PAGE


def plain(value: Any, who: str, place: str = "", tensors: bool = True) -> Any:
    """A value as a checkpoint can hold it, which is read without running code: NumPy's numbers as Python's, and so on.

    Args:
        value: to be saved.
        who: gave it, for messages.
        place: of the value in what was given, such as ``['a'][0]``.
        tensors: whether it may hold tensors.

    Raises:
        UserError: it holds something else; what and where.
    """

    def inside(entry: Any, key: object) -> Any:
        return plain(entry, who, f"{place}[{key!r}]", tensors)

    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | torch.dtype | torch.device):
        return value
    kinds: tuple[type[Any], ...] = (int, float, complex)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, Tensor) and tensors:
        return value.detach().as_subclass(Tensor)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {inside(key, key): inside(entry, key) for key, entry in value.items()}
    for several in (list, tuple, set):
        if isinstance(value, several) or (several is set and isinstance(value, frozenset)):
            return several(inside(entry, number) for number, entry in enumerate(value))
    expected = "plain values or tensors" if tensors else "plain values"
    where = f" at {place}" if place else ""
    raise UserError(
        f"{who} has {shown(value)}{where}, expected {expected}, which alone a checkpoint can hold: numbers, strings, and "
        f"lists or dictionaries of them ({PAGE})."
    )


def shown(value: object) -> str:
    """A number or a string as it is, of everything else what it is."""
    if isinstance(value, Tensor):
        return f"a tensor of the shape {list(value.shape)}" if value.numel() != 1 else f"{value.item()!r}"
    if isinstance(value, str | int | float):
        return f"{value!r:.60}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
