"""The length rewards: a penalty outside a budget, and NOVER's efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

LengthUnit: TypeAlias = Literal["tokens", "words", "characters"]


def length_penalty(length: float, *, minimum: float = 0, maximum: float | None = None, floor: float = -1.0) -> float:
    """0 for a length inside [minimum, maximum], falling linearly outside, never below ``floor``.

    With n the length: ``-(minimum - n) / max(minimum, 1)`` below, ``-(n - maximum) / max(maximum, 1)`` above, so that
    an empty response and one of twice the maximum both get -1. The paper names a length penalty without a formula; this
    form is ours.

    Args:
        length: of the response, in any unit.
        minimum: shortest length without a penalty.
        maximum: longest length without a penalty; ``None``: no limit.
        floor: the lowest reward.
    """
    if length < minimum:
        return max(floor, -(minimum - length) / max(minimum, 1))
    if maximum is not None and length > maximum:
        return max(floor, -(length - maximum) / max(maximum, 1))
    return 0.0


def nover_efficiency(lengths: Sequence[float], perplexities: Sequence[float], valid: Sequence[bool]) -> list[float]:
    """Share of the other valid responses of a group that a response beats on both length and perplexity (NOVER).

    To beat means strictly shorter reasoning *and* a strictly lower perplexity of the reference. An invalid response,
    and the only valid one of a group, get 0.

    Args:
        lengths: G lengths of the reasoning, in any unit.
        perplexities: G perplexities of the reference; read for valid responses only.
        valid: G flags: the response has the format.
    """
    members = [i for i, ok in enumerate(valid) if ok]

    def beaten(i: int) -> int:
        return sum(lengths[i] < lengths[j] and perplexities[i] < perplexities[j] for j in members)

    others = max(len(members) - 1, 1)
    return [beaten(i) / others if ok else 0.0 for i, ok in enumerate(valid)]
