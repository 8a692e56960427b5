"""The child process that compares two mathematical texts; started by path, so that it imports neither us nor torch.

It reads one JSON list ``[answer, references, seconds]`` a line and writes one verdict a line.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
_WORD = re.compile(
    r"(?<![\\A-Za-z{])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|lim|det|gcd|infty|pi)\b)[A-Za-z]{3,}"
)


def compare(answer: str, references: list[str]) -> str:
    """``equal``, ``different`` or ``no_reference``: whether an answer equals one of the references, by math-verify.

    Args:
        answer: text or LaTeX; the comparison takes what math-verify extracts from it.
        references: the accepted ones; those that hold no mathematics are left out.
    """
    from math_verify import verify

    golds = [gold for gold in map(_parse, references) if gold]
    if not golds:
        return "no_reference"
    target = _parse(answer)
    equal = any(verify(gold, target, timeout_seconds=None, raise_on_error=True) for gold in golds if target)
    return "equal" if equal else "different"


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    if not _DELIMITED.search(text) and not _WORD.search(text):  # a formula without dollar signs
        latex = [LatexExtractionConfig()]
        found = parse(f"${text}$", extraction_config=latex, fallback_mode="no_fallback", parsing_timeout=None)
        if found:
            return list(found)
    return list(parse(text, fallback_mode="no_fallback", parsing_timeout=None))


def _limit_memory(megabytes: int) -> None:
    """Cap the address space, where the platform lets us."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    except (ImportError, ValueError, OSError):
        return


def _set_alarm(seconds: float) -> None:
    """Let the kernel end this process after so long, also when its parent is gone and nobody else can."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def serve(megabytes: int) -> None:
    """Answer until standard input closes."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # what libraries print must not mix with the verdicts
        import logging

        import math_verify  # noqa: F401  - loaded before the first clock starts

        logging.disable(logging.CRITICAL)
        _limit_memory(megabytes)
        print("ready", file=replies, flush=True)
        for line in iter(sys.stdin.readline, ""):
            answer, references, seconds = json.loads(line)
            _set_alarm(2 * seconds + 1)
            try:
                verdict = compare(answer, references)
            except (
                Exception
            ):  # whatever a library three layers down may raise: a failed comparison, counted and reported
                verdict = "failed"
            _set_alarm(0)
            print(verdict, file=replies, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[-1]))
