"""Errors and warnings as the command line prints them."""

from __future__ import annotations

from maestro_pl.errors import printable


def headed(kind: str, text: str) -> str:
    """``maestro-pl: error: <the text>``, further lines indented, so that it is seen where the message ends.

    Args:
        kind: ``error`` or ``warning``.
        text: what is to be said, of any number of lines.
    """
    first, *others = printable(text).split("\n")
    return "\n".join([f"maestro-pl: {kind}: {first}", *(f"  {line}" if line else "" for line in others)])
