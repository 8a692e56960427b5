"""Reading what a reward returned: one finite number a response, or nothing where the reward does not apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from maestro_pl.errors import UserError
from maestro_pl.rollout import Prompt, Rollout

Scores: TypeAlias = Sequence[float | None]
ScoresAndMetrics: TypeAlias = tuple[Scores, Mapping[str, Scores]]

_FLOAT32_MAX = torch.finfo(torch.float32).max


def read_scores(raw: object, count: int, owner: str, describe: Callable[[int], str]) -> list[float]:
    """Turn what a reward returned into floats; NaN means that the reward does not apply.

    Args:
        raw: a list, tuple, generator, tensor on any device, NumPy array or pandas column of numbers, bools, ``None`` or NaN.
        count: how many scores there must be.
        owner: who returned them, as the error should name it, for instance ``"Reward 'format'"``.
        describe: says which response the i-th score belongs to.

    Raises:
        UserError: not a sequence, a wrong length, or a score that is a string, infinite or no single number.
    """
    raw = as_list(raw)
    if isinstance(raw, str | bytes) or not isinstance(raw, Sequence):
        raise UserError(
            f"{owner} returned {_show(raw)} for {count} responses: return a list with one score for each of them, "
            "in their order."
        )
    if len(raw) != count:
        raise UserError(
            f"{owner} returned {len(raw)} score(s) for {count} responses: return one for each response, in their "
            "order, and None where the reward does not apply."
        )
    return [read_score(value, owner, lambda i=i: describe(i)) for i, value in enumerate(raw)]  # type: ignore[misc]


def as_list(raw: Any) -> Any:
    """Tensors, arrays and columns as lists, also of the shape (N, 1), and what is iterated over once; others as they are."""
    if hasattr(raw, "tolist"):  # torch, NumPy, pandas
        shape: tuple[int, ...] = tuple(getattr(raw, "shape", ()))
        if len(shape) == 2 and shape[1] == 1:
            raw = raw.reshape(-1) if hasattr(raw, "reshape") else raw
        return raw.tolist()
    return list(raw) if isinstance(raw, Iterator) else raw


def read_score(value: object, owner: str, describe: Callable[[], str]) -> float:
    """Turn one score into a float; ``None`` and NaN become NaN.

    Raises:
        UserError: the value is a string, a container, infinite or beyond float32.
    """
    if value is None:
        return math.nan
    number = None
    if not isinstance(value, str | bytes):
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError, RuntimeError):  # a list, a complex number, a tensor of several elements
            number = None
    if number is None:
        raise UserError(
            f"{owner} returned {_show(value)} for {describe()}: a score is a number, True or False, or None where the "
            "reward does not apply."
        )
    if abs(number) > _FLOAT32_MAX:
        raise UserError(
            f"{owner} returned {_show(value)} for {describe()}: a score must be finite in float32. Clip it in the "
            "reward, or return None where it does not apply."
        )
    return number


def describe_response(rollout: Rollout, row: int) -> str:
    """Name one response in an error: its row, an excerpt of its prompt and of its text."""
    prompt = rollout.prompts[row // rollout.group_size]
    said, answered = excerpt(_prompt_text(prompt)), excerpt(rollout.responses[row])
    return f"response {row} of the batch (prompt {said}, response {answered})"


def excerpt(text: str, width: int = 80) -> str:
    """The text in quotes on one line, its middle left out where it is longer than ``width`` characters."""
    flat = " ".join(text.split())
    if len(flat) > width:
        half = (width - 3) // 2
        flat = f"{flat[:half]}...{flat[-half:]}"
    return repr(flat)


def _prompt_text(prompt: Prompt) -> str:
    """The last thing said in a prompt: the string itself, or the content of the last chat message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
