"""What the constructor of a user's class raises, which the parser wraps in a report on types or lets through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
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
    steps = list(_steps(error))
    if not steps or _package(steps[-1].tb_frame) != "jsonargparse":
        yield error
        return
    tried = steps[-1].tb_frame.f_locals.get("exceptions")  # one for each type that an argument may have
    for each in tried if isinstance(tried, list) else [error.__cause__]:
        if each is not None:
            yield from _of_others(each)


def _let_through(error: BaseException) -> UserError | None:
    """The same of an error that the parser has no report for: the class is that of the constructor that it called."""
    built: Any = None
    for step in _steps(error):
        frame, caller = step.tb_frame, step.tb_frame.f_back
        if caller is not None and _package(caller) == "jsonargparse" != _package(frame):
            built = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
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
        f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}"
        for step in _steps(error)
        if (name := _package(step.tb_frame)) == package or (package[0] == "_" and name.startswith(package))
    ]
    return own[-1] if own else origin(error)


def _steps(error: BaseException) -> Iterator[TracebackType]:
    """All that an error went through, what raised it last."""
    step = error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
