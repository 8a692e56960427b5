"""Learning rate schedulers that know how many steps the run makes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, get_type_hints

import torch
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from maestro_pl.algorithm.schedule import Schedule
from maestro_pl.errors import UserError

_STEPS = "num_training_steps"  # what transformers' schedules call it
_steps: ContextVar[int | None] = ContextVar("_steps", default=None)  # of the scheduler that is made
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
    token = _steps.set(steps)
    try:
        scheduler = made_by(optimizer, **_asked(made_by, steps))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model.optimizer or model.scheduler does not take these arguments: {error}; {SHORT}."
        ) from error
    finally:
        _steps.reset(token)
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
    parameter = inspect.signature(made_by).parameters.get(_STEPS)
    return {} if parameter is None or parameter.default is not parameter.empty else {_STEPS: steps}


# -- schedulers whose own arguments no config can give -----------------------------------------------------------------


class SequentialLR(lr_scheduler.SequentialLR):
    """Torch's ``SequentialLR``, which makes the schedulers itself: each is given the optimizer.

    Args:
        optimizer: the optimizer.
        schedulers: what makes each scheduler, in their order.
        milestones: the steps at which the next one takes over.
        last_epoch: see torch.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedulers: list[LRSchedulerCallable],
        milestones: list[int],
        last_epoch: int = -1,
    ) -> None:
        made: list[Any] = [make(optimizer) for make in schedulers]
        super().__init__(optimizer, made, milestones, last_epoch)


class ChainedScheduler(lr_scheduler.ChainedScheduler):
    """Torch's ``ChainedScheduler``, whose factors multiply, which makes the schedulers itself.

    Args:
        optimizer: the optimizer.
        schedulers: what makes each scheduler.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedulers: list[LRSchedulerCallable]) -> None:
        made: list[Any] = [make(optimizer) for make in schedulers]
        super().__init__(made, optimizer)


for _ours in (SequentialLR, ChainedScheduler):
    _ours.__module__ = lr_scheduler.__name__  # a config names torch's


def for_configs(found: Any) -> Any:
    """What a config means by a class or a function: where none of its values could serve as arguments, a stand-in of ours.

    Stand-ins are torch's ``SequentialLR`` and ``ChainedScheduler``, which want schedulers that have an optimizer, and every
    function whose first argument is ``optimizer``, as those of transformers: a class with the function's other arguments,
    of which ``num_training_steps`` may be left out.
    """
    ours = {lr_scheduler.SequentialLR: SequentialLR, lr_scheduler.ChainedScheduler: ChainedScheduler}
    if inspect.isclass(found):
        return ours.get(found, found)
    if inspect.isfunction(found) and next(iter(inspect.signature(found).parameters), "") == "optimizer":
        return _as_class(found)
    return found


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments, those aside that were imported for a type checker only."""
    try:
        return get_type_hints(function)
    except NameError:
        found: dict[str, Any] = {}
        for name, hint in function.__annotations__.items():
            with suppress(NameError):
                found |= get_type_hints(SimpleNamespace(__annotations__={name: hint}), function.__globals__)
        return found


@functools.cache
def _as_class(function: Callable[..., LRScheduler]) -> type[LRScheduler]:
    """A class that a config can name, whose instances are what the function gives."""
    hints = _hints(function)
    parameters = [
        parameter.replace(annotation=int | None, default=None)
        if name == _STEPS and parameter.default is parameter.empty
        else parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(function).parameters.items()
    ]
    # what has a default comes last
    parameters.sort(key=lambda parameter: (parameter.kind, parameter.default is not parameter.empty))

    def new(cls: type, optimizer: torch.optim.Optimizer, **options: Any) -> LRScheduler:
        if any(p.name == _STEPS and p.default is None for p in parameters) and options.get(_STEPS) is None:
            options[_STEPS] = _steps.get()
            if options[_STEPS] is None:
                raise UserError(f"{function.__name__} needs an end: give {_STEPS}, or trainer.max_steps or max_epochs.")
        return function(optimizer, **options)

    def init(self: Any, *args: Any, **options: Any) -> None:
        """Nothing: the function's own has been made."""

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for method in (new, init):
        method.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[union-attr]
        method.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    names = {"__new__": new, "__init__": init, "__module__": function.__module__, "__doc__": function.__doc__}
    return type(function.__name__, (LRScheduler,), names)
