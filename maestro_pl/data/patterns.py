"""Regular expressions of the user's, which may take for ever: nested repetitions try every way to divide a text."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from maestro_pl.errors import UserError

#: Seconds of processor time that one search may take.
SECONDS = 2.0


class _TimeUpError(Exception):
    pass


def search_within(
    pattern: re.Pattern[str], text: str, where: str, seconds: float | None = None
) -> re.Match[str] | None:
    """The first match of a pattern, or a sentence where the search does not end.

    The limit holds in the main thread, where a signal can interrupt a search; there is none in other threads.

    Args:
        pattern: to look for.
        text: where to look.
        where: names the text in the error.
        seconds: of processor time, None for ``SECONDS``.

    Raises:
        UserError: the time is up.
    """
    limit = SECONDS if seconds is None else seconds
    try:
        with _limited(limit):
            return pattern.search(text)
    except _TimeUpError:
        raise UserError(
            f"{where}: the search for {pattern.pattern!r} in a text of {len(text)} characters does not end within {limit:g} s "
            "of processor time: write the pattern without repetitions inside repetitions, such as (a+)+."
        ) from None


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeUpError

    # processor time, so that a busy machine makes no difference; and a clock that nothing else here uses
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
