"""The contains reward: some or all of the wanted strings stand in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

Require: TypeAlias = Literal["any", "all"]


def contains_score(text: str, strings: Sequence[str], *, require: Require = "any", ignore_case: bool = True) -> float:
    """1 where any (or all) of the strings stand in the text, else 0; runs of white space count as one space.

    Args:
        text: where to look.
        strings: what to look for.
        require: ``any`` or ``all`` of them.
        ignore_case: compare without case.
    """

    def level(value: str) -> str:
        flat = " ".join(value.split())
        return flat.casefold() if ignore_case else flat

    found = [level(wanted) in level(text) for wanted in strings]
    return float(any(found) if require == "any" else all(found))
