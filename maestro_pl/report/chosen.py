"""The groups that a report shows: the best, the worst and those that the rewards disagree about most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maestro_pl.report.responses import Responses, Wanted, disagreement

SHARES = {"best": 3, "worst": 3, "most disputed": 4}


@dataclass
class Group:
    """One group of a report.

    Attributes:
        why: a key of ``SHARES``.
        records: of its responses.
        mean: of their scalar rewards; NaN where there is none.
        disputed: see :func:`maestro_pl.report.responses.disagreement`.
    """

    why: str
    records: list[dict[str, Any]]
    mean: float
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
            groups.append(Group(why, found.read(number), float(row["mean"]), float(row["disputed"])))
    return groups


class Gathered:
    """Ten groups of an evaluation, kept while its batches go by."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Group]] = {why: [] for why in SHARES}

    def add(self, records: Sequence[dict[str, Any]], group_size: int) -> None:
        """Look at the whole groups of a batch."""
        for start in range(0, len(records), group_size):
            group = list(records[start : start + group_size])
            mean, disputed = _mean([record.get("reward") for record in group]), disputed_share(group)
            for why, kept in self._kept.items():
                kept.append(Group(why, group, mean, disputed))
                kept.sort(key=_KEYS[why])
                del kept[sum(SHARES.values()) :]  # more than are shown: some are taken for another reason

    def groups(self) -> list[Group]:
        """The ten, highest reward first inside each."""
        taken: set[int] = set()
        out = []
        for why, count in SHARES.items():
            new = [group for group in self._kept[why] if id(group.records) not in taken][:count]
            taken |= {id(group.records) for group in new}
            out += new
        for group in out:
            group.records = sorted(group.records, key=lambda r: -_known(r.get("reward")))
        return out


def disputed_share(records: Sequence[Mapping[str, Any]]) -> float:
    """How much the weighed rewards of a group disagree, in [0, 1]; raw rewards are z-scored where none is normalised."""
    parts = []
    for name in dict.fromkeys(name for record in records for name in record.get("weights") or {}):
        normal = [(record.get("normalized") or {}).get(name) for record in records]
        values = np.array([_or_nan(v) for v in normal])
        if np.isnan(values).all():
            values = np.array([_or_nan((record.get("rewards") or {}).get(name)) for record in records])
            spread = np.nanstd(values) if np.isfinite(values).any() else 0.0
            values = (values - np.nanmean(values)) / spread if spread > 1e-9 else np.zeros(len(values))
        weights = np.array([_or_nan((record.get("weights") or {}).get(name)) for record in records])
        parts.append(np.nan_to_num(weights * values))
    if not parts:
        return 0.0
    together = np.array([np.add.reduce(parts).std()])
    return float(disagreement([np.array([part.std()]) for part in parts], together)[0])


_KEYS: dict[str, Any] = {
    "best": lambda group: -_known(group.mean),
    "worst": lambda group: _known(group.mean, math.inf),
    "most disputed": lambda group: -group.disputed,
}


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)


def _known(value: float | None, otherwise: float = -math.inf) -> float:
    return otherwise if value is None or not math.isfinite(value) else value
