"""One event loop for the whole run: what binds itself to a loop (locks, clients) can be used in every step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Sequence
from typing import Any

from maestro_pl.run.others import Raised, TimeLimit

_ANSWERS_S = 2.0  # a loop that does not answer for that long after an interruption is blocked by what runs in it
_loop: asyncio.AbstractEventLoop | None = None
_suspect = False  # what ran in the loop did not come back


def run_together(awaitables: Sequence[Awaitable[Any]], seconds: float | None = None) -> list[Any]:
    """Await all of them at once, in a thread of its own: a notebook already runs a loop in this one.

    Args:
        awaitables: coroutines or futures.
        seconds: how long each may take; None: without limit.

    Returns:
        In their order, what each gave, or a :class:`~maestro_pl.run.others.Raised`.
    """
    global _suspect
    waiting = asyncio.run_coroutine_threadsafe(_gather(awaitables, seconds), _running_loop())
    try:
        return waiting.result()
    except BaseException:  # this thread was interrupted: nobody waits for them any more
        _suspect = True
        waiting.cancel()
        raise


async def _gather(awaitables: Sequence[Awaitable[Any]], seconds: float | None) -> list[Any]:
    return await asyncio.gather(*(_guarded(awaitable, seconds) for awaitable in awaitables))


async def _guarded(awaitable: Awaitable[Any], seconds: float | None) -> Any:
    """What an awaitable gives or raises; an exit raised in it would end the loop's thread."""
    task = asyncio.ensure_future(_caught(awaitable))
    done, _ = await asyncio.wait([task], timeout=seconds)
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
