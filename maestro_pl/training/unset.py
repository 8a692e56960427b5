"""The optimizer that stands for none while a command line is read."""

from __future__ import annotations

from typing import Any

import torch


class Unset(torch.optim.Optimizer):
    """Takes no options, so that what stands before it is dropped; another class takes its place."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
