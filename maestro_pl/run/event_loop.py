"""One event loop for the whole run: what binds itself to a loop (locks, clients) can be used in every step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from maestro_pl.run.background import on_cancel
from maestro_pl.run.others import Raised, TimeLimit

_ANSWERS_S = 2.0  # a loop that does not answer for that long after an interruption is blocked by what runs in it
_AFTER_LIMIT_S = 5.0  # for coroutines to end by their own limits before one that blocks the loop is given up
_lock = threading.Lock()  # rewards that wait come from threads of their own
_loop: asyncio.AbstractEventLoop | None = None
_suspect = False  # what ran in the loop did not come back


def run_together(awaitables: Sequence[Awaitable[Any]], seconds: float | None = None) -> list[Any]:
    """Await all of them at once, in a thread of its own: a notebook already runs a loop in this one.

    Args:
        awaitables: coroutines or futures.
        seconds: how long each may take; None: without limit.

    Returns:
        In their order, what each gave, or a :class:`~maestro_pl.run.others.Raised`; of ``TimeLimit`` for all of them where
        one blocks the loop.
    """
    global _suspect
    with _lock:
        waiting = asyncio.run_coroutine_threadsafe(_gather(awaitables, seconds), _running_loop())
    on_cancel(waiting.cancel)
    try:
        return waiting.result(None if seconds is None else seconds + _AFTER_LIMIT_S)
    except FutureTimeoutError:
        _suspect = True
        waiting.cancel()
        return [Raised(TimeLimit(seconds)) for _ in awaitables]
    except BaseException:  # this thread was interrupted: nobody waits for them any more
        _suspect = True
        waiting.cancel()
        raise


async def _gather(awaitables: Sequence[Awaitable[Any]], seconds: float | None) -> list[Any]:
    return await asyncio.gather(*(_guarded(awaitable, seconds) for awaitable in awaitables))


async def _guarded(awaitable: Awaitable[Any], seconds: float | None) -> Any:
    """What an awaitable gives or raises; an exit raised in it would end the loop's thread."""
    task = asyncio.ensure_future(_caught(awaitable))
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:  # `wait` leaves what it waits for going on
        task.cancel()
        raise
    if done:
        return Raised(asyncio.CancelledError()) if task.cancelled() else task.result()
    task.cancel()
    return Raised(TimeLimit(seconds))


async def _caught(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # handed over: the caller knows whose it is
        return Raised(error)


def _running_loop() -> asyncio.AbstractEventLoop:
    """The run's loop; a new one in place of one that something blocks."""
    global _loop, _suspect
    if _loop is None or (_suspect and not _answers(_loop)):
        _loop = asyncio.new_event_loop()
        threading.Thread(target=_loop.run_forever, name="rewards", daemon=True).start()
    _suspect = False
    return _loop


def _answers(loop: asyncio.AbstractEventLoop) -> bool:
    answered = threading.Event()
    loop.call_soon_threadsafe(answered.set)
    return answered.wait(_ANSWERS_S)
