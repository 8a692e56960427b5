"""Ctrl-C at a moment that a test chooses."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ctrl_c_when(ready: Callable[[], object]) -> Iterator[None]:
    """Interrupt the main thread once, as soon as something is ready; Python's own handler is put back for that long."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not ready() and time.monotonic() < end:
            if over.wait(0.01):  # it ended by itself: an interrupt would be another test's
                return
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    over = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=wait, daemon=True).start()
        yield
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)
