"""The one exception for bad input: its message is the sentence a user reads; and the check of a choice, which raises it."""

from __future__ import annotations

from typing import Any, get_args


class UserError(ValueError):
    """Input that cannot be used.

    The message is one sentence or two: the value, what was expected, what to do. The command line prints it without a
    traceback and exits with status 2.
    """


class OutOfMemory(UserError):
    """Memory ran out, and the work cannot be cut into smaller pieces."""


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
