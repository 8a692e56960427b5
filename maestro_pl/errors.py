"""The one exception for bad input: its message is the sentence a user reads."""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot be used.

    The message is one sentence or two: the value, what was expected, what to do. The command line prints it without a
    traceback and exits with status 2.
    """


class OutOfMemory(UserError):
    """Memory ran out, and the work cannot be cut into smaller pieces."""
