"""The mathematics: tensors in, a value and its metrics out. It knows the rollout and nothing else of the package."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

#: What is logged beside a value: names without prefix to numbers.
Metrics: TypeAlias = dict[str, Tensor | float]
