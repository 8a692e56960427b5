"""Running a coroutine where an event loop may be running already, as in a notebook; limits and ends that are kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from maestro_pl.run.background import on_cancel

T = TypeVar("T")
_AGAIN_S = 1.0  # until a task that was cancelled and goes on is cancelled once more
_CANCELS = 5
_ENDS_S = 5.0  # what was interrupted may take to end


def run_in_thread(start: Callable[[], Coroutine[Any, Any, T]], name: str = "requests") -> T:
    """Run a coroutine to its end in a loop and a thread of its own, with this name; what it raises is raised here.

    An interrupt (Ctrl-C) of the waiting thread cancels the coroutine.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    over = threading.Event()  # before Python 3.13 a thread whose `join` was interrupted cannot be joined again
    loop = asyncio.new_event_loop()
    task = loop.create_task(start())

    def work() -> None:
        asyncio.set_event_loop(loop)
        try:
            results.append(loop.run_until_complete(task))
        except BaseException as error:  # handed over to the waiting thread
            errors.append(error)
        finally:
            try:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()
            finally:
                over.set()

    on_cancel(lambda: _cancel(loop, task))
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
        over.wait()
    except BaseException:
        _cancel(loop, task)
        over.wait(_ENDS_S)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
    with suppress(RuntimeError):  # it is over: the loop is closed
        loop.call_soon_threadsafe(task.cancel)


async def within(awaitable: Awaitable[T], seconds: float) -> T:
    """What an awaitable gives in time; a cancellation of the waiting task is always raised.

    Before Python 3.12 ``asyncio.wait_for`` gives the result, or a timeout, in place of a cancellation that comes in the same
    turn of the loop: who was cancelled goes on, and who waits for its end waits for ever.

    Raises:
        TimeoutError: it was not done after so many seconds, and is cancelled.
    """
    task = asyncio.ensure_future(awaitable)
    if seconds <= 0 and not task.done():
        await end([task])  # before its first turn: nothing is asked for
        raise TimeoutError(f"{seconds} s")
    try:
        await asyncio.wait([task], timeout=seconds)  # raises a cancellation whatever has come of the task
    except asyncio.CancelledError:
        await end([task])
        raise
    if not task.done():
        await end([task])
        raise TimeoutError(f"{seconds} s")
    return task.result()


async def end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks until they have ended; what they raise is not raised here.

    Code that is not ours may lose a cancellation, so it is said again; a task that will not end is left behind. A cancellation
    of the caller in the meantime is raised once they have ended.
    """
    every = set(tasks)
    going, cancelled = every, None
    for _ in range(_CANCELS):
        for task in going:
            task.cancel()
        try:
            if going:
                await asyncio.wait(going, timeout=_AGAIN_S)
        except asyncio.CancelledError as error:
            cancelled = error
        going = {task for task in going if not task.done()}
    for task in every - going:
        if not task.cancelled():
            task.exception()  # is asked for: asyncio would say that nobody did
    if cancelled is not None:
        raise cancelled
