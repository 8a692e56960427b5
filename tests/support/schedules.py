"""The learning rates that a scheduler gives."""

from __future__ import annotations

from typing import Any

import torch

from maestro_pl.training.scheduling import make_scheduler


def rates(made_by: Any, steps: int | None, count: int = 4, lr: float = 1.0) -> list[float]:
    """The rate of each of ``count`` steps, of an optimizer that begins with ``lr``, in a run of so many steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make_scheduler(made_by, optimizer, steps)
    seen = []
    for _ in range(count):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen
