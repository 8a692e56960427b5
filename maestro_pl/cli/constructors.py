"""What the constructor of a user's class raises, which the parser wraps in a report on types."""

from __future__ import annotations

import re
from collections.abc import Iterator

from maestro_pl.errors import UserError
from maestro_pl.run.others import OURS, origin, told

_CLASS = re.compile(r"class_path[ =]'([^']+)'")


def own_error(error: BaseException) -> UserError | None:
    """The sentence on what a user's class raised while it was built.

    Args:
        error: what the parser raised.

    Returns:
        None where no constructor raised, or one of the project's own, which is a bug.
    """
    named = _CLASS.findall(str(error))
    own: BaseException | None = error
    while own is not None and [package for package, _ in _frames(own)][-1:] == ["jsonargparse"]:
        own = own.__cause__
    if own is None or own is error:
        return None
    if isinstance(own, UserError):
        return UserError(str(own))
    if not named or named[-1].partition(".")[0] in OURS:
        return None
    return UserError(f"{named[-1]} raised {told(own)} ({_place(own, named[-1])}): correct the class or its arguments.")


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
        yield str(code.f_globals.get("__name__")).partition(".")[0], f"{code.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
