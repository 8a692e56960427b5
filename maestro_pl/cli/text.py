"""Errors and warnings as the command line prints them."""

from __future__ import annotations

import unicodedata

LONGEST = 4000
_UNSAFE = {"Cc", "Cs", "Zl", "Zp"}  # controls, lone surrogates, separators that some terminals break lines at
_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # reorder what stands beside them


def headed(kind: str, text: str) -> str:
    """``maestro-pl: error: <the text>``, further lines indented, so that it is seen where the message ends.

    Args:
        kind: ``error`` or ``warning``.
        text: what is to be said, of any number of lines.
    """
    first, *others = printable(text).split("\n")
    return "\n".join([f"maestro-pl: {kind}: {first}", *(f"  {line}" if line else "" for line in others)])


def printable(text: str) -> str:
    """The text with its lines, control characters escaped, cut where it is very long.

    Messages quote what users and files hold; an escape sequence in it would move the cursor or hide what stands before.
    """
    lines = [line.expandtabs(4).rstrip() for line in text.replace("\r\n", "\n").strip().split("\n")]
    whole = "\n".join("".join(map(_shown, line)) for line in lines)
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST].rstrip()} … ({len(whole) - LONGEST} more characters)"


def _shown(character: str) -> str:
    if unicodedata.category(character) in _UNSAFE or unicodedata.bidirectional(character) in _TURNING:
        return character.encode("unicode_escape").decode("ascii")
    return character
