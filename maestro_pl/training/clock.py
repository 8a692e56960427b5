"""What the run is doing right now (rollout, rewards, update, ...) and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, str], None]


class StageClock:
    """Names the stage in progress, adds up its wall time, and tells whoever listens.

    ``with clock("rollout"): ...`` adds to ``seconds["rollout"]``. Inside a stage, ``clock.note("32/64 responses")``
    says how far it is. Listeners are called as ``listener(stage, note)`` at every change; the empty stage means
    "between stages". Stages nest: the inner one is shown, and only its own time counts for it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.listeners: list[Listener] = []
        self._stack: list[str] = []
        self._since = 0.0

    @property
    def current(self) -> str:
        """The innermost stage in progress, or an empty string."""
        return self._stack[-1] if self._stack else ""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._charge()
        self._stack.append(stage)
        self._tell("")
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()
            self._tell("")

    def note(self, text: str) -> None:
        """Tell the listeners how far the stage in progress is."""
        self._tell(text)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds of something inside a stage, which count for the stage as well."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def pop_seconds(self) -> dict[str, float]:
        """The wall seconds of each stage, and what was added by hand, since the last call; start anew."""
        taken, self.seconds = self.seconds, {}
        return taken

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self._since
        self._since = now

    def _tell(self, note: str) -> None:
        for listener in self.listeners:
            listener(self.current, note)
