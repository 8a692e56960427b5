"""The child process that compares two mathematical texts; started by path, so that it imports neither us nor torch.

It reads one JSON list ``[answer, references, seconds]`` a line and writes one verdict a line.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

_PATCHED = re.compile(r"(?:math_verify|latex2sympy2_extended)\b(?!\.gen)")  # not the generated parsers: large
_CATCHES_ALL = {"Exception", "BaseException", "RuntimeError"}
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
_WORD = re.compile(
    r"(?<![\\A-Za-z{])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|lim|det|gcd|infty|pi)\b)[A-Za-z]{3,}"
)


def compare(answer: str, references: list[str]) -> str:
    """``equal``, ``different``, ``no_reference`` or ``failed``: whether an answer equals a reference, by math-verify.

    Args:
        answer: text or LaTeX; the comparison takes what math-verify extracts from it.
        references: the accepted ones; those that hold no mathematics are left out.

    Raises:
        MemoryError: the comparison needs more than the process may take.
    """
    verdicts = [_compare_one(answer, reference) for reference in references]
    return next((v for v in ("equal", "failed", "different") if v in verdicts), "no_reference")


def _compare_one(answer: str, reference: str) -> str:
    from math_verify import verify

    try:
        gold = _parse(reference)
        if not gold:
            return "no_reference"
        target = _parse(answer)
        equal = bool(target) and verify(gold, target, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return "failed"
    return "equal" if equal else "different"


def _parse(text: str) -> list[Any]:
    """What math-verify reads in a text; nothing where it cannot be read.

    Raises:
        MemoryError: too large to be read.
        RecursionError: too deeply nested to be read.
    """
    from math_verify import LatexExtractionConfig, parse

    if not _DELIMITED.search(text) and not _WORD.search(text):  # a formula without dollar signs
        latex = [LatexExtractionConfig()]
        found = parse(f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
        if found:
            return list(found)
    return list(parse(text, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True))


class _Unswallowing(ast.NodeTransformer, SourceFileLoader):
    """Loads a module whose ``except Exception`` lets exhaustion through.

    math-verify takes whatever goes wrong inside for "cannot be parsed" or "differs", and so would take running out of
    memory or of stack for a wrong answer. It has no option against it: ``raise_on_error`` covers its outermost handlers.
    """

    def get_code(self, fullname: str) -> Any:
        """Compile the source, past the cache of byte code."""
        return self.source_to_code(self.get_data(self.path), self.path)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]
        """Compile with the added handlers."""
        tree = ast.fix_missing_locations(self.visit(ast.parse(data)))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def visit_Try(self, node: ast.Try) -> ast.Try:
        """Put ``except (MemoryError, RecursionError): raise`` in front of handlers that would catch them."""
        self.generic_visit(node)
        caught = {
            name.id
            for h in node.handlers
            for name in ast.walk(h.type or ast.Name("Exception"))
            if isinstance(name, ast.Name)
        }
        if caught & _CATCHES_ALL:
            node.handlers[:0] = ast.parse("try: pass\nexcept (MemoryError, RecursionError): raise").body[0].handlers  # type: ignore[attr-defined]
        return node


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if _PATCHED.match(fullname) else None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Unswallowing(spec.loader.name, spec.loader.path)
        return spec


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
    """Answer until standard input closes, or until memory ran out, which ends the process without a reply."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # what libraries print must not mix with the verdicts
        sys.meta_path.insert(0, _Finder())
        import logging

        import math_verify  # noqa: F401  - loaded before the first clock starts

        logging.disable(logging.CRITICAL)
        if hasattr(sys, "set_int_max_str_digits"):
            sys.set_int_max_str_digits(0)  # the clock bounds long numbers
        _limit_memory(megabytes)
        print("ready", file=replies, flush=True)
        for line in iter(sys.stdin.readline, ""):
            answer, references, seconds = json.loads(line)
            _set_alarm(2 * seconds + 1)
            verdict = compare(answer, references)
            _set_alarm(0)
            print(verdict, file=replies, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[-1]))
