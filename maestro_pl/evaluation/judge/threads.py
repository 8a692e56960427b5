"""Running a coroutine where an event loop may be running already, as in a notebook."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_in_thread(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end in a loop and a thread of its own; what it raises is raised here.

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

    thread = threading.Thread(target=work, name="judge", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(timeout=5)
        raise
    if errors:
        raise errors[0]
    return results[0]
