"""Reading a judge's reply: a score on a scale, or one label of a few; ``None`` where it says neither clearly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_LABEL_KEYS = ("verdict", "judgement", "judgment", "decision", "winner", "result", "answer", "correct")
_SCORE_KEYS = ("score", "rating", "grade")
_NUMBER = r"[-+]?\d+(?:[.,]\d+)?"
_OUT_OF = rf"(?:\s*(?:/|out\s+of)\s*(?P<of>{_NUMBER}))?"
_RANGE_OR_MORE = r"(?!\d|[.,:]\d|\s*(?:-|–|to\b)\s*\d|\s*[%/])"
_SCORE = rf"(?P<number>{_NUMBER}){_OUT_OF}{_RANGE_OR_MORE}"
_SCORE_LINE = re.compile(rf"\b(?:{'|'.join(_SCORE_KEYS)})(?:\s*\([^)]*\))?\s*(?:is)?\s*[:=]?\s*{_SCORE}", re.IGNORECASE)
_SCORE_ALONE = re.compile(rf"{_SCORE}\s*(?:points?)?[.!]?", re.IGNORECASE)
_LABEL_LINE = re.compile(rf"\b(?:{'|'.join(_LABEL_KEYS)})\s*(?:is\b|[:=])\s*(?:is\b)?(?P<label>.+)", re.IGNORECASE)
_MARKS = str.maketrans("", "", "*_`#[]\"'“”‘’")
_NOUN = re.compile(r"^(?:response|answer|assistant|option|the)\s+", re.IGNORECASE)


def without_reasoning(text: str) -> str:
    """The reply after its think block; an empty text where the block was never closed."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def parse_score(text: str, low: float, high: float) -> float | None:
    """A score on ``[low, high]``, mapped to ``[0, 1]``.

    Understood are JSON (``{"score": 7}``), a line such as ``Score: 7`` or ``**Rating:** 7/10`` (the last one counts), and
    a number or a fraction alone on the last line. A number outside the scale, or out of another maximum, is no score.

    Args:
        text: the reply; a think block in front is left out.
        low: the scale's lower end.
        high: its upper end.
    """
    text = without_reasoning(text)
    for value in _json_values(text, _SCORE_KEYS):
        found = _SCORE_ALONE.fullmatch(value.strip()) if isinstance(value, str) else None
        if found:
            return _on_scale(found, low, high)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _scaled(float(value), low, high)
    for line in reversed(_lines(text)):
        if lines := list(_SCORE_LINE.finditer(line)):
            return _on_scale(lines[-1], low, high)
    last = _lines(text)[-1:] or [""]
    alone = _SCORE_ALONE.fullmatch(last[0])
    return _on_scale(alone, low, high) if alone else None


def parse_label(text: str, labels: Mapping[str, str]) -> str | None:
    """One of a few labels.

    Understood are JSON (``{"verdict": "correct"}``), a line such as ``Verdict: **correct**`` or ``[[A]]`` (the last one
    counts), and a label alone on the last line. A label inside a sentence is none: "not correct" must never count as
    "correct".

    Args:
        text: the reply; a think block in front is left out.
        labels: word in lower case to the label it stands for.
    """
    text = without_reasoning(text)
    for value in _json_values(text, _LABEL_KEYS):
        if found := _label(str(value), labels):
            return found
    for line in reversed(_lines(text)):
        if named := _LABEL_LINE.search(line):
            return _label(named["label"], labels)
    last = _lines(text)[-1:] or [""]
    return _label(last[0], labels)


def _lines(text: str) -> list[str]:
    """The lines with something on them, without markdown and quotation marks."""
    return [line.strip() for line in text.translate(_MARKS).splitlines() if line.strip()]


def _label(words: str, labels: Mapping[str, str]) -> str | None:
    words = " ".join(words.translate(_MARKS).split()).strip(" .!,;:{}()").lower()
    return labels.get(words) or labels.get(_NOUN.sub("", words))


def _json_values(text: str, keys: tuple[str, ...]) -> Iterator[Any]:
    """The values of these keys in the JSON objects of a text, the last object first."""
    decoder = json.JSONDecoder()
    for brace in reversed([i for i, sign in enumerate(text) if sign == "{"][-50:]):
        try:
            found, _ = decoder.raw_decode(text[brace:])
        except (ValueError, RecursionError):
            continue
        named = {str(key).lower(): value for key, value in found.items()}
        yield from (named[key] for key in keys if key in named)


def _on_scale(found: re.Match[str], low: float, high: float) -> float | None:
    if found["of"] is not None and _number(found["of"]) != high:
        return None
    return _scaled(_number(found["number"]), low, high)


def _scaled(number: float, low: float, high: float) -> float | None:
    return (number - low) / (high - low) if math.isfinite(number) and low <= number <= high else None


def _number(text: str) -> float:
    return float(text.replace(",", "."))
