"""Multiple choice: option texts and letters, out of columns or out of a written prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from maestro_pl.data.template import filled, letters

Choices: TypeAlias = list[str] | dict[str, list[str]]
Label: TypeAlias = str | dict[str, str]

OPTION = re.compile(r"[ \t]*\(?([A-Z])[:.)]\s*(.*)")
HEADING = re.compile(r"\s*(\w+) Options:\s*")


def is_blank(value: Any) -> bool:
    """Whether a cell of a table holds nothing: None, NaN (also as table libraries write it), or no more than blanks."""
    return value is None or value != value or (isinstance(value, str) and value.strip() in ("", "nan"))


def label_of(text: str, options: Sequence[str]) -> str:
    """The letter of the option with this text.

    Raises:
        ValueError: there is none.
    """
    if text.strip() not in options:
        raise ValueError(f"the label {text!r} is not among the choices {list(options)}")
    return letters(list(options).index(text.strip()))


def check_letter(letter: str, options: Sequence[str]) -> str:
    """The letter, if there is an option for it.

    Raises:
        ValueError: there is none.
    """
    known = [letters(index) for index in range(len(options))]
    bare = letter.strip().strip("().:．、：（）").strip()  # "A.", "(A)"
    if bare not in known:
        raise ValueError(f"the label {letter!r} is not among the choices {', '.join(known)}")
    return bare


def options_text(choices: Choices) -> str:
    """The options as lettered lines, each list of several under its name."""
    if isinstance(choices, dict):
        return "\n\n".join(f"{name}:\n{options_text(options)}" for name, options in choices.items())
    return "\n".join(f"{letters(index)}: {option}" for index, option in enumerate(choices))


def reference_text(choices: Choices, label: Label) -> str:
    """The right answer in words: ``C: text``, or ``Emotion: A: text, Cause: C: text`` for two questions."""
    if isinstance(choices, dict):
        assert isinstance(label, dict)
        return ", ".join(f"{name}: {reference_text(options, label[name])}" for name, options in choices.items())
    assert isinstance(label, str)
    known = [letters(index) for index in range(len(choices))]
    return f"{label}: {choices[known.index(label)]}"


def without_blanks(choices: Choices) -> tuple[Choices, int]:
    """The options without those at the end that are ``nan``, an empty cell of a table, and how many those are."""
    if isinstance(choices, dict):
        kept = {name: filled(options) for name, options in choices.items()}
        return kept, sum(len(choices[name]) - len(kept[name]) for name in choices)
    return filled(choices), len(choices) - len(filled(choices))


def split_options(text: str) -> tuple[str, Choices]:
    """Take the lettered options off the end of a written question.

    Lists under ``X Options:`` lines are told apart by X; one list alone needs no such line. Of several lists without
    one the last counts: what looks like earlier ones, such as ``A:`` and ``B:`` talking, is the question's.

    Returns:
        What stands before the options, and the options.

    Raises:
        ValueError: there are no options, or their letters do not run from A on.
    """
    before: list[str] = []
    nameless: list[str] = []  # the lines of a list without a name
    lists: dict[str, list[str]] = {}
    name = ""
    for line in text.strip().split("\n"):
        heading, option = HEADING.fullmatch(line), OPTION.fullmatch(line)
        if nameless and (heading or (option and option.group(1) == letters(0))):
            before += nameless
            nameless = []
            del lists[""]
        if not name and not heading and (nameless or (option and option.group(1) == letters(0))):
            nameless.append(line)
        if heading:
            name = heading.group(1)
            lists[name] = []
        elif option and option.group(1) == letters(len(lists.get(name, []))):
            lists.setdefault(name, []).append(option.group(2).strip())
        elif lists.get(name):
            if line.strip():
                lists[name][-1] += "\n" + line.strip()
        else:
            before.append(line)
    if not lists or not all(len(options) > 1 for options in lists.values()):
        raise ValueError("the prompt has no options (lines like 'A: ...', 'B: ...') to choose from")
    choices: Choices = lists if len(lists) > 1 else next(iter(lists.values()))
    return "\n".join(before).strip(), choices


def written_label(reference: str, choices: Choices) -> Label:
    """The letters of a written answer such as ``C: text`` or ``Emotion: A: text, Cause: C: text``.

    Raises:
        ValueError: the answer names no option, or the words after a letter are not those of its option.
    """
    if isinstance(choices, dict):
        starts = {name: re.search(rf"\b{re.escape(name)}:\s*(?=\(?[A-Z]\b)", reference) for name in choices}
        if lost := [name for name, match in starts.items() if match is None]:
            raise ValueError(f"the reference {reference!r} has no answer for {lost[0]}")
        found = {name: match for name, match in starts.items() if match}
        ends = [*(match.start() for match in found.values()), len(reference)]
        return {
            name: _written_letter(reference[match.end() : min(e for e in ends if e > match.start())], choices[name])
            for name, match in found.items()
        }
    return _written_letter(reference, choices)


def _written_letter(answer: str, options: Sequence[str]) -> str:
    """The letter of ``C``, ``C: text``, ``(C) text`` or ``C. text``."""
    match = re.match(r"\s*\(?([A-Z])\b[:.)]?(.*)", answer, re.DOTALL)
    if match is None:
        raise ValueError(f"the reference {answer!r} begins with no letter of an option")
    letter = check_letter(match.group(1), options)
    option = options[[letters(index) for index in range(len(options))].index(letter)]
    words = _bare(match.group(2))
    if words and words != _bare(option):
        raise ValueError(f"the reference {answer.strip()!r} names {letter}, which is {option!r}")
    return letter


def _bare(text: str) -> str:
    return " ".join(text.split()).rstrip(",. ")
