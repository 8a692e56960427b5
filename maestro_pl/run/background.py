"""Calls that wait (for a server, for a coroutine), under way in threads of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_current: ContextVar[Background[Any] | None] = ContextVar("_current", default=None)


class Background(Generic[T]):
    """A call that has begun; the thread is a daemon, so that one that does not come back keeps no process alive.

    Attributes:
        seconds: how long the call took; 0 while it goes on.
    """

    def __init__(self, call: Callable[[], T], name: str = "background") -> None:
        self.seconds = 0.0
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._cancelled = False
        self._cancels: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        threading.Thread(target=copy_context().run, args=(self._work, call), name=name, daemon=True).start()

    def _work(self, call: Callable[[], T]) -> None:
        _current.set(self)
        begin = time.perf_counter()
        try:
            self._results.append(call())
        except BaseException as error:  # handed over: who asks for the result raises it
            self._error = error
        self.seconds = time.perf_counter() - begin
        self._done.set()

    @property
    def done(self) -> bool:
        """Whether the call has come back."""
        return self._done.is_set()

    def result(self, seconds: float | None = None) -> T:
        """Wait for the call; what it raised is raised here.

        Raises:
            TimeoutError: it goes on after so many seconds. Nothing interrupts it.
        """
        if not self._done.wait(seconds):
            raise TimeoutError(f"{seconds} s")
        if self._error is not None:
            raise self._error
        return self._results[0]

    def cancel(self) -> None:
        """Cancel what the call waits for, now and from now on, where it has said how."""
        with self._lock:
            self._cancelled = True
            cancels, self._cancels = self._cancels, []
        for cancel in cancels:
            cancel()

    def on_cancel(self, cancel: Callable[[], object]) -> None:
        """Call this when the call is cancelled; at once where it is already."""
        with self._lock:
            if not self._cancelled:
                self._cancels.append(cancel)
                return
        cancel()


def on_cancel(cancel: Callable[[], object]) -> None:
    """Say how to cancel what this thread is about to wait for, if it works for a :class:`Background`."""
    current = _current.get()
    if current is not None:
        current.on_cancel(cancel)
