"""The exact-match reward: the answer equals the reference, in any writing that means the same."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

from maestro_pl.errors import UserError
from maestro_pl.rewards.format import parse_response

TYPOGRAPHY = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-", "\u00a0": " ", "\u3000": " "}
    | dict.fromkeys("\u200b\u2060\ufeff")  # no width
    | {chr(code): "-" for code in range(0x2010, 0x2016)}  # hyphens and dashes
    | {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}  # full width
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,6})?")
_TRAILING = re.compile(r"(?:[\s.,;:?]|(?<!\d)!)+$")
_LEADING = re.compile(r"^(?:[\s,;:#]+|\\?[$€£](?=[\s\d.+-]))+")
_WRAPPED = re.compile(r"^(?:([\"'`*_])(.+)\1|[(\[{](\w+)[)\]}])$", re.DOTALL)
_BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})+)\}"  # two levels of braces inside
_LATEX = re.compile(  # around the whole: $...$ \(...\) \[...\] \boxed{...} \text{...}
    rf"^(?:\$\$?([^$]+)\$\$?|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]"
    rf"|\\(?:boxed|fbox|text|textbf|mathbf|mathrm){_BRACED})$",
    re.DOTALL,
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def exact_match_score(
    text: str,
    references: Sequence[str],
    *,
    pattern: re.Pattern[str] | None = None,
    answer_tag: str = "answer",
    drop_articles: bool = False,
) -> float:
    """1 where the response's answer equals one of the references after normalisation, else 0.

    Args:
        text: the response.
        references: the accepted answers.
        pattern: see :func:`extract_answer`.
        answer_tag: name of the answer tag.
        drop_articles: see :func:`normalize_answer`.
    """
    answer = extract_answer(text, pattern=pattern, answer_tag=answer_tag)
    return float(any(answers_equal(answer, reference, drop_articles=drop_articles) for reference in references))


def extract_answer(
    text: str, *, pattern: re.Pattern[str] | None = None, think_tag: str = "think", answer_tag: str = "answer"
) -> str:
    """The answer in a response: its answer block, else what follows the reasoning, else all of it.

    Args:
        text: the response.
        pattern: where it matches in that text, its last match (its first group, if it has one) is the answer.
        think_tag: name of the reasoning tag.
        answer_tag: name of the answer tag.
    """
    block = parse_response(text, think_tag=think_tag, answer_tag=answer_tag).answer
    answer = block if block is not None else text.rpartition(f"</{think_tag}>")[2]
    matches = list(pattern.finditer(answer)) if pattern is not None else []
    if matches:
        last = matches[-1]
        answer = (last.group(1) or "") if last.re.groups else last.group()
    return answer.strip()


def answers_equal(answer: str, reference: str, *, drop_articles: bool = False) -> bool:
    """Whether two answers are the same text after :func:`normalize_answer`, or the same number (1.0 and 1)."""
    left = normalize_answer(answer, drop_articles=drop_articles)
    right = normalize_answer(reference, drop_articles=drop_articles)
    if left == right:
        return True
    if _NUMBER.fullmatch(left) and _NUMBER.fullmatch(right):
        return Decimal(left) == Decimal(right)
    return False


def normalize_answer(text: str, *, drop_articles: bool = False) -> str:
    r"""An answer in a writing that can be compared.

    Case, white space, composed accents, full-width signs, quotes and dashes are levelled; punctuation, quotes,
    emphasis, brackets, dollar signs and ``\boxed`` around the whole, a currency sign in front of a number and commas
    between thousands are left out: ``"  **$1,200.**"`` becomes ``"1200"``. Units, percent signs and words around the
    answer stay: give a ``pattern`` that leaves them out.

    Args:
        text: the answer.
        drop_articles: leave out a, an and the, unless nothing else is there.
    """
    text = " ".join(unicodedata.normalize("NFC", text).translate(TYPOGRAPHY).casefold().split())
    before = None
    while text != before:  # "**(b).**" has several layers
        before = text
        latex = _LATEX.match(text)
        if latex:
            text = next(part for part in latex.groups() if part is not None).strip()
        text = _LEADING.sub("", _TRAILING.sub("", text))
        wrapped = _WRAPPED.match(text)
        if wrapped:
            text = wrapped[2] or wrapped[3]
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    if drop_articles:
        text = " ".join(_ARTICLES.sub(" ", text).split()) or text
    return text


def accepted_references(value: object) -> list[str]:
    """The accepted answers in a data cell: a text, a number, or a list of them; none for ``None``, NaN and empty text.

    Raises:
        UserError: the cell holds something else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, int | float):
        return [str(value)]
    if hasattr(value, "tolist"):  # a NumPy array out of a Parquet file
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [text for item in value for text in accepted_references(item)]
    raise UserError(f"{value!r} ({type(value).__name__}) is no reference: expected a text, a number or a list of them.")
