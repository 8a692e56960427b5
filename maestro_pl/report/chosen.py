"""The groups that a report shows: the best, the worst and those that the rewards disagree about most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maestro_pl.report.responses import Responses, Wanted

SHARES = {"best": 3, "worst": 3, "most disputed": 4}


@dataclass
class Group:
    """One group of a report.

    Attributes:
        why: a key of ``SHARES``.
        records: of its responses, the highest advantage (or reward) first.
        standing, disputed: see :class:`maestro_pl.report.responses.Responses`.
    """

    why: str
    records: list[dict[str, Any]]
    standing: float
    disputed: float


def chosen(found: Responses) -> list[Group]:
    """Ten groups of the recorded ones, none of them twice."""
    orders = {"best": found.find(Wanted(sort="best")), "worst": found.find(Wanted(sort="worst"))}
    orders["most disputed"] = found.find(Wanted(sort="disputed"))
    taken: set[int] = set()
    groups = []
    for why, count in SHARES.items():
        numbers = [number for number in orders[why] if number not in taken][:count]
        taken |= set(numbers)
        for number in numbers:
            row = found.groups.iloc[number]
            groups.append(Group(why, found.read(number), float(row["standing"]), float(row["disputed"])))
    return groups
