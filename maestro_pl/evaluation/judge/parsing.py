"""Reading a judge's reply: a score on a scale, or one label of a few; ``None`` where it says neither clearly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T", str, float)
Item: TypeAlias = str | dict[str, Any]

_LONGEST_LABEL = 80
_NUMBER = r"[-+]?\d+(?:[.,]\d+)?"
_OUT_OF = rf"(?:\s*(?:/|out\s+of)\s*(?P<of>{_NUMBER}))?"
_RANGE_OR_MORE = r"(?!\w|[.,:]\d|\s*(?:-|–|—|to\b|or\b|and\b)\s*\d|\s*[%/])"
_SCORE = rf"(?P<number>{_NUMBER}){_OUT_OF}{_RANGE_OR_MORE}"
_SCORE_START = re.compile(rf"\s*{_SCORE}", re.IGNORECASE)
_SCORE_ALONE = re.compile(rf"(?:score\s+)?{_SCORE}\s*(?:points?)?[.!]?", re.IGNORECASE)
_MARKS = str.maketrans("", "", "*_`#[]\"'“”‘’")
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")
_NOUN = re.compile(r"^(?:response|answer|assistant|option|the)\s+")
_OBJECT = re.compile(r'\{\s*"|\[\s*\{')
_LINE_START = re.compile(r"[\W\d_]*")
_SENTENCE_START = re.compile(r"(?:^|[.!?;,]\s)[\W\d_]*$")


class _Key:
    """A word that a score or a verdict stands under: in a line (``Final score: 7``) or as a key of a JSON object."""

    def __init__(self, words: str) -> None:
        name = rf"\b(?:(?:my|the|(?P<final>final|overall|total))\s+){{0,3}}(?:{words})\b"
        scale = r"(?:\s*\([^()]{0,40}[\d/][^()]{0,40}\))?"  # Score (0-10):
        mark = r"(?:\s*(?:is\s*)?[:=|：]\s*(?:is\b)?|\s+[-–—]+\s)"
        self.word = re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
        self.name = re.compile(name, re.IGNORECASE)
        self.head = re.compile(rf"{name}{scale}(?:{mark}|\s*(?P<is>is\b)|\W{{0,20}}$)", re.IGNORECASE)


_VERDICT = _Key("verdict|judge?ment|decision|winner")
_WEAK = (_Key("correct"), _Key("result|answer"))  # words of the matter itself as well: "The correct answer is: no"
_SCORES = (_Key("score"), _Key("rating"), _Key("grade"))  # "Score: 6", then "Grade: 2 (reading level)"


@dataclass(frozen=True)
class _Said(Generic[T]):
    """What a reply says under a key.

    Attributes:
        value: None where it cannot be read.
        final: it is called final or overall.
        last: it begins the reply's last line (not as prose with "is"), or is an object at the reply's end.
    """

    value: T | None
    final: bool
    last: bool


def without_reasoning(text: str) -> str:
    """The reply after its think block; an empty text where the block was never closed."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if "<think>" in text else text.strip()


def plain_label(words: str) -> str:
    """A label as it is looked up: in lower case, without markdown and the signs around it."""
    return _EDGES.sub("", " ".join(words.translate(_MARKS).lower().split()))


def parse_score(text: str, low: float, high: float) -> float | None:
    """A score on ``[low, high]``, mapped to ``[0, 1]``.

    Understood are JSON (``{"score": 7}``), a line or sentence that begins ``Score: 7`` or ``**Rating:** 7/10``, and a
    number or a fraction alone on the last line. A rating counts where there is no score, and a grade where there is
    neither. Of several that differ the one called final or overall counts, else the one on the last line, else none. A
    number outside the scale, or out of another maximum, is no score.

    Args:
        text: the reply; a think block in front is left out.
        low: the scale's lower end.
        high: its upper end.
    """

    def read(words: str) -> float | None:
        found = _SCORE_START.match(words)
        return _on_scale(found, low, high) if found else None

    items = _items(without_reasoning(text))
    for key in _SCORES:
        if said := _statements(items, key, read, inside=False):
            return _settled(said)
    alone = _SCORE_ALONE.fullmatch(_last_line(items))
    return _on_scale(alone, low, high) if alone else None


def parse_label(text: str, labels: Mapping[str, str]) -> str | None:
    """One of a few labels.

    Understood are JSON (``{"verdict": "correct"}``), a line such as ``Verdict: **correct**``, and a label alone on the
    last line, such as ``[[A]]``. Of several verdicts that differ the one called final or overall counts, else the one
    on the last line, else none. Without any verdict, JSON with ``correct``, ``result`` or ``answer`` counts, and a last
    line that begins with one of them. A label inside a sentence is none: "not correct" must never count as "correct".

    Args:
        text: the reply; a think block in front is left out.
        labels: word in lower case to the label it stands for.
    """

    def read(words: str) -> str | None:
        return _label(words, labels)

    text = without_reasoning(text)
    items = _items(text)
    alone = _label(_last_line(items), labels)
    if said := _statements(items, _VERDICT, read, inside=True):
        verdict = _settled(said)
        return verdict if alone in (None, verdict) else None
    if not _VERDICT.word.search(text):
        for key in _WEAK:
            if said := [one for one in _statements(items, key, read, inside=False, prose=False) if one.last]:
                return _settled(said)
    return alone


def _items(text: str) -> list[Item]:
    """The reply's lines and JSON objects, in order.

    Lines are without markdown and quotation marks. An object inside another one, or in a list of several, is no item.
    """
    items: list[Item] = []
    decoder = json.JSONDecoder()
    start = seen = depth = failures = 0  # depth: open braces of an outer object that is no JSON
    for match in _OBJECT.finditer(text):
        at = match.start()
        if at < start:
            continue
        if depth:
            depth = max(0, depth + text.count("{", seen, at) - text.count("}", seen, at))
            seen = at
        if depth or failures > 50:
            continue
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            failures += 1
            depth, seen = int(text[at] == "{"), at + 1
            continue
        items += _lines(text[start:at])
        if isinstance(found, list):
            found = found[0] if len(found) == 1 else {}
        if isinstance(found, dict):
            items.append(found)
        start = end
    return items + _lines(text[start:])


def _lines(text: str) -> list[Item]:
    """The lines with a word or number on them."""
    return [line.strip() for line in text.translate(_MARKS).splitlines() if re.search(r"\w", line)]


def _last_line(items: list[Item]) -> str:
    last = items[-1] if items else ""
    return last if isinstance(last, str) else ""


def _statements(
    items: list[Item], key: _Key, read: Callable[[str], T | None], *, inside: bool, prose: bool = True
) -> list[_Said[T]]:
    """All that a reply says under a key, in order.

    Args:
        items: of the reply.
        key: the key.
        read: the value in the words after it.
        inside: the key may stand inside a sentence, else only at the beginning of a line or a sentence.
        prose: "the score is 7" counts as well; where nothing can be read after "is", it says nothing.
    """
    said: list[_Said[T]] = []
    heads: list[re.Match[str]]
    for place, item in enumerate(items):
        last = place == len(items) - 1
        if isinstance(item, dict):
            said += _in_object(item, key, read, last)
            continue
        heads = [head for head in key.head.finditer(item) if inside or _begins_sentence(item, head.start())]
        ends = [*(head.start() for head in heads[1:]), len(item)][: len(heads)]
        begins = bool(heads) and _LINE_START.fullmatch(item, 0, heads[0].start()) is not None
        for head, end in zip(heads, ends, strict=True):
            words, after = item[head.end() : end], last
            if not re.search(r"\w", words):  # a heading: the value stands below it
                below = items[place + 1] if place + 1 < len(items) else None
                if not begins or not isinstance(below, str):
                    continue
                words, after = below, place + 1 == len(items) - 1
            value = read(words)
            if head["is"] and (value is None or not prose):
                continue
            said.append(_Said(value, head["final"] is not None, begins and after and not head["is"]))
    return said


def _begins_sentence(line: str, place: int) -> bool:
    near = max(0, place - 20)
    return _SENTENCE_START.search(line[near:place] if near == 0 else f"x{line[near:place]}") is not None


def _in_object(item: dict[str, Any], key: _Key, read: Callable[[str], T | None], last: bool) -> list[_Said[T]]:
    """What an object says under a key; nothing that can be read where two of its keys differ."""
    names = [(key.name.fullmatch(str(name).replace("_", " ").strip()), value) for name, value in item.items()]
    found = [(name["final"] is not None, read(str(value).translate(_MARKS))) for name, value in names if name]
    found = [one for one in found if one[0]] or found
    values = {value for _, value in found if value is not None}
    return [_Said(values.pop() if len(values) == 1 else None, found[0][0], last)] if found else []


def _settled(said: list[_Said[T]]) -> T | None:
    """What several statements come to."""
    said = [one for one in said if one.final] or said
    if len({one.value for one in said}) == 1 or said[-1].last:
        return said[-1].value
    return None


def _label(words: str, labels: Mapping[str, str]) -> str | None:
    words = plain_label(words) if len(words) <= _LONGEST_LABEL else ""
    return labels.get(words) or labels.get(_NOUN.sub("", words))


def _on_scale(found: re.Match[str], low: float, high: float) -> float | None:
    if found["of"] is not None and _number(found["of"]) != high:
        return None
    number = _number(found["number"])
    return (number - low) / (high - low) if math.isfinite(number) and low <= number <= high else None


def _number(text: str) -> float:
    return float(text.replace(",", "."))
