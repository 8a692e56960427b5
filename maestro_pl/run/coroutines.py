"""Running a coroutine where an event loop may be running already, as in a notebook."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from maestro_pl.run.background import on_cancel

T = TypeVar("T")


def run_in_thread(start: Callable[[], Coroutine[Any, Any, T]], name: str = "requests") -> T:
    """Run a coroutine to its end in a loop and a thread of its own, with this name; what it raises is raised here.

    An interrupt (Ctrl-C) of the waiting thread cancels the coroutine.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(start())

    def work() -> None:
        asyncio.set_event_loop(loop)
        try:
            results.append(loop.run_until_complete(task))
        except BaseException as error:  # handed over to the waiting thread
            errors.append(error)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    on_cancel(lambda: _cancel(loop, task))
    try:
        thread.join()
    except BaseException:
        _cancel(loop, task)
        thread.join(timeout=5)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
    with suppress(RuntimeError):  # it is over: the loop is closed
        loop.call_soon_threadsafe(task.cancel)
