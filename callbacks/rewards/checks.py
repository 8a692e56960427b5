"""Argument checks of the reward callbacks: one sentence with the value, what was expected and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from maestro_pl import errors
from maestro_pl.errors import UserError


def check_choice(owner: str, argument: str, value: object, literal: Any) -> None:
    """Raise unless ``value`` is one of the strings of a ``Literal`` type."""
    errors.check_choice(f"{owner}: {argument}", value, literal, form="{} is {!r}, expected one of {}.")


def check_number(
    owner: str,
    argument: str,
    value: object,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    integer: bool = False,
) -> None:
    """Raise unless ``value`` is a finite number (a whole one with ``integer``) within the bounds."""
    kind = "a whole number" if integer else "a number"
    bounds = [f"of at least {at_least:g}"] if at_least is not None else []
    bounds += [f"of at most {at_most:g}"] if at_most is not None else []
    allowed = int if integer else (int, float)
    ok = (
        isinstance(value, allowed)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
    )
    if not ok:
        raise UserError(f"{owner}: {argument} is {value!r}, expected {' '.join([kind, *bounds])}.")


def check_strings(owner: str, argument: str, value: object, *, hint: str) -> None:
    """Raise unless ``value`` is a non-empty list of non-empty strings."""
    ok = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not ok or not all(isinstance(item, str) and item for item in value):  # type: ignore[attr-defined]
        raise UserError(f"{owner}: {argument} is {value!r}, expected a list of one or more strings. {hint}")


def check_tags(owner: str, think_tag: object, answer_tag: object) -> None:
    """Raise unless both can stand between angle brackets as tag names and they differ."""
    for argument, value in (("think_tag", think_tag), ("answer_tag", answer_tag)):
        if not isinstance(value, str) or not re.fullmatch(r"[^\s<>/]+", value):
            raise UserError(
                f"{owner}: {argument} is {value!r}, expected a tag's name without brackets, spaces or slashes, such as "
                f"{argument.removesuffix('_tag')!r}."
            )
    if think_tag == answer_tag:
        raise UserError(f"{owner}: think_tag and answer_tag are both {think_tag!r}: give them different names.")
