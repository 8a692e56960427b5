"""Weighers, signals and learners of a user's own: what they raise, and what they return, becomes a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maestro_pl.algorithm import Mean, Metrics
from maestro_pl.errors import RunStopped, UserError
from maestro_pl.run.others import OURS, PAGE, not_begun, origin, told
from maestro_pl.run.plain import plain, shown

WEIGHER, SIGNAL, LEARNER = "model.weigher", "model.meta.signal", "model.meta.learner"  # the keys that name them
SLACK = 1e-2  # what weights in bfloat16 may add up to beside 1

_STATE = "state_dict(), which returns a dictionary of plain values and tensors"
#: How the methods that a user may write are called, and what they return.
_CALLED = {
    (WEIGHER, "build"): "build(hidden_size, reward_names)",
    (WEIGHER, "check"): "check(policy)",
    (WEIGHER, "forward"): "forward(h_BD, rewards_BK, mask_BK, sample), which returns a maestro_pl.Weighing(weights_BK, "
    "probabilities_BK)",
    (WEIGHER, "observe"): "observe(seen), which returns a dictionary of numbers",
    (WEIGHER, "prepare"): "prepare(scored)",
    (WEIGHER, "state_dict"): _STATE,
    (WEIGHER, "validated"): "validated(mean_K)",
    (SIGNAL, "check"): "check(policy, advantages, anchoring)",
    (SIGNAL, "observe"): "observe(seen), which returns a maestro_pl.conductor.Credit(credit_BK, value_B)",
    (LEARNER, "attach"): "attach(conductor, signal)",
    (LEARNER, "learn"): "learn(conductor, signal, buffer, step=..., batch=...), which returns a dictionary of numbers",
    (LEARNER, "load_state_dict"): "load_state_dict(state)",
    (LEARNER, "nearest"): "nearest(conductor, h_BD), which returns cosine_B or None",
    (LEARNER, "resume"): "resume(conductor)",
    (LEARNER, "state_dict"): _STATE,
}
#: What the attributes and properties that a user may write have to be.
_ATTRIBUTES = {
    "context": "None or a maestro_pl.policy.context.HiddenContext",
    "gain": "one finite number",
    "settings": "a dictionary of plain values",
}


def is_own(thing: object) -> bool:
    """Whether its class is not one of the project's."""
    return type(thing).__module__.partition(".")[0] not in OURS


def named(option: str, thing: object) -> str:
    """``model.weigher=Mine``."""
    return f"{option}={type(thing).__name__}"


def check_begun(option: str, thing: object, *attributes: str) -> None:
    """Raise where a class's ``__init__`` has left out that of its base.

    Args:
        option: that names the class in a config, such as ``model.weigher``.
        thing: what was built.
        attributes: that the base sets.

    Raises:
        UserError: it lacks one of them.
    """
    if not all(hasattr(thing, attribute) for attribute in attributes):
        raise not_begun(named(option, thing))


@contextmanager
def own_code(option: str, thing: object, method: str) -> Iterator[None]:
    """Around a call of what may be a user's own class; errors of the project's classes pass through.

    Args:
        option: that names the class in a config, such as ``model.weigher``.
        thing: whose method is called, or whose attribute is read.
        method: its name.

    Raises:
        UserError: it is not defined.
        RunStopped: it raises; the line that did, and how it is called.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not is_own(thing):
            raise
        name = named(option, thing)
        if isinstance(error, NotImplementedError) and not str(error) and method not in _ATTRIBUTES:
            raise UserError(
                f"{name} has no `{method}` of its own: give it {_CALLED[option, method]} ({PAGE})."
            ) from error
        known = (
            f"has to be {_ATTRIBUTES[method]}" if method in _ATTRIBUTES else f"is called as {_CALLED[option, method]}"
        )
        raise RunStopped(
            f"{name}: `{method}` failed at {origin(error)}: {told(error)}. It {known} ({PAGE}).", 1
        ) from error


def returned(option: str, thing: object, method: str, given: object) -> UserError:
    """The sentence on something of the wrong type that a method returned, or that an attribute is."""
    name = f"{named(option, thing)}: `{method}`"
    if method in _ATTRIBUTES:
        return UserError(f"{name} is {shown(given)}, expected {_ATTRIBUTES[method]} ({PAGE}).")
    return UserError(f"{name} returned {shown(given)}. It is called as {_CALLED[option, method]} ({PAGE}).")


def gain_of(weigher: Any) -> float:
    """What a weigher multiplies the advantages by; that of a user's own class is looked at.

    Raises:
        UserError: reading it raised, or it is not one finite number.
    """
    with own_code(WEIGHER, weigher, "gain"):
        gain = weigher.gain
        if is_own(weigher):
            number = _number(gain)
            if number is None or not math.isfinite(number):
                raise returned(WEIGHER, weigher, "gain", gain)
            return float(number)
    ours: float = gain
    return ours


def numbers_of(option: str, thing: object, method: str, given: Any) -> Metrics:
    """What a method gives to be logged; of a user's own class every value is looked at.

    Raises:
        UserError: it is no dictionary, or a value of it is not one number.
    """
    if not is_own(thing):
        return dict(given)
    if not isinstance(given, Mapping):
        raise returned(option, thing, method, given)
    numbers: Metrics = {}
    for key, value in given.items():
        number = value if isinstance(value, Mean) and option != SIGNAL else _number(value)
        if number is None:
            raise UserError(
                f"{named(option, thing)}: `{method}` gives {shown(value)} to be logged as {key!r}, expected one "
                f"number ({PAGE})."
            )
        numbers[key] = number
    return numbers


def settings_of(option: str, thing: Any) -> dict[str, Any]:
    """The settings of a weigher, signal or learner; those of a user's own class as values that a checkpoint can hold.

    Raises:
        UserError: reading them raised, or a value is no plain one.
    """
    with own_code(option, thing, "settings"):
        given = thing.settings
    return _plain_values(option, thing, "settings", given)


def state_of(option: str, thing: Any) -> dict[str, Any]:
    """What a weigher or a learner remembers; that of a user's own class as values that a checkpoint can hold.

    Raises:
        UserError: asking for it raised, or a value is neither a plain one nor a tensor.
    """
    with own_code(option, thing, "state_dict"):
        given = thing.state_dict()
    return _plain_values(option, thing, "state_dict", given)


def _plain_values(option: str, thing: object, method: str, given: Any) -> dict[str, Any]:
    if is_own(thing):
        if not isinstance(given, Mapping):
            raise returned(option, thing, method, given)
        given = plain(given, f"{named(option, thing)}: `{method}`", tensors=method == "state_dict")
    values: dict[str, Any] = given
    return values


def _number(value: object) -> float | Tensor | None:
    """One number, as a float or a tensor without shape; None: it is not one."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()) if value.numel() == 1 and not value.is_complex() else None
    if not isinstance(value, int | float | np.number | np.bool_) or np.iscomplexobj(value):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return None


def check_tensor(name: str, given: object, shape: tuple[int, ...]) -> None:
    """Raise where something is not a tensor of this shape.

    Raises:
        UserError: its type or shape, and what was expected.
    """
    if not isinstance(given, Tensor) or tuple(given.shape) != shape:
        found = f"the shape {list(given.shape)}" if isinstance(given, Tensor) else shown(given)
        raise UserError(f"{name} is {found}, expected a tensor of the shape {list(shape)} ({PAGE}).")


def check_on_simplex(name: str, weights_BK: Tensor, mask_BK: Tensor) -> None:
    """Raise where weights are not finite, below 0, or do not add up to 1 over the rewards that apply.

    Args:
        name: what gave them.
        weights_BK: on the CPU.
        mask_BK: bool on the CPU.

    Raises:
        UserError: the first response's weights that are so.
    """
    applying_BK = weights_BK.detach().float().masked_fill(~mask_BK, 0.0)
    off_B = (applying_BK < -SLACK).any(1) | ~applying_BK.isfinite().all(1)
    off_B = off_B | (mask_BK.any(1) & ~((applying_BK.sum(1) - 1).abs() <= SLACK))
    if bool(off_B.any()):
        row = int(off_B.nonzero()[0, 0])
        shown = ", ".join(
            f"{value:.4g}" if known else "-" for value, known in zip(applying_BK[row], mask_BK[row], strict=True)
        )
        raise UserError(
            f"{name} gave response {row} the weights [{shown}] (-: does not apply), expected finite numbers of at least 0 that "
            f"add up to 1 over the rewards that apply, as maestro_pl.algorithm.simplex.on_simplex makes them ({PAGE})."
        )
