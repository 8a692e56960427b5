"""The mathematics: tensors in, a value and its metrics out. It knows the rollout and nothing else of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean that can be joined with those of other ranks: ``total`` over ``count`` things."""

    total: Tensor | float
    count: Tensor | float

    def __float__(self) -> float:
        """The mean; NaN of nothing."""
        count = float(self.count)
        return float(self.total) / count if count else float("nan")


#: What is logged beside a value: names without prefix to numbers.
Metrics: TypeAlias = dict[str, Tensor | float | Mean]
