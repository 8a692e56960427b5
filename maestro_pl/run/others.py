"""Calling code of others: how long it may take, and what it may leave behind in the process."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from maestro_pl.errors import UserError
from maestro_pl.run.background import Background, on_cancel
from maestro_pl.run.random_state import rng_state, set_rng_state

T = TypeVar("T")

OURS = ("maestro_pl", "callbacks")  # packages whose classes are the project's, and all others somebody else's
PAGE = "docs/extending.md"  # which tells others how to write theirs
GRACE_S = 10.0  # what a call may still take after SIGTERM: schedulers kill 30 s after it
_AGAIN_S = 1.0  # between two interruptions of code that swallows the first
_SIGNAL = getattr(signal, "SIGUSR2", None)


class NotBack(BaseException):
    """A call that did not come back in time; no ``Exception``, so that ``except Exception`` in it cannot swallow it."""


class TimeLimit(NotBack):
    """A call took longer than its limit of seconds."""


class Terminated(NotBack):
    """The process was asked to end, and a call went on."""


class CtrlC(KeyboardInterrupt):
    """A Ctrl-C of the user that came while code of others ran; a plain ``KeyboardInterrupt`` was raised by that code."""


@dataclass
class Raised:
    """What a call raised, in the place of its result."""

    error: BaseException


def origin(error: BaseException) -> str:
    """``file.py:12``: the line that raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"


def told(error: BaseException) -> str:
    """``KeyError: 'apple'``; ``SystemExit`` says by what it was called."""
    if isinstance(error, SystemExit):
        return f"SystemExit: {error.code}" if error.code is not None else "SystemExit"
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def not_begun(who: str) -> UserError:
    """The sentence on a class whose ``__init__`` leaves out that of the class which it is derived from."""
    return UserError(
        f"{who}: its `__init__` does not call that of its base class: begin it with super().__init__() ({PAGE})."
    )


@contextmanager
def kept_process(seed: int) -> Iterator[None]:
    """Keep the global generators and the working folder as they are, whatever the code inside does to them.

    Args:
        seed: what the code's own draws begin from, so that they depend on nothing that was drawn before.
    """
    state, numbers, plain, folder = rng_state(), np.random.get_state(), random.getstate(), _working_folder()  # noqa: NPY002
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (what others draw from)
    random.seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)
        np.random.set_state(numbers)  # noqa: NPY002
        random.setstate(plain)
        if folder and folder != _working_folder():
            os.chdir(folder)


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed; code that does not care about it goes on
        return ""


# -- a limit of time -------------------------------------------------------------------------------------------------


class _Watch:
    """Interrupts the main thread when its time is up, again and again until it answers."""

    def __init__(self, seconds: float | None, stopping: Callable[[], bool], grace: float) -> None:
        self.seconds, self.stopping, self.grace = seconds, stopping, grace
        self.due: NotBack | None = None
        self.done = threading.Event()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        end = None if self.seconds is None else time.monotonic() + self.seconds
        end_of_grace: float | None = None
        while not self.done.is_set():
            now = time.monotonic()
            if end_of_grace is None and self.stopping():
                end_of_grace = now + self.grace
            if end_of_grace is not None and now >= end_of_grace:
                self.due = Terminated(f"{self.grace:g}")
            elif end is not None and now >= end:
                self.due = TimeLimit(self.seconds)
            if self.due is not None and not self.done.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)  # type: ignore[arg-type]
                self.done.wait(_AGAIN_S)
            else:
                self.done.wait(min(0.2, max(0.01, end - now)) if end is not None else 0.2)


_watches: list[_Watch] = []
_before: Any = None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of the watches' signal; it stays, because a signal may come late, and its default ends the process."""
    for watch in _watches:
        if watch.due is not None and not watch.done.is_set():
            raise watch.due
    if callable(_before):
        _before(number, frame)


def within(
    call: Callable[[], T], seconds: float | None, stopping: Callable[[], bool] = bool, grace: float = GRACE_S
) -> T:
    """Call code of others, which is interrupted where it does not come back.

    Python code, sleeping and waiting for locks, files or sockets are interrupted; a computation inside an extension
    module ends first. Outside the main thread, or where threads cannot be signalled (Windows), nothing is: there a call
    with a limit goes on in a thread that nobody waits for any more.

    Args:
        call: the code.
        seconds: how long it may take; None: without limit.
        stopping: whether the process was asked to end, by SIGTERM.
        grace: seconds that the call may go on after that.

    Raises:
        TimeLimit: it took longer than ``seconds``.
        Terminated: it went on for ``grace`` seconds after ``stopping()``.
        CtrlC: the user interrupted it.
    """
    global _before
    if threading.current_thread() is not threading.main_thread() or _SIGNAL is None:
        return call() if seconds is None else _left_behind(call, seconds)
    current = signal.getsignal(_SIGNAL)
    if current is not _interrupt:
        _before = current
        signal.signal(_SIGNAL, _interrupt)
    watch = _Watch(seconds, stopping, grace)
    _watches.append(watch)
    try:
        with _marked_ctrl_c():
            return call()
    finally:
        watch.done.set()
        _watches.remove(watch)


def _left_behind(call: Callable[[], T], seconds: float) -> T:
    background = Background(call, name="limited")
    on_cancel(background.cancel)
    try:
        return background.result(seconds)
    except TimeoutError as error:
        if not background.done:  # a TimeoutError of the call's own is its result
            raise TimeLimit(seconds) from error
        raise


@contextmanager
def _marked_ctrl_c() -> Iterator[None]:
    """Tell the user's Ctrl-C from a ``KeyboardInterrupt`` that the code inside raises."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        yield
        return
    handler = before

    def marked(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except CtrlC:
            raise
        except KeyboardInterrupt as error:
            raise CtrlC from error

    signal.signal(signal.SIGINT, marked)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is marked:  # unless the code inside has set its own
            signal.signal(signal.SIGINT, before)


# -- where code of others is found -----------------------------------------------------------------------------------


def extend_path(*folders: str) -> None:
    """Let code be imported from these folders and the working folder, behind all that could be imported before."""
    for folder in (*folders, _working_folder()):
        if folder and folder not in sys.path:
            sys.path.append(folder)
