"""Multiple choice: which option an answer picks, and whether it is the right one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maestro_pl.data.template import filled
from maestro_pl.errors import UserError
from maestro_pl.rewards.choice_refusals import without_refusals
from maestro_pl.rewards.exact_match import extract_answer, normalize_answer

_SINGLE = ""  # the name of the only question of a row whose choices are a plain list
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SAID = re.compile(
    r"\b(?:answers?|choice|option)\b[\"'*\s]*(?:(?:is|are|would be|should be|must be)\b|[:=])|\bboxed\b"
    r"|答案\s*(?:应该?)?(?:是|为)?|应?选(?:择|项)?",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"(?:\b(?:not|never|isn't|isnt|rather than|instead of)|不是)\s*(?:option|choice)?\s*[(\"'*]*(?:[a-z]\s*[:.)]\s*)?$",
    re.I,
)
_MARKED = re.compile(  # each with one letter: (c) {C} **C** "C" ... then C: C. C) ... then "option C"
    r"[(\[{]\s*([A-Za-z])\s*[)\]}]|(?:\*{1,2}|[\"'`])([A-Z])(?:\*{1,2}|[\"'`])"
    r"|(?<![A-Za-z0-9_'.&])([A-Z])(?=\s*[:)!。]|\.(?:\s|$)|\s*$|\s*[,;]\s|\s+(?:or|and)\s+[A-Z]\b)"
    r"|\b(?:[Oo]ption|[Cc]hoice|OPTION|CHOICE)\s+(?:([A-Z])\b|([a-z])(?=[.,:;)\"'*]|\s*$))"
    r"|\b([A-Z])[\"')*]*\s+(?:is|are|would be|seems|must be)\s+"
    r"(?:(?:the|my|most|more|clearly|only|much|far|very|all|both)\s+){0,3}"
    r"(?:correct|right|best|better|true|appropriate|answers?|fitting|choices?|options?|likely|plausible|suitable|accurate)\b"
    r"|\b([A-Z])[\"')*]*\s+(?:fits|matches|works|makes\s+(?:the\s+most\s+)?sense)\b|\b([A-Z])\s+is\s*[.!]?\s*$"
    r"|^[^\w\n]*([a-z])\s*[:).](?=\s|$)"  # b) at the beginning
)
_LEADING = re.compile(r"^[\s\"'*]*([A-Z])(?=\s*(?:$|[-,;\u2013\u2014])|\s+(?:because|since|as|and)\b)")
_LEADING_NO_WORD = re.compile(r"^[\s\"'*]*([B-HJ-Z])(?=\s)")  # "A bird" and "I think" begin sentences
_REASON = re.compile(r",?\s+(?:since|because|as)\b", re.IGNORECASE)
_NUMBERED = re.compile(r"(?:^|(?<=[\s,;]))\(?\d+\s*[.:)]\s*[(\"'*]*([A-Za-z])\b(?=\W*(?:$|[\s,;]\(?\d))")
_EXPLAINED = re.compile(r"\n\W*(?:explanation|reason(?:ing)?|justification|rationale)\b", re.IGNORECASE)
_EMPHASISED = re.compile(
    r"(\*{1,3}|_{1,2}|`{1,3}|\$)\s*[(\[]?([A-Z])[)\]]?\s*[.:!)]?\s*\1(?!\w)|<([A-Z])>(?!.*</)", re.DOTALL
)  # **B** *B.* `B` $B$ <B>
_ENUMERATED = re.compile(r"^\s*([A-Za-z])\s*[.:)]\s*")


@dataclass(frozen=True)
class Question:
    """One question of a row.

    Attributes:
        name: as it stands in the answer before the choice; empty where the row asks one question only.
        options: the text of every option, without its letter.
        right: the place of the right one.
    """

    name: str
    options: tuple[str, ...]
    right: int


def choice_accuracies(text: str, questions: Sequence[Question], *, answer_tag: str = "answer") -> dict[str, float]:
    """1 for each question that the response answers with the right option, else 0.

    The answer is the answer block, else what follows the reasoning, else the whole response (``extract_answer``).

    Args:
        text: the response.
        questions: of the row, see :func:`read_questions`.
        answer_tag: name of the answer tag.
    """
    answer = _unmarked(unicodedata.normalize("NFKC", extract_answer(text, answer_tag=answer_tag)))
    parts = _parts_of(answer, questions)
    return {
        question.name: float(chosen_option(part, question.options) == question.right)
        for question, part in zip(questions, parts, strict=True)
    }


def choice_score(accuracies: Sequence[float], *, share: bool = False) -> float:
    """1 if every question is right, else 0; with ``share`` the mean of the accuracies."""
    return sum(accuracies) / len(accuracies) if share else float(all(accuracies))


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """The place of the one option that an answer picks, by its letter or its text; None where it picks none or several.

    A letter counts where it is marked as one: alone, in brackets, quotes or emphasis, before a colon or a full stop, or
    after "option". Capital A and I inside a sentence are words. Where the answer says "the answer is" (or "answer:",
    "boxed", and the like), only those lines count; two of them that differ, or a letter beside another option's text,
    are no choice. What is turned down ("B is wrong since ...", "not B", "B?") is not picked, nor is a list of all options,
    each on a line of its own, nor what an explanation ("because ...") says after a choice.

    Args:
        answer: the text that names the option.
        options: their texts.
    """
    answer, options = _unmarked(unicodedata.normalize("NFKC", answer)), [_unmarked(option) for option in options]
    answer = _without_listing(answer, options)
    texts = [_plain(option) for option in options]
    explained = _EXPLAINED.search(answer)
    if explained and not _SAID.search(answer, explained.end()):
        before = chosen_option(answer[: explained.start()], options)
        if before is not None:
            return before
    whole = _plain(answer)
    if whole in texts:
        return texts.index(whole)
    if re.fullmatch(r"[a-z]", whole):
        place = _LETTERS.lower().index(whole)
        return place if place < len(options) else None
    if re.fullmatch(r"\W*[A-Z](?:\W+(?:and\W+|or\W+)?[A-Z])+\W*", answer) and len(set(re.findall("[A-Z]", answer))) > 1:
        return None  # "A B C D"
    answer = without_refusals(answer, options)
    picked: set[int] = set()
    for line in _telling_lines(answer):
        picked |= _picked_before_reason(line, options)
    return picked.pop() if len(picked) == 1 else None


def read_questions(choices: object, label: object) -> list[Question]:
    """The questions of a row; none where it has no choices or no label.

    Args:
        choices: a list of option texts, or a mapping of question names to such lists.
        label: the right option's letter, text or index from 0, or a mapping of question names to them. An integer is
            always an index; a text of digits is one where no other option has this text.

    Raises:
        UserError: the two do not fit together.
    """
    choices, label = _plain_types(choices), _plain_types(label)
    if _is_missing(choices) or _is_missing(label):
        return []
    if isinstance(choices, Mapping) and isinstance(label, Mapping):
        if set(choices) != set(label):
            raise UserError(
                f"choices has the questions {sorted(map(str, choices))} and label has {sorted(map(str, label))}: give both "
                "the same names."
            )
        named = [(str(name), choices[name], label[name]) for name in choices]
        return [
            _question(name, options, right)
            for name, options, right in named
            if not (_is_missing(options) or _is_missing(right))
        ]
    if isinstance(choices, Mapping) or isinstance(label, Mapping):
        raise UserError(
            f"choices is a {type(choices).__name__} and label a {type(label).__name__}: give a list and a letter, or two "
            "mappings from question names."
        )
    return [_question(_SINGLE, choices, label)]


def _question(name: str, options: object, label: object) -> Question:
    """Check one question's options and label."""
    where = f" of the question {name!r}" if name else ""
    options = _plain_types(options)
    if not isinstance(options, list | tuple) or not 2 <= len(options) <= len(_LETTERS):
        raise UserError(f"choices{where} is {options!r}, expected a list of 2 to {len(_LETTERS)} option texts.")
    options = filled(options)  # empty cells of a table at the end
    if len(options) < 2 or any(option is None or option != option for option in options):
        raise UserError(
            f"choices{where} is {options!r}: an option among the others is empty, or fewer than two are left."
        )
    texts = [str(option).strip() for option in options]
    heads = [_ENUMERATED.match(text) for text in texts]
    if all(head and head[1].upper() == letter for head, letter in zip(heads, _LETTERS, strict=False)):
        texts = [_ENUMERATED.sub("", text, count=1) for text in texts]
    place = _index(label)
    if place is not None and not isinstance(label, str):
        if 0 <= place < len(texts):
            return Question(name, tuple(texts), place)
        raise UserError(
            f"label{where} is {label!r}: a number is an index, from 0 to {len(texts) - 1} here. Write a letter, or the text "
            "of an option as text."
        )
    said = str(label).strip()
    letter = said.strip("().: ").upper()
    plain = [_plain(text) for text in texts]
    if len(letter) == 1 and letter in _LETTERS[: len(texts)]:
        return Question(name, tuple(texts), _LETTERS.index(letter))
    if _plain(said) in plain:
        written = plain.index(_plain(said))
        if place is not None and place < len(texts) and place != written:
            raise UserError(
                f"label{where} is {label!r}, which is the text of option {_LETTERS[written]} and the index of option "
                f"{_LETTERS[place]}: write the letter, or the index as a number."
            )
        return Question(name, tuple(texts), written)
    if place is not None and place < len(texts):
        return Question(name, tuple(texts), place)
    raise UserError(
        f"label{where} is {label!r}, expected a letter from A to {_LETTERS[len(texts) - 1]} or the text of an option."
    )


def _index(label: object) -> int | None:
    """The number that a label is or writes out, as an index; None for any other label."""
    if isinstance(label, str):
        return int(label) if re.fullmatch(r"\s*[0-9]{1,4}\s*", label) else None
    if isinstance(label, bool) or not isinstance(label, int | float) or label != label // 1:
        return None
    return int(label)


def _parts_of(answer: str, questions: Sequence[Question]) -> list[str]:
    """The part of the answer that speaks of each question; empty for a question it leaves out."""
    if len(questions) == 1 and questions[0].name == _SINGLE:
        return [answer]
    names = "|".join(re.escape(question.name) for question in sorted(questions, key=lambda q: -len(q.name)))
    after = re.findall(rf"\b([A-Z])[\"')*]*\s+for\s+(?:the\s+)?({names})\b", answer, re.I)  # "A for the emotion"
    if len(after) == len(questions) and len({name.casefold() for _, name in after}) == len(questions):
        return [
            letter for question in questions for letter, name in after if name.casefold() == question.name.casefold()
        ]
    heads = list(_head_pattern(names).finditer(answer))
    if not heads:
        parts = [part for part in re.split(r"[\n;]+", answer) if part.strip()]
        numbered = _NUMBERED.findall(answer)
        if len(numbered) == len(questions) > 1 and re.fullmatch(r"[\W\d]*", _NUMBERED.sub("", answer)):
            return numbered
        packed = re.fullmatch(rf"\W*([A-Z]{{{len(questions)}}})\W*", answer)
        if packed and len(questions) > 1:  # "BC"
            return list(packed[1])
        letters = re.fullmatch(r"\W*[A-Za-z](?:\W+(?:and\W+)?[A-Za-z])*\W*", answer)
        if letters and len(parts) == 1:
            parts = re.findall(r"\b[A-Za-z]\b", answer)
        if len(parts) == len(questions):
            return parts
        return [answer] if len(questions) == 1 else [_mentioned(answer, question.options) for question in questions]
    ends = [head.start() for head in heads[1:]] + [len(answer)]
    found: dict[str, list[str]] = {}
    for head, end in zip(heads, ends, strict=True):
        found.setdefault((head[1] or head[2]).casefold(), []).append(answer[head.end() : end].strip(" \n\t,;\"'{}*"))
    return [
        "\n".join(dict.fromkeys(found[question.name.casefold()]))
        if question.name.casefold() in found
        else _mentioned(answer[: heads[0].start()], question.options)
        for question in questions
    ]


def _head_pattern(names: str) -> re.Pattern[str]:
    """A question's name where its answer follows: alone on its line, or before a colon, a bracket or "is"."""
    words = rf"(?:\s+(?!(?:{names})\b)[\w'\u2019]+){{0,5}}?"  # "the emotion that Joe feels is"
    return re.compile(
        rf"^[^\w\n]*({names})[^\w\n]*$|\b({names})(?:(?:\s+(?:answer|choice|option))?[\"'*\s]*(?:[:=-]|(?=\()|\))|{words}\s+is\b)",
        re.IGNORECASE | re.MULTILINE,
    )


def _mentioned(text: str, options: Sequence[str]) -> str:
    """The one option whose text stands in prose that names no question; letters do not count there."""
    picked = _mentions(" ".join(_fold(text).split()), options)
    return options[picked.pop()] if len(picked) == 1 else ""


def _without_listing(answer: str, options: Sequence[str]) -> str:
    """The answer without a list of all options, each on a line of its own."""
    lines = answer.split("\n")
    plain = [_plain(_ENUMERATED.sub("", line.strip(" *-"), count=1)) for line in lines]
    texts = [_plain(unicodedata.normalize("NFKC", option)) for option in options]
    if len(lines) <= len(options) or not set(texts) <= set(plain):
        return answer
    listed = {plain.index(text) for text in texts}
    return "\n".join(line for place, line in enumerate(lines) if place not in listed)


def _telling_lines(answer: str) -> list[str]:
    """What follows "the answer is" up to the end of its line, wherever it stands; else every line."""
    heads = list(_SAID.finditer(answer))
    ends = [head.start() for head in heads[1:]] + [len(answer)]
    said = [answer[head.end() : end].strip(" \n\t:*_") for head, end in zip(heads, ends, strict=False)]
    said = [text.split("\n")[0].strip(" *_") for text in said if text]
    said = [text.upper() if re.fullmatch(r"[a-z]\W*", text) else text for text in said]  # "the answer is b."
    return said or answer.split("\n")


def _mentions(folded: str, options: Sequence[str]) -> set[int]:
    """The options whose texts stand in a line and not right after "not"."""
    picked = set()
    for place in sorted(range(len(options)), key=lambda place: -len(options[place])):
        option = _plain(options[place])  # the longest first, so that "joy" inside "great joy" is not a second mention
        if len(option) < 2:
            continue
        left, right = (r"\b" if _is_latin(end) else "" for end in (option[0], option[-1]))
        pattern = re.compile(left + re.escape(option) + right)
        if any(not _negated(folded, mention.start()) for mention in pattern.finditer(folded)):
            picked.add(place)
        folded = pattern.sub(" | ", folded)
    return picked


def _picked_before_reason(line: str, options: Sequence[str]) -> set[int]:
    """What a line names in front of "since", "because" or "as"; all it names where nothing stands in front."""
    for option in options:  # an option's own "because" begins no reason
        if _REASON.search(f" {option}") and _plain(option) in _plain(line):
            return _picked_in(line, options)
    reason = _REASON.search(line)
    before = _picked_in(line[: reason.start()], options) if reason else set()
    return before or _picked_in(line, options)


def _picked_in(line: str, options: Sequence[str]) -> set[int]:
    """The options that a line names, by letter or by text."""
    picked = _mentions(" ".join(_fold(line).split()), options)
    for option in sorted(options, key=len, reverse=True):  # letters inside an option's text are no choice
        line = re.sub(re.escape(option), "|", line, flags=re.IGNORECASE) if len(_plain(option)) > 1 else line
    for pattern in (_MARKED, _LEADING, _LEADING_NO_WORD):
        for match in pattern.finditer(line):
            letter = next(group for group in match.groups() if group).upper()
            if _LETTERS.index(letter) < len(options) and not _negated(line, match.start()):
                picked.add(_LETTERS.index(letter))
    return picked


def _negated(text: str, place: int) -> bool:
    """Whether "not" stands right before this place; a few words are looked at, so that long answers take no long time."""
    return _NEGATED.search(text, max(0, place - 60), place) is not None


def _unmarked(text: str) -> str:
    """Without emphasis and control characters; a letter that is emphasised stands in brackets instead."""
    text = _EMPHASISED.sub(lambda match: f"({match[2] or match[3]})", re.sub(r"[\x00-\x08\x0b-\x1f]", " ", text))
    return re.sub(r"\*+|`+|__+", "", text)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").replace("\u2018", "'")


def _plain(text: str) -> str:
    return normalize_answer(_fold(text))


def _is_latin(character: str) -> bool:
    """Whether words with this character are set apart by spaces, unlike in Chinese and Japanese."""
    return character.isalnum() and ord(character) < 0x2E80


def _is_missing(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str | list | tuple | Mapping) and len(value) == 0)


def _plain_types(value: object) -> object:
    return value.tolist() if hasattr(value, "tolist") else value  # a NumPy array out of a Parquet file
