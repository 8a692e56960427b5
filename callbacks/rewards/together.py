"""The rewards of one batch that wait: under way together, while the others compute."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from maestro_pl.rollout import Rollout
from maestro_pl.run.background import Background
from maestro_pl.run.others import kept_process, within


class Together:
    """What the rewards of one batch share, from the first of them to the last.

    While one is under way, the global generators and the working folder are not the run's: they are put back when the last
    one is taken, or when all are cancelled.

    Args:
        rollout: the batch's.
        where: names the batch in the run, for seeds.
    """

    def __init__(self, rollout: Rollout, where: str) -> None:
        self.where = where
        self._rollout = weakref.ref(rollout)
        self._calls: dict[str, Background[Any]] = {}
        self._kept = ExitStack()

    def is_of(self, rollout: Rollout) -> bool:
        """Whether this is the batch of that rollout."""
        return self._rollout() is rollout

    def __contains__(self, name: str) -> bool:
        return name in self._calls

    def begin(self, name: str, call: Callable[[], Any], seed: int) -> None:
        """Start the call of the reward of this name."""
        if not self._calls:
            self._kept.enter_context(kept_process(seed))
        self._calls[name] = Background(call, name=f"reward {name}")

    def take(self, name: str, stopping: Callable[[], bool]) -> tuple[Any, float]:
        """Wait for a reward: what its call gave, and the seconds that it took.

        Raises:
            Terminated: it went on long after the process was asked to end.
            CtrlC: the user interrupted the wait.
        """
        call = self._calls[name]
        result = within(call.result, None, stopping)
        del self._calls[name]
        if not self._calls:
            self._kept.close()
        return result, call.seconds

    def cancel(self) -> None:
        """End what is still under way; nobody reads it."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.cancel()
        self._kept.close()
