"""Weighers, signals and learners of a user's own: what they raise, and what they return, becomes a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from maestro_pl.errors import RunStopped, UserError
from maestro_pl.run.others import OURS, origin, told

PAGE = "docs/extending.md"
SLACK = 1e-2  # what weights in bfloat16 may add up to beside 1


def is_own(thing: object) -> bool:
    """Whether its class is not one of the project's."""
    return type(thing).__module__.partition(".")[0] not in OURS


@contextmanager
def own_code(option: str, thing: object, method: str, called: str) -> Iterator[None]:
    """Around a call of what may be a user's own class; errors of the project's classes pass through.

    Args:
        option: that names the class in a config, such as ``model.weigher``.
        thing: whose method is called.
        method: its name.
        called: how it is called and what it returns.

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
        name = f"{option}={type(thing).__name__}"
        if isinstance(error, NotImplementedError) and not str(error):
            raise UserError(f"{name} has no `{method}` of its own: give it {called} ({PAGE}).") from error
        raise RunStopped(
            f"{name}: `{method}` failed at {origin(error)}: {told(error)}. It is called as {called} ({PAGE}).", 1
        ) from error


def check_tensor(name: str, given: object, shape: tuple[int, ...]) -> None:
    """Raise where something is not a tensor of this shape.

    Raises:
        UserError: its type or shape, and what was expected.
    """
    if not isinstance(given, Tensor) or tuple(given.shape) != shape:
        found = f"the shape {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
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
