"""What the constructor of a user's class raises, which the parser wraps in a report on types or lets through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from maestro_pl.errors import UserError
from maestro_pl.run.importing import file_of
from maestro_pl.run.others import OURS, origin, told

_CLASS = re.compile(r"class_path[ =]'([^']+)'")


def own_error(error: BaseException) -> UserError | None:
    """The sentence on what a user's class raised while it was built.

    Args:
        error: what the parser raised.

    Returns:
        None where no constructor raised, or one of the project's own: what that says stands for itself or is a bug.
    """
    named = _CLASS.findall(str(error))
    own = next(iter(_of_others(error)), None)
    if own is None:
        return None
    if own is error:
        return _let_through(error)
    if isinstance(own, UserError):
        return UserError(str(own))
    if not named or named[-1].partition(".")[0] in OURS:
        return None
    return _said(own, named[-1])


def _of_others(error: BaseException) -> Iterator[BaseException]:
    """The errors that were not raised by the parser: this one, or those that its report is made of."""
    frames = list(_frames(error))
    if not frames or frames[-1][0] != "jsonargparse":
        yield error
        return
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    behind: list[BaseException | None] = [error.__cause__]
    if trace is not None and isinstance(tried := trace.tb_frame.f_locals.get("exceptions"), list):
        behind = tried  # one for each type that an argument may have
    for each in behind:
        if each is not None:
            yield from _of_others(each)


def _let_through(error: BaseException) -> UserError | None:
    """The same of an error that the parser has no report for: the class is that of the constructor that it called."""
    built: Any = None
    trace = error.__traceback__
    while trace is not None:
        frame, caller = trace.tb_frame, trace.tb_frame.f_back
        if caller is not None and _package(caller) == "jsonargparse" != _package(frame):
            built = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
        trace = trace.tb_next
    if built is None or isinstance(error, UserError):
        return None
    module, name = type(built).__module__, type(built).__name__
    if module.partition(".")[0] in (*OURS, "builtins"):
        return None
    file = file_of(module)
    return _said(error, f"{Path(file).name}:{name}" if file else f"{module}.{name}")


def _said(error: BaseException, class_path: str) -> UserError:
    return UserError(
        f"{class_path} raised {told(error)} ({_place(error, class_path)}): correct the class or its arguments."
    )


def _place(error: BaseException, class_path: str) -> str:
    """The last line of the class's own code that an error went through, which may have come out of a library."""
    package = "_maestro_pl_" if ".py:" in class_path else class_path.partition(".")[0]
    own = [
        place for name, place in _frames(error) if name == package or (package[0] == "_" and name.startswith(package))
    ]
    return own[-1] if own else origin(error)


def _frames(error: BaseException) -> Iterator[tuple[str, str]]:
    """The package and ``file.py:12`` of all that an error went through, the one that raised it last."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame
        yield _package(code), f"{code.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
