"""Learning rate schedulers that know how many steps the run makes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from maestro_pl.algorithm.schedule import Schedule
from maestro_pl.errors import UserError

SHORT = "scheduler: {warmup: 0.1, decay: cosine} makes a warm-up and a decay"


def make_scheduler(made_by: Any, optimizer: torch.optim.Optimizer, steps: int | None) -> Any:
    """The scheduler of an optimizer.

    Args:
        made_by: a :class:`Schedule`, or what takes the optimizer and gives a scheduler; one that also asks for
            ``num_training_steps``, as those of transformers do, is given them.
        optimizer: its optimizer.
        steps: how often it will be stepped; None where nobody knows.

    Raises:
        UserError: it cannot serve a run of so many steps, or takes something else.
    """
    if isinstance(made_by, Schedule):
        if steps is None and made_by.needs_end:
            raise UserError(f"{made_by} needs an end: give trainer.max_steps or trainer.max_epochs.")
        # no object with a state, so that the config decides in a run that goes on
        return LambdaLR(optimizer, lambda step: made_by.factor(step, steps or 0))
    try:
        scheduler = made_by(optimizer, **_asked(made_by, steps))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model.optimizer or model.scheduler does not take these arguments: {error}; {SHORT}."
        ) from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError("ReduceLROnPlateau watches a metric; model.scheduler is stepped by count: use another one.")
    if isinstance(scheduler, OneCycleLR) and steps is not None and scheduler.total_steps < steps:
        raise UserError(
            f"model.scheduler is a OneCycleLR of {scheduler.total_steps} steps, and it is stepped {steps} times in this run: "
            f"give total_steps: {steps}."
        )
    return scheduler


def _asked(made_by: Any, steps: int | None) -> dict[str, int]:
    if steps is None or not inspect.isroutine(made_by):
        return {}
    parameter = inspect.signature(made_by).parameters.get("num_training_steps")
    return {} if parameter is None or parameter.default is not parameter.empty else {"num_training_steps": steps}
