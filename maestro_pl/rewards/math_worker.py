"""The child process that compares two mathematical texts; started by path, so that it imports neither us nor torch.

It reads one JSON list ``[answer, references, seconds of processor time, seconds]`` a line and writes two lines: ``read``
once it has read the references (``no_reference`` or ``unreadable_reference`` where there is nothing to compare with, and
no second line), and then the verdict.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from functools import lru_cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

_PATCHED = re.compile(r"(?:math_verify|latex2sympy2_extended)\b(?!\.gen)")  # not the generated parsers: large
_CATCHES_ALL = {"Exception", "BaseException", "RuntimeError"}
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin(?!\{(?:\w?matrix|smallmatrix|array|cases)\})")
_WORD = re.compile(
    r"(?<![\\A-Za-z{])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|lim|det|gcd|infty|pi)\b)[A-Za-z]{3,}"
)


@lru_cache(maxsize=256)
def read_references(references: tuple[str, ...]) -> tuple[str, list[list[Any]]]:
    """What math-verify reads in the references, and can compare with a plain number.

    Returns:
        ``read``; ``no_reference`` where none holds any mathematics; ``unreadable_reference`` where those that do cannot be
        read. And what was read.

    Raises:
        MemoryError: reading them needs more than the process may take.
    """
    from math_verify import verify

    read, broken = [], False
    for reference in references:
        try:
            gold = _parse(reference)
            if gold:  # what cannot be compared with 1 cannot be compared at all, and no answer is to blame
                verify(gold, _parse("1"), timeout_seconds=None, raise_on_error=True)
        except MemoryError:
            raise
        except Exception:
            broken = True
            continue
        if gold:
            read.append(gold)
    return ("read" if read else "unreadable_reference" if broken else "no_reference"), read


def compare(answer: str, golds: list[list[Any]]) -> str:
    """``equal``, ``different`` or ``failed``: whether an answer equals a reference, by math-verify.

    Args:
        answer: text or LaTeX; the comparison takes what math-verify extracts from it.
        golds: what was read in the references.

    Raises:
        MemoryError: the comparison needs more than the process may take.
    """
    from math_verify import verify

    try:
        target = _parse(answer)
    except MemoryError:
        raise
    except Exception:
        return "failed"
    verdict = "different"
    for gold in golds if target else []:
        try:
            if verify(gold, target, timeout_seconds=None, raise_on_error=True):
                return "equal"
        except MemoryError:
            raise
        except Exception:
            verdict = "failed"
    return verdict


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


def _set_alarms(processor: float, wall: float) -> None:
    """Let the kernel end this process after so many seconds of either, also when its parent is gone and nobody else can."""
    import signal

    if hasattr(signal, "setitimer"):
        for timer, sign, seconds in (
            (signal.ITIMER_PROF, signal.SIGPROF, processor),
            (signal.ITIMER_REAL, signal.SIGALRM, wall),
        ):
            signal.signal(sign, signal.SIG_DFL)
            signal.setitimer(timer, seconds)


def serve(megabytes: int) -> None:
    """Answer until standard input closes, or until memory ran out, which ends the process."""
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
            answer, references, seconds, patience = json.loads(line)
            _set_alarms(seconds, patience)
            state = "unreadable_reference"
            try:
                state, golds = read_references(tuple(references))
                print(state, file=replies, flush=True)
                if state == "read":
                    _set_alarms(seconds, patience)
                    print(compare(answer, golds), file=replies, flush=True)
            except MemoryError:
                print("failed" if state == "read" else state, file=replies, flush=True)
                return
            _set_alarms(0, 0)


if __name__ == "__main__":
    serve(int(sys.argv[-1]))
