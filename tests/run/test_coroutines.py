"""Limits and ends of coroutines: a cancellation that is lost leaves somebody waiting for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from maestro_pl.run import coroutines
from maestro_pl.run.coroutines import end, run_in_thread, within
from tests.support.interrupts import ctrl_c_when


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


def stubborn(seen: list[str], losses: int = 1, clean_up: float = 0.0, error: BaseException | None = None) -> Any:
    async def request() -> None:
        for _ in range(losses + 1):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("cancelled")
        await asyncio.sleep(clean_up)
        if error is not None:
            raise error

    return request


@pytest.mark.parametrize(
    "make",
    [
        lambda seen: stubborn(seen, losses=2),
        lambda seen: stubborn(seen, losses=0, clean_up=0.05),
        lambda seen: stubborn(seen, losses=1, error=OSError("gone")),
    ],
    ids=["loses cancellations", "cleans up for long", "fails as it ends"],
)
def test_who_waits_for_the_end_is_cancelled_too(
    make: Callable[[list[str]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request in `within` in a task that is ended, as an engine has them: nothing is left running, nothing is printed."""
    monkeypatch.setattr(coroutines, "_AGAIN_S", 0.02)
    seen: list[str] = []
    said: list[Any] = []

    async def run() -> bool:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
        outer = asyncio.ensure_future(within(make(seen)(), 60.0))
        await turns(2)
        await end([outer])
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others
        return outer.cancelled()

    assert asyncio.run(run())
    assert seen[0] == "cancelled"
    assert not said


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_without_time_nothing_is_asked(seconds: float) -> None:
    asked: list[bool] = []

    async def request() -> None:
        asked.append(True)

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await within(request(), seconds)

    asyncio.run(run())
    assert not asked


def test_ctrl_c_waits_until_what_it_cancels_has_ended() -> None:
    begun: list[bool] = []
    ended: list[bool] = []

    async def request() -> None:
        begun.append(True)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.3)
            ended.append(True)

    begin = time.monotonic()
    with ctrl_c_when(lambda: begun), pytest.raises(KeyboardInterrupt):
        run_in_thread(request)
    assert ended
    assert time.monotonic() - begin < 4
