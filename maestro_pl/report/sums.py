"""How the scalar reward of a recorded response adds up, and its advantage: Eq. 4 to 6 of docs/algorithm.md, read backwards.

A record without ``normalized`` (written before it was recorded) gives raw rewards times weights, which is not what was
added up; such a sum says that it is not exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

STD_EPS = 1e-4  # of an advantage, as in algorithm/advantages.py
CLOSE = 2e-3  # what float32 and the record's own rounding may differ by, of a value of size 1


@dataclass
class Part:
    """One weighed reward of a sum.

    Attributes:
        name: of the reward.
        raw: as scored; None where it does not apply.
        normalized: as it entered the sum, or None.
        weight: on the simplex.
        value: what it adds, weight times normalised reward.
        start: the sum of the parts before it.
    """

    name: str
    raw: float | None
    normalized: float | None
    weight: float
    value: float
    start: float


@dataclass
class Sum:
    """A scalar reward from its parts.

    Attributes:
        parts: in the order of the rewards.
        then: what was done to their sum, in words, each with the value after it: anchor, gates, KL.
        value: what the parts come to; NaN where no reward applies.
        recorded: the scalar reward of the record, or None.
        advantage: of the record, or None.
        how: the advantage in a sentence.
        exact: whether normalised rewards were recorded.
        unweighed: rewards that are not weighed (metrics, anchors, gates), name to raw value.
    """

    parts: list[Part]
    then: list[tuple[str, float]]
    value: float
    recorded: float | None
    advantage: float | None
    how: str = ""
    exact: bool = True
    unweighed: dict[str, float | None] = field(default_factory=dict)

    @property
    def adds_up(self) -> bool:
        """Whether the parts give what was recorded."""
        if self.recorded is None:
            return math.isnan(self.value)
        return self.exact and abs(self.value - self.recorded) <= CLOSE * max(1.0, abs(self.recorded))

    @property
    def scale(self) -> tuple[float, float]:
        """The ends of an axis on which every bar of the sum lies, and 0."""
        ends = [p.start for p in self.parts] + [p.start + p.value for p in self.parts] + [v for _, v in self.then]
        values = [0.0, *(value for value in ends if math.isfinite(value))]
        return min(values), max(values)


def sums(group: Sequence[Mapping[str, Any]]) -> list[Sum]:
    """The sums of a whole group's records, which gates, anchors and advantages compare with one another."""
    found = [_weighed(record) for record in group]
    values = np.array([each.value for each in found], dtype=float)
    values = _anchored(group, found, values)
    values = _gated(group, found, values)
    for row, (record, each) in enumerate(zip(group, found, strict=True)):
        if record.get("kl") is not None and math.isfinite(values[row]):
            values[row] -= float(record["kl"])
            each.then.append((f"less KL {float(record['kl']):.3f}", float(values[row])))
        if record.get("skipped"):
            values[row] = math.nan
            each.then.append(("left out: its group has no label", math.nan))
        each.value = float(values[row])
    _advantages(group, found)
    return found


def _weighed(record: Mapping[str, Any]) -> Sum:
    rewards, weights = record.get("rewards") or {}, record.get("weights") or {}
    normalized = record.get("normalized") or {}
    parts, total, applies = [], 0.0, False
    for name, weight in weights.items():
        raw, normal = rewards.get(name), normalized.get(name)
        used = normal if normalized else raw
        value = float(used or 0.0) * float(weight or 0.0)
        parts.append(Part(name, raw, normal, float(weight or 0.0), value, total))
        total, applies = total + value, applies or used is not None
    others = {name: value for name, value in rewards.items() if name not in weights}
    recorded, advantage = record.get("reward"), record.get("advantage")
    return Sum(
        parts,
        [],
        total if applies else math.nan,
        recorded,
        advantage,
        exact=bool(normalized) or not weights,
        unweighed=others,
    )


def _anchored(group: Sequence[Mapping[str, Any]], found: list[Sum], values: np.ndarray) -> np.ndarray:
    anchors = [record.get("anchor") for record in group]
    known = np.isfinite(values)
    if not any(anchors) or not known.any():
        return values
    spread = values[known].std(ddof=1) if known.sum() > 1 else 0.0
    centred = np.where(known, values - values[known].mean(), 0.0)
    standard = centred / spread if spread > 0 else centred * 0
    out = values.copy()
    for row, anchor in enumerate(anchors):
        if anchor:
            share, value = float(anchor["share"]), anchor["value"]
            out[row] = (1 - share) * standard[row] + share * value if value is not None else math.nan
            told = "nothing" if value is None else f"{value:.3f}"
            label = f"z-score, of which {1 - share:g}, and {share:g} of the anchor's {told}"
            found[row].then.append((label, float(out[row])))
    return out


def _gated(group: Sequence[Mapping[str, Any]], found: list[Sum], values: np.ndarray) -> np.ndarray:
    for name in dict.fromkeys(name for record in group for name in record.get("gates") or {}):
        finite = values[np.isfinite(values)]
        floor = min(0.0, float(finite.min())) if len(finite) else 0.0
        for row, record in enumerate(group):
            is_open = float((record.get("gates") or {}).get(name, 1.0))
            values[row] = floor if is_open == 0 else is_open * values[row] + (1 - is_open) * floor
            if is_open < 1:
                found[row].then.append((f"gate {name}, open {is_open:g}", float(values[row])))
    return values


_DIVIDED = {  # by what, where it is not the spread of the group's scalar rewards
    "none": "",
    "mo_grpo": "",
    "batch": " / spread of the batch",
    "normalize_then_sum": " / spread of the batch's centred sums",
    "gdpo": " / spread of the batch's centred sums",  # as records of earlier versions say
    "dvao": " / the rewards' own spreads, weighed",
}


def _advantages(group: Sequence[Mapping[str, Any]], found: list[Sum]) -> None:
    by = str(group[0].get("advantage_by", "group")) if group else "group"
    rewards = np.array([np.nan if r.get("reward") is None else float(r["reward"]) for r in group], dtype=float)
    known = rewards[np.isfinite(rewards)]
    if not len(known):
        return
    mean, spread = float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else 0.0
    for record, each in zip(group, found, strict=True):
        if each.advantage is None or each.recorded is None:
            continue
        if spread == 0:
            each.how = "all responses of the group have the same reward"
            continue
        least = record.get("min_consensus")
        if least and each.advantage == 0:
            each.how = (
                f"dropped where its rewards disagree: less than {float(least):g} of their pulls is left (min_consensus)"
            )
            continue
        divided = f" / spread {spread:.3f}" if by == "group" else _DIVIDED.get(by, f" as {by} divides it")
        each.how = (
            f"({each.recorded:.3f} − group mean {mean:.3f}){divided}"
            if divided
            else (f"{each.recorded:.3f} − group mean {mean:.3f}")
        )
        gain = record.get("gain")
        if gain is not None:
            each.how = f"{each.how if divided else '(' + each.how + ')'} × {float(gain):.3g}"
