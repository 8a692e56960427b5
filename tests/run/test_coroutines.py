"""Limits and ends of coroutines: a cancellation that is lost leaves somebody waiting for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from maestro_pl.run import coroutines
from maestro_pl.run.coroutines import end, within


async def turns(n: int) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("gives", ["a result", "an error"])
def test_a_cancellation_is_kept_in_whichever_turn_of_the_loop_it_comes(after: int, gives: str) -> None:
    """``asyncio.wait_for`` of Python 3.11 loses it where the result comes one turn before."""

    async def run() -> tuple[bool, bool]:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def request() -> str:
            return await answer

        asking = asyncio.ensure_future(within(request(), 60.0))
        await turns(3)
        if gives == "a result":
            answer.set_result("said")
        else:
            answer.set_exception(OSError("gone"))
        await turns(after)
        taken = asking.cancel()  # false: it was done before
        await asyncio.wait([asking])
        return taken, asking.cancelled()

    taken, cancelled = asyncio.run(run())
    assert taken is cancelled
    assert taken or after > 1


def test_a_limit_cancels_what_is_late_and_passes_on_what_is_not() -> None:
    seen: list[str] = []

    async def late() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def fails() -> None:
        raise OSError("gone")

    async def gives() -> int:
        return 3

    async def run() -> None:
        with pytest.raises(TimeoutError, match=r"0.05 s"):
            await within(late(), 0.05)
        with pytest.raises(OSError, match="gone"):
            await within(fails(), 60.0)
        assert await within(gives(), 60.0) == 3

    asyncio.run(run())
    assert seen == ["cancelled"]


def test_tasks_that_lose_a_cancellation_are_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coroutines, "_AGAIN_S", 0.02)

    async def loses(count: int) -> None:
        for _ in range(count):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue
        await asyncio.sleep(60)

    async def run() -> list[bool]:
        tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(loses(n)) for n in (0, 1, 3, 100)]
        await turns(1)
        await asyncio.wait_for(end(tasks), 20)  # the last is left behind
        ended = [task.cancelled() for task in tasks]
        for _ in range(100):
            tasks[-1].cancel()
            await turns(1)
        return ended

    assert asyncio.run(run()) == [True, True, True, False]
