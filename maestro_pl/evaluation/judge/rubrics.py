"""Rubrics: criteria with weights, and what a judge's verdicts on them come to (rubrics as rewards, arXiv 2507.17746)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maestro_pl.errors import UserError
from maestro_pl.evaluation.judge.parsing import plain_label, without_reasoning

_YES = ("yes", "true", "met", "satisfied", "pass")
_NO = ("no", "false", "not met", "unmet", "not satisfied", "unsatisfied", "fail")
_VERDICTS = dict.fromkeys(_YES, True) | dict.fromkeys(_NO, False)
_LINE = re.compile(r"^\W*(?:criterion\s+)?(\d+)\s*\W{0,3}[:.)=|–—-]\s*(.+)$", re.IGNORECASE)
_FIRST = re.compile(r"^([\w ]+?)\s*[,;.:(–—-]")


@dataclass(frozen=True)
class Criterion:
    """One thing that a response should do.

    Attributes:
        text: what the judge is shown.
        weight: above 0.
    """

    text: str
    weight: float = 1.0


def read_criteria(given: object, where: str) -> tuple[Criterion, ...]:
    """Criteria from a list of texts or of ``{criterion, weight}``, or from such a list as JSON.

    Args:
        given: the list or its JSON.
        where: names it in errors.

    Raises:
        UserError: it is neither, is empty, or a weight is not a finite number above 0.
    """
    entries = given
    if isinstance(given, str):
        try:
            entries = json.loads(given)
        except ValueError:
            entries = None
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise UserError(
            f"{where} is {str(given)[:80]!r}, expected a list of criteria, each a text or {{criterion: ..., weight: ...}}."
        )
    return tuple(_criterion(entry, where) for entry in entries)


def _criterion(entry: object, where: str) -> Criterion:
    values: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"criterion": entry}
    text, weight = values.get("criterion"), values.get("weight", 1.0)
    if not isinstance(text, str) or not text.strip() or set(values) - {"criterion", "weight"}:
        raise UserError(f"{where} has {entry!r}, expected a text or {{criterion: ..., weight: ...}}.")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
        raise UserError(
            f"{where}: {text!r} has the weight {weight!r}, expected a number above 0; write what must not happen as what "
            "should."
        )
    return Criterion(" ".join(text.split()), float(weight))


def listed(criteria: Sequence[Criterion]) -> str:
    """The criteria as the judge reads them: numbered from 1, without their weights."""
    return "\n".join(f"{number}. {criterion.text}" for number, criterion in enumerate(criteria, start=1))


def parse_rubric(text: str, criteria: Sequence[Criterion]) -> float | None:
    """sum_c weight_c met_c / sum_c weight_c from a judge's reply, in [0, 1].

    Understood are a line for each criterion (``2: no``, ``**2.** yes, because ...``) and a JSON object of numbers to
    verdicts. A think block in front is left out.

    Returns:
        None where a criterion has no verdict, or two that differ, or the reply numbers a criterion that there is not.
    """
    said: dict[int, set[bool]] = {}
    for number, words in _statements(without_reasoning(text)):
        verdict = _verdict(words)
        if verdict is None:
            continue
        said.setdefault(number, set()).add(verdict)
    if set(said) != set(range(1, len(criteria) + 1)) or any(len(verdicts) > 1 for verdicts in said.values()):
        return None
    met = sum(criterion.weight for number, criterion in enumerate(criteria, start=1) if True in said[number])
    return met / sum(criterion.weight for criterion in criteria)


def _statements(text: str) -> list[tuple[int, str]]:
    """Numbers and what stands behind them: of the first JSON object that has any, else of the lines."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r'\{\s*"', text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        numbered = [(int(key), str(value)) for key, value in found.items() if str(key).strip().isdecimal()]
        if numbered:
            return numbered
    lines = (_LINE.match(line) for line in text.replace("*", "").splitlines())
    return [(int(line[1]), line[2]) for line in lines if line]


def _verdict(words: str) -> bool | None:
    """A verdict alone, or in front of its reason."""
    whole = _VERDICTS.get(plain_label(words))
    first = _FIRST.match(words.strip())
    return whole if whole is not None or first is None else _VERDICTS.get(plain_label(first[1]))
