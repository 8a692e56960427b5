"""The one exception for bad input: its message is the sentence a user reads; the checks of a choice and of a seed, which raise
it; and how text that users and files hold is shown.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, get_args

LONGEST = 4000
LARGEST_SEED = 2**32 - 1  # that numpy's generator takes
_UNSAFE = {"Cc", "Cs", "Zl", "Zp"}  # controls, lone surrogates, separators that some terminals break lines at
_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # reorder what stands beside them
_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what a spreadsheet would compute, and what was escaped before


class UserError(ValueError):
    """Input that cannot be used.

    The message is one sentence or two: the value, what was expected, what to do. The command line prints it without a
    traceback and exits with status 2.
    """


class OutOfMemory(UserError):
    """Memory ran out, and the work cannot be cut into smaller pieces."""


class RunStopped(UserError):
    """A run ended early and what it had done is kept.

    Attributes:
        status: the exit status of the process.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def check_choice(where: str, value: object, literal: Any, form: str = "{}={!r}: expected one of {}.") -> None:
    """Raise unless ``value`` is one of the strings of a ``Literal`` type.

    Args:
        where: what has the value, such as ``model.loss.type``.
        value: the one to check.
        literal: the ``Literal`` type.
        form: of the sentence, with places for ``where``, the value and the choices.

    Raises:
        UserError: it is none of them.
    """
    choices = get_args(literal)
    if value not in choices:
        raise UserError(form.format(where, value, ", ".join(choices)))


def check_seed(where: str, value: object) -> None:
    """Raise where a number is none that every generator can be seeded with.

    Args:
        where: what has the value, such as ``seed_everything``.
        value: the one to check; true, false and None say how a seed is come by, and pass.

    Raises:
        UserError: it is below 0, or too large.
    """
    if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= LARGEST_SEED:
        raise UserError(f"{where}={value}: expected a whole number from 0 to {LARGEST_SEED}.")


def printable(text: str) -> str:
    """The text with its lines, control characters escaped, cut where it is very long.

    Messages quote what users and files hold; an escape sequence in it would move the cursor or hide what stands before.
    """
    lines = [line.expandtabs(4).rstrip() for line in text.replace("\r\n", "\n").strip().split("\n")]
    whole = "\n".join("".join(map(_shown, line)) for line in lines)
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST].rstrip()} … ({len(whole) - LONGEST} more characters)"


def escaped(text: str) -> str:
    """The text with its control characters escaped, and nothing else changed."""
    return "".join(character if character in "\n\t" else _shown(character) for character in text)


def cell(value: Any) -> Any:
    """A value for a CSV file: a text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def from_cell(text: str) -> str:
    """The text that :func:`cell` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _shown(character: str) -> str:
    if unicodedata.category(character) in _UNSAFE or unicodedata.bidirectional(character) in _TURNING:
        return character.encode("unicode_escape").decode("ascii")
    return character
